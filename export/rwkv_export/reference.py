"""What PyTorch answered when the model was exported, kept in the folder to be asked again anywhere.

``reference.safetensors`` holds, for every graph, the inputs of some calls in a row from the initial
state (``<graph>/<call>/in/<name>``) and what came out of some of them (``…/out/<name>``).
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from rwkv_core.adapter import ExportSpec, Run
from rwkv_core.errors import ExportError
from rwkv_export.runtime import Runtime
from rwkv_export.verify import draw, relative_error

__all__ = ["REFERENCE", "check", "encode", "errors", "rebound", "record"]

Calls = dict[int, dict[str, dict[str, np.ndarray]]]  # call → "in" or "out" → name → array

REFERENCE = "reference.safetensors"
TOKENS = 64  # read by a recurrent graph
KEPT = (1, 16, 64)  # after which of them the outputs are kept


def record(spec: ExportSpec, run: Run) -> dict[str, np.ndarray]:
    """Return inputs and outputs of one graph: one call, or of a recurrent graph 64 tokens or more.

    Sizes are the last ones that the graph is verified at.
    """
    sizes = spec.sizes[-1] if spec.sizes else {}
    if not sizes:
        arrays = {**spec.inputs, **spec.state}
        for name, axes in spec.dynamic.items():
            sizes = {**sizes, **{dim: arrays[name].shape[axis] for axis, dim in axes.items()}}
    rng, found = np.random.default_rng(1), dict[str, np.ndarray]()
    state = run.initial_state(spec.name, sizes.get("batch", 1))
    at_once = sizes.get("time", 1)
    calls = -(-TOKENS // at_once) if spec.state else 1
    for call in range(1, calls + 1):
        inputs = draw(spec, rng, sizes)
        out = run(spec.name, {**inputs, **state})
        state = {name: out[name] for name in spec.state}
        found |= {f"{spec.name}/{call}/in/{n}": x for n, x in inputs.items()}
        kept = out if call == calls else {n: out[n] for n in spec.outputs}
        if call in KEPT or call == calls:
            found |= {f"{spec.name}/{call}/out/{n}": x for n, x in kept.items()}
    return found


def encode(found: Mapping[str, np.ndarray], bounds: Mapping[str, float]) -> bytes:
    """Return the content of the file; ``bounds`` says how far each graph may be from it."""
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(x) for name, x in found.items()}
    return save(arrays, {"bounds": json.dumps(dict(bounds), sort_keys=True)})


def rebound(content: bytes, bounds: Mapping[str, float]) -> bytes:
    """Return the same reference with other bounds."""
    from safetensors.numpy import load

    return encode(load(content), bounds)


def check(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """Run what was recorded and return per graph the worst error, its bound and the calls made.

    Raises:
        ExportError: the folder holds no reference, or an answer is off by more than the bound.
    """
    bounds, calls = _read(runtime)
    results = {}
    for graph, (name, worst) in _errors(runtime, calls).items():
        if not worst <= bounds[graph]:
            raise ExportError(
                f"{runtime.folder}: graph {graph!r} does not answer as PyTorch did when it was "
                f"exported: {name!r} is off by {worst:.3g} of the largest value, allowed is "
                f"{bounds[graph]:.3g}"
            )
        results[graph] = {"worst": worst, "bound": bounds[graph], "calls": len(calls[graph])}
    return results


def errors(runtime: Runtime) -> dict[str, float]:
    """Return the worst error of each graph, whatever its bound.

    Raises:
        ExportError: the folder holds no reference.
    """
    return {graph: worst for graph, (_, worst) in _errors(runtime, _read(runtime)[1]).items()}


def _read(runtime: Runtime) -> tuple[dict[str, float], dict[str, Calls]]:
    from safetensors import SafetensorError, safe_open

    path = runtime.folder / REFERENCE
    calls: dict[str, Calls] = {}
    try:
        with safe_open(path, "np") as file:
            bounds: dict[str, float] = json.loads((file.metadata() or {})["bounds"])
            for key in file.keys():  # noqa: SIM118
                graph, call, kind, tensor = key.split("/", 3)
                kinds = calls.setdefault(graph, {}).setdefault(int(call), {})
                kinds.setdefault(kind, {})[tensor] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ExportError(f"{path} is no reference to verify against: {error}") from error
    return bounds, calls


def _errors(runtime: Runtime, calls: Mapping[str, Calls]) -> dict[str, tuple[str, float]]:
    """Return graph → the tensor that is off most and by how much of the largest value."""
    results = {}
    for graph, recorded in calls.items():
        info = runtime.graphs[graph]
        axes = {t.name: t.shape.index("batch") for t in info.inputs if "batch" in t.shape}
        batch = next((recorded[1]["in"][n].shape[axis] for n, axis in axes.items()), 1)
        state, scale, found = runtime.initial_state(graph, batch), 0.0, [("", 0.0)]
        for _, call in sorted(recorded.items()):
            out = runtime(graph, {**call["in"], **state})
            state = {t.name: out[t.name] for t in info.state}
            expected = call.get("out", {})
            if expected:
                scale = max(scale, *(float(np.abs(expected[n]).max()) for n in info.outputs))
            for name, array in expected.items():
                found.append((name, relative_error(array, out[name], scale)))
        results[graph] = max(found, key=lambda item: (np.isnan(item[1]), item[1]))
    return results
