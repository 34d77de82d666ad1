"""The proof: the exported graph against PyTorch, outputs and states, over many steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rwkv_core.adapter import Arrays, ExportSpec, Run
from rwkv_core.errors import ExportError

__all__ = ["compare"]


def compare(
    spec: ExportSpec, expected: Run, actual: Run, *, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Feed both the same inputs and return one row per size and checkpoint.

    A recurrent graph runs ``max(steps)`` steps, each side carrying its own state, and is compared
    after each number in ``steps``. Errors are the largest absolute difference over the largest
    absolute output value; a state whose values are larger than any output (it sums over thousands
    of tokens) is measured by its own, because fp32 has no more digits to offer.

    Raises:
        ExportError: a disagreement above ``spec.tolerance``, or a value that is not a number.
    """
    rows = []
    for sizes in spec.sizes or _default_sizes(spec):
        rng = np.random.default_rng(0)
        # the proof is long at one size; the others show that free dimensions are free
        until = max(steps) if sizes is (spec.sizes or (sizes,))[0] else min(steps[-1], 16)
        if not spec.state:
            until = 1
        state_e = expected.initial_state(spec.name, sizes.get("batch", 1))
        state_a = actual.initial_state(spec.name, sizes.get("batch", 1))
        scale = 0.0
        for step in range(1, until + 1):
            inputs = _draw(spec, rng, sizes)
            out_e = expected(spec.name, {**inputs, **state_e})
            out_a = actual(spec.name, {**inputs, **state_a})
            scale = max(scale, *(float(np.abs(out_e[n]).max()) for n in spec.outputs))
            if step in steps or step == until:
                errors = {n: _error(out_e[n], out_a[n], scale) for n in out_e}
                rows.append({**sizes, "step": step, "errors": errors})
                _refuse_drift(spec, rows[-1])
            state_e = {n: out_e[n] for n in spec.state}
            state_a = {n: out_a[n] for n in spec.state}
    return rows


def _error(expected: np.ndarray, actual: np.ndarray, scale: float) -> float:
    if expected.shape != actual.shape:
        return float("inf")
    difference = np.abs(expected.astype(np.float64) - actual).max(initial=0.0)
    scale = max(scale, float(np.abs(expected).max(initial=0.0)))
    return float(difference / scale) if scale else float(difference)


def _refuse_drift(spec: ExportSpec, row: Mapping[str, Any]) -> None:
    name, worst = max(row["errors"].items(), key=lambda item: (np.isnan(item[1]), item[1]))
    if not worst <= spec.tolerance:
        raise ExportError(
            f"graph {spec.name!r} disagrees with PyTorch: {name!r} differs by {worst:.3g} of the "
            f"largest value after step {row['step']}, allowed is {spec.tolerance:.3g}; nothing "
            "was written"
        )


def _default_sizes(spec: ExportSpec) -> list[dict[str, int]]:
    arrays = {**spec.inputs, **spec.state}
    sizes = {
        dim: arrays[name].shape[axis]
        for name, axes in spec.dynamic.items()
        for axis, dim in axes.items()
    }
    return [sizes, {dim: 2 * size for dim, size in sizes.items()}] if sizes else [sizes]


def _draw(spec: ExportSpec, rng: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
    if spec.sample is not None:
        return spec.sample(rng, sizes)
    drawn = {}
    for name, example in spec.inputs.items():
        shape = list(example.shape)
        for axis, dim in spec.dynamic.get(name, {}).items():
            shape[axis] = sizes[dim]
        drawn[name] = rng.choice(example.ravel(), size=shape)
    return drawn
