"""The proof: the exported graphs against PyTorch and against each other, outputs and states."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rwkv_core.adapter import Arrays, ExportSpec, Run
from rwkv_core.errors import ExportError

__all__ = ["HANDOVER", "compare", "compare_handover", "relative_error"]

HANDOVER = 5e-5  # how far a sequence read at once may be from the same read token by token


def compare(
    spec: ExportSpec, expected: Run, actual: Run, *, steps: Sequence[int]
) -> list[dict[str, Any]]:
    """Feed both the same inputs and return one row per size and checkpoint.

    A recurrent graph reads ``max(steps)`` tokens, each side carrying its own state, and is compared
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
        scale, n, at_once = 0.0, 0, sizes.get("time", 1) if spec.state else 1
        while n < until:
            n += at_once
            inputs = draw(spec, rng, sizes)
            out_e = expected(spec.name, {**inputs, **state_e})
            out_a = actual(spec.name, {**inputs, **state_a})
            scale = max(scale, *(float(np.abs(out_e[n]).max()) for n in spec.outputs))
            if n >= until or any(n - at_once < step <= n for step in steps):
                errors = {n: relative_error(out_e[n], out_a[n], scale) for n in out_e}
                rows.append({**sizes, "step": n, "errors": errors})
                _refuse_drift(spec, rows[-1])
            state_e = {n: out_e[n] for n in spec.state}
            state_a = {n: out_a[n] for n in spec.state}
    return rows


def compare_handover(step: ExportSpec, prefill: ExportSpec, run: Run) -> list[dict[str, Any]]:
    """Read sequences at once, in random pieces, and token by token; return one row per sequence.

    A graph whose length is fixed reads its length three times.

    Raises:
        ExportError: outputs or states differ by more than ``HANDOVER`` of the largest value.
    """
    rng, rows = np.random.default_rng(0), []
    splits = [[1], [7], [64], [100], *([*map(int, _pieces(rng, 96, 6))] for _ in range(3))]
    batch, fixed = 2 if step.dynamic else 1, prefill.sizes[0]["time"]
    if not prefill.dynamic:
        splits, batch = [[fixed] * 3], 1
    for pieces in splits:
        T = sum(pieces)
        inputs = draw(prefill, rng, {"batch": batch, "time": T, "rows": T})
        state, outputs, begin = run.initial_state(prefill.name, batch), [], 0
        for size in pieces:
            piece = _cut(inputs, begin, begin + size)
            positions = np.arange(size) if prefill.dynamic else np.array([size - 1])
            state = run(prefill.name, {**_as(prefill, {**piece, "positions": positions}), **state})
            outputs.append({n: state.pop(n) for n in prefill.outputs})
            begin += size
        expected, steps = run.initial_state("step", batch), []
        for t in range(T):
            piece = _cut(inputs, t, t + 1)
            expected = run("step", {**_as(step, piece), **expected})
            steps.append({n: expected.pop(n) for n in step.outputs})
        errors = {}
        for n in step.outputs:
            found = np.concatenate([o[n] for o in outputs], 1)
            wanted = np.stack([o[n] for o in steps], 1)
            if not prefill.dynamic:  # it answers after the last of its tokens
                wanted = wanted[:, fixed - 1 :: fixed]
            errors[n] = relative_error(wanted, found, 0.0)
        scale = max(float(np.abs(o[n]).max()) for o in steps for n in step.outputs)
        errors |= {n: relative_error(expected[n], state[n], scale) for n in step.state}
        rows.append({"pieces": pieces, "errors": errors})
        worst = max(errors, key=lambda n: (np.isnan(errors[n]), errors[n]))
        if not errors[worst] <= HANDOVER:
            raise ExportError(
                f"the graphs {prefill.name!r} and 'step' disagree: {worst!r} differs by "
                f"{errors[worst]:.3g} of the largest value after {T} tokens in pieces of {pieces}, "
                f"allowed is {HANDOVER:.3g}; nothing was written"
            )
    return rows


def relative_error(expected: np.ndarray, actual: np.ndarray, scale: float) -> float:
    """Return the largest difference over ``scale`` or the largest expected value, if larger."""
    if expected.shape != actual.shape:
        return float("inf")
    difference = np.abs(expected.astype(np.float64) - actual).max(initial=0.0)
    scale = max(scale, float(np.abs(expected).max(initial=0.0)))
    return float(difference / scale) if scale else float(difference)


def draw(spec: ExportSpec, rng: np.random.Generator, sizes: Mapping[str, int]) -> Arrays:
    """Return random inputs of a graph, for these sizes of its free dimensions."""
    if spec.sample is not None:
        return spec.sample(rng, sizes)
    drawn = {}
    for name, example in spec.inputs.items():
        shape = list(example.shape)
        for axis, dim in spec.dynamic.get(name, {}).items():
            shape[axis] = sizes[dim]
        drawn[name] = rng.choice(example.ravel(), size=shape)
    return drawn


def _pieces(rng: np.random.Generator, total: int, n: int) -> np.ndarray:
    cuts = np.sort(rng.choice(np.arange(1, total), n - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]))


def _cut(inputs: Arrays, begin: int, end: int) -> dict[str, np.ndarray]:
    """Return the inputs [B, T, ...] from token ``begin`` to ``end``."""
    return {name: x[:, begin:end] for name, x in inputs.items() if name != "positions"}


def _as(spec: ExportSpec, given: Arrays) -> dict[str, np.ndarray]:
    """Return what a graph takes of ``given``, whole numbers in its width."""
    return {name: given[name].astype(example.dtype) for name, example in spec.inputs.items()}


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
