"""From a model to a folder: write the graphs, prove them, and only then let the folder appear."""

import copy
import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from rwkv_core import __version__
from rwkv_core._files import atomic_folder
from rwkv_core.adapter import ExportSpec
from rwkv_core.checkpoint import adapter_of, portable
from rwkv_core.errors import ExportError, did_you_mean
from rwkv_core.run import TorchRun
from rwkv_export import reference
from rwkv_export.manifest import PARITY, GraphInfo, Manifest, TensorInfo, sha256
from rwkv_export.mobile import fixed, for_one, in_32_bits, to_ort
from rwkv_export.onnx import OPSET, nodes_per_op, write_onnx
from rwkv_export.profiles import profiled
from rwkv_export.recurrences import CHUNK, LANES
from rwkv_export.runtime import Runtime
from rwkv_export.verify import HANDOVER, compare, compare_handover
from rwkv_export.weights import WEIGHTS, WeightFile

__all__ = ["STEPS", "Report", "export"]

STEPS = (1, 16, 256, 4096)


@dataclass(frozen=True)
class Report:
    """What was exported and how well it agrees: ``worst`` over all graphs, sizes and steps."""

    folder: Path
    worst: float
    bytes: int
    nodes: dict[str, int]
    parity: dict[str, Any]


def export(
    model: nn.Module,
    folder: str | Path,
    *,
    steps: Sequence[int] = STEPS,
    lane: str = "scan",
    profiles: Sequence[str] = (),
) -> Report:
    """Write ``model`` as ONNX graphs with manifest, parity report and reference.

    Args:
        model: made by a registered domain.
        folder: where; must not exist. It appears only if every graph agrees with PyTorch.
        steps: after how many recurrent steps outputs and states are compared.
        lane: what the recurrences of sequences are made of: ``"scan"``, standard operators alone;
            ``"linear_attention"``, the operator of onnxruntime ≥ 1.25.1 with a fallback in the same
            file; ``"chunk"``, a graph ``chunk`` in place of ``prefill``, which reads exactly 16
            tokens of one sequence and has neither ``Scan`` nor free dimensions; ``"triangle"``, the
            bidirectional recurrences of pictures without ``CumSum``; ``"mobile"``, the domain's
            first graph alone, for one input of one size, in the format of onnxruntime's builds for
            phones (``mobile.py``); ``"web"``, graphs for one input of one size, ``chunk`` beside
            ``prefill``, for the page in ``web.py``.
        profiles: graphs to add: ``"genai"`` and ``"transformers"`` for those generators,
            ``"embeddings"`` for accelerators that take vectors (``profiles.py``).

    Raises:
        ExportError: an operation without translation, a mixer that does not export, a disagreement
            above the bound, or a folder that exists.
        OSError: the folder cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise ExportError(f"{folder} exists already; remove it or choose another folder")
    if lane not in LANES:
        raise ExportError(f"unknown lane {lane!r}; {did_you_mean(lane, LANES)}")
    if lane == "mobile" and set(profiles) - {"embeddings"}:
        raise ExportError("for phones there is one graph; of profiles it takes 'embeddings' alone")
    name, adapter = adapter_of(model)
    for path, module in model.named_modules():
        if not getattr(module, "exportable", True):
            raise ExportError(f"{path} ({type(module).__name__}) does not export to ONNX")
    for path, p in model.named_parameters():
        if not torch.isfinite(p).all():
            raise ExportError(f"{path} holds values that are not finite numbers; nothing to export")
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).cpu().float()
    was_training = model.training
    model.eval()
    try:
        specs = adapter.exports(model)
        metadata, carried = adapter.metadata(model), portable(model)[1]
        files = dict(carried)
        for profile in profiles:
            added, more = profiled(profile, specs, metadata, carried)
            specs, files = [*specs, added], {**files, **more}
        if lane == "chunk":
            specs = [_chunk(s) if s.name == "prefill" else s for s in specs]
        if lane == "mobile":
            specs = [for_one(specs[-1] if profiles else specs[0])]
        if lane == "web":
            specs = [graph for spec in specs for graph in _for_pages(spec)]
        run = TorchRun(model, specs, metadata)
        with atomic_folder(folder) as temporary:
            made = _Made(temporary, name, metadata, shared=len(specs) > 1)
            for file, content in files.items():
                made.add_file(file, content)
            for spec in specs:
                made.add_graph(spec, "chunk" if spec.name == "chunk" else lane)
                # at once, so that what is wrong ends before the next graph is traced
                made.rows[spec.name] = compare(spec, run, made.runtime(), steps=steps)
                made.recorded |= reference.record(spec, run)
            for at_once in {"prefill", "chunk"} & made.graphs.keys():
                pair = (run.graphs["step"], run.graphs[at_once])
                made.rows[f"{at_once} = step"] = compare_handover(*pair, made.runtime())
            if lane == "mobile":
                for file, content in made.phones.items():
                    made.add_file(file, content)
            bounds = {s.name: s.tolerance for s in specs}
            made.add_file(reference.REFERENCE, reference.encode(made.recorded, bounds))
            reference.check(made.runtime())  # what `rwkv verify` will ask
            between = {name: HANDOVER for name in made.rows if name not in bounds}
            parity = {**certificate(), "bound": {**bounds, **between}}
            worst = max(max(r["errors"].values()) for rows in made.rows.values() for r in rows)
            parity |= {"worst": worst, "graphs": made.rows}
            (temporary / PARITY).write_text(json.dumps(parity, indent=2) + "\n")
            size = sum(f.stat().st_size for f in temporary.iterdir())
    finally:
        model.train(was_training)
    return Report(folder, worst, size, made.nodes, parity)


def _chunk(spec: ExportSpec) -> ExportSpec:
    """Return the graph over a sequence as one over exactly ``CHUNK`` tokens of one sequence."""
    return dataclasses.replace(fixed(spec, {"batch": 1, "time": CHUNK, "rows": 1}), name="chunk")


def _for_pages(spec: ExportSpec) -> list[ExportSpec]:
    """Return graphs of one size, which WebGPU runs whole, and beside them what reads any length."""
    return [spec, in_32_bits(_chunk(spec))] if spec.name == "prefill" else [for_one(spec)]


def certificate() -> dict[str, Any]:
    """Return what a parity report says about its making: versions, machine, measure."""
    packages = ("torch", "onnx", "onnxscript", "onnx-ir", "onnxruntime", "numpy")
    return {
        "reference": f"PyTorch {torch.__version__}",
        "runtime": f"onnxruntime {version('onnxruntime')}",
        "versions": {
            "rwkv-toolkit": __version__,
            "python": platform.python_version(),
            **{package: version(package) for package in packages},
        },
        "machine": f"{platform.system()} {platform.machine()}",
        "measure": "largest absolute difference / largest absolute output, or own value",
    }


class _Made:
    """A folder that is being filled: its graphs, its other files, and what was found about them."""

    def __init__(
        self, folder: Path, adapter: str, metadata: Mapping[str, Any], *, shared: bool
    ) -> None:
        self.folder, self.adapter, self.metadata = folder, adapter, metadata
        self.weights = WeightFile(folder / WEIGHTS) if shared else None
        self.graphs: dict[str, GraphInfo] = {}
        self.files: dict[str, str] = {}
        self.nodes: dict[str, int] = {}
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.recorded: dict[str, np.ndarray] = {}
        self.phones: dict[str, bytes] = {}

    def add_graph(self, spec: ExportSpec, lane: str) -> None:
        """Write a graph and describe it."""
        path = self.folder / f"{spec.name}.onnx"
        proto = write_onnx(spec, path, weights=self.weights, lane=lane)
        if lane == "mobile":
            path, self.phones = to_ort(path)
        self.nodes[spec.name] = sum(nodes_per_op(proto).values())
        starts = {}
        for name, array in spec.state.items():
            if array.size and (array != array.flat[0]).any():
                starts[name] = f"{name}.initial.bin"
                content = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"))
                self.add_file(starts[name], content.tobytes())
        self.graphs[spec.name] = _describe(spec, path, proto, starts)

    def add_file(self, name: str, content: bytes | None = None) -> None:
        """Note a file of the folder, after writing it if its content is given."""
        if content is not None:
            (self.folder / name).write_bytes(content)
        self.files[name] = sha256(self.folder / name)

    def runtime(self) -> Runtime:
        """Write the manifest of what there is so far and open it."""
        if (self.folder / WEIGHTS).exists():
            self.add_file(WEIGHTS)
        Manifest(
            adapter=self.adapter, graphs=self.graphs, metadata=self.metadata, files=self.files
        ).write(self.folder)
        return Runtime(self.folder)


def _describe(
    spec: ExportSpec, path: Path, proto: onnx.ModelProto, starts: Mapping[str, str]
) -> GraphInfo:
    def info(name: str, array: np.ndarray, initial: float | str | None = None) -> TensorInfo:
        free = spec.dynamic.get(name, {})
        shape = tuple(free.get(axis, size) for axis, size in enumerate(array.shape))
        return TensorInfo(name=name, dtype=array.dtype.name, shape=shape, initial=initial)

    (opset,) = (o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    assert opset == OPSET
    return GraphInfo(
        file=path.name,
        sha256=sha256(path),
        opset=opset,
        inputs=tuple(info(name, array) for name, array in spec.inputs.items()),
        outputs=spec.outputs,
        state=tuple(
            info(name, array, starts.get(name, float(array.flat[0]) if array.size else 0.0))
            for name, array in spec.state.items()
        ),
    )
