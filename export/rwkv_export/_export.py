"""From a model to a folder: write the graphs, prove them, and only then let the folder appear."""

import copy
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

from rwkv_core._files import atomic_folder
from rwkv_core.adapter import ExportSpec
from rwkv_core.checkpoint import adapter_of, portable
from rwkv_core.errors import ExportError
from rwkv_core.run import TorchRun
from rwkv_export.manifest import PARITY, GraphInfo, Manifest, TensorInfo, sha256
from rwkv_export.onnx import OPSET, nodes_per_op, write_onnx
from rwkv_export.runtime import Runtime
from rwkv_export.verify import compare

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


def export(model: nn.Module, folder: str | Path, *, steps: Sequence[int] = STEPS) -> Report:
    """Write ``model`` as ONNX graphs with manifest and parity report.

    Args:
        model: made by a registered domain.
        folder: where; must not exist. It appears only if every graph agrees with PyTorch.
        steps: after how many recurrent steps outputs and states are compared.

    Raises:
        ExportError: an operation without translation, a mixer that does not export, a disagreement
            above the bound, or a folder that exists.
        OSError: the folder cannot be written; nothing is left behind.
    """
    folder = Path(folder)
    if folder.exists():
        raise ExportError(f"{folder} exists already; remove it or choose another folder")
    name, adapter = adapter_of(model)
    for path, module in model.named_modules():
        if not getattr(module, "exportable", True):
            raise ExportError(f"{path} ({type(module).__name__}) does not export to ONNX")
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in model.parameters()):
        model = copy.deepcopy(model).cpu().float()
    was_training = model.training
    model.eval()
    try:
        specs = adapter.exports(model)
        metadata = adapter.metadata(model)
        with atomic_folder(folder) as temporary:
            graphs, nodes = {}, {}
            for spec in specs:
                path = temporary / f"{spec.name}.onnx"
                proto = write_onnx(spec, path)
                nodes[spec.name] = sum(nodes_per_op(proto).values())
                graphs[spec.name] = _describe(spec, path, proto)
            files = {}
            for file, content in portable(model)[1].items():
                (temporary / file).write_bytes(content)
                files[file] = sha256(temporary / file)
            Manifest(adapter=name, graphs=graphs, metadata=metadata, files=files).write(temporary)
            torch_run = TorchRun(model, specs, metadata)
            runtime = Runtime(temporary)
            rows = {s.name: compare(s, torch_run, runtime, steps=steps) for s in specs}
            worst = max(max(r["errors"].values()) for rs in rows.values() for r in rs)
            parity = {
                "reference": f"PyTorch {torch.__version__}",
                "runtime": f"onnxruntime {onnxruntime.__version__}",
                "onnx": onnx.__version__,
                "machine": platform.machine(),
                "measure": "largest absolute difference / largest absolute output, or own value",
                "bound": {s.name: s.tolerance for s in specs},
                "worst": worst,
                "graphs": rows,
            }
            (temporary / PARITY).write_text(json.dumps(parity, indent=2) + "\n")
            size = sum(f.stat().st_size for f in temporary.iterdir())
    finally:
        model.train(was_training)
    return Report(folder, worst, size, nodes, parity)


def _describe(spec: ExportSpec, path: Path, proto: onnx.ModelProto) -> GraphInfo:
    def info(name: str, array: np.ndarray, initial: float | None = None) -> TensorInfo:
        free = spec.dynamic.get(name, {})
        shape = tuple(free.get(axis, size) for axis, size in enumerate(array.shape))
        return TensorInfo(name=name, dtype=array.dtype.name, shape=shape, initial=initial)

    state = []
    for name, array in spec.state.items():
        if array.size and (array != array.flat[0]).any():
            raise ExportError(f"the initial state {name!r} is not one constant")
        state.append(info(name, array, float(array.flat[0])))
    (opset,) = (o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    assert opset == OPSET
    return GraphInfo(
        file=path.name,
        sha256=sha256(path),
        opset=opset,
        inputs=tuple(info(name, array) for name, array in spec.inputs.items()),
        outputs=spec.outputs,
        state=tuple(state),
    )
