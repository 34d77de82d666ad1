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

__all__ = ["REFERENCE", "check", "encode", "record"]

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


def check(runtime: Runtime) -> dict[str, dict[str, Any]]:
    """Run what was recorded and return per graph the worst error, its bound and the calls made.

    Raises:
        ExportError: the folder holds no reference, or an answer is off by more than the bound.
    """
    from safetensors import SafetensorError, safe_open

    path = runtime.folder / REFERENCE
    try:
        with safe_open(path, "np") as file:
            bounds: dict[str, float] = json.loads((file.metadata() or {})["bounds"])
            recorded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ExportError(f"{path} is no reference to verify against: {error}") from error
    results = {}
    for graph, bound in bounds.items():
        calls: dict[int, dict[str, dict[str, np.ndarray]]] = {}
        for key, array in recorded.items():
            name, _, rest = key.partition("/")
            if name == graph:
                call, kind, tensor = rest.split("/", 2)
                calls.setdefault(int(call), {}).setdefault(kind, {})[tensor] = array
        info = runtime.graphs[graph]
        axes = {t.name: t.shape.index("batch") for t in info.inputs if "batch" in t.shape}
        batch = next((calls[1]["in"][n].shape[axis] for n, axis in axes.items()), 1)
        state, scale, worst = runtime.initial_state(graph, batch), 0.0, 0.0
        for _, call in sorted(calls.items()):
            out = runtime(graph, {**call["in"], **state})
            state = {t.name: out[t.name] for t in info.state}
            expected = call.get("out", {})
            scale = max(
                [scale, *(float(np.abs(expected[n]).max()) for n in info.outputs if expected)]
            )
            for name, array in expected.items():
                off = relative_error(array, out[name], scale)
                if not off <= bound:
                    raise ExportError(
                        f"{runtime.folder}: graph {graph!r} does not answer as PyTorch did when it "
                        f"was exported: {name!r} is off by {off:.3g} of the largest value, "
                        f"allowed is {bound:.3g}"
                    )
                worst = max(worst, off)
        results[graph] = {"worst": worst, "bound": bound, "calls": len(calls)}
    return results
