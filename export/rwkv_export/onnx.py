"""One torch graph to one ONNX file: exported, stripped of the machine it was made on, checked."""

import hashlib
import io
import logging
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn

from rwkv_core.adapter import ExportSpec
from rwkv_core.errors import ExportError
from rwkv_export.clean import strip
from rwkv_export.fuse import fuse
from rwkv_export.manifest import present
from rwkv_export.prefix_sums import without_cumsum
from rwkv_export.recurrences import functions
from rwkv_export.traced import as_nodes
from rwkv_export.weights import WEIGHTS, WeightFile

__all__ = ["OPSET", "nodes_per_op", "write_onnx"]

OPSET = 20  # loads in every onnxruntime since 1.18
EXTERNAL_DATA_FROM = 1 << 30  # bytes; protobuf ends at 2 GiB


def write_onnx(
    spec: ExportSpec, path: Path, *, weights: WeightFile | None = None, lane: str = "scan"
) -> onnx.ModelProto:
    """Trace ``spec.module`` and write it to ``path``; return the model without external data.

    State comes in under its name and goes out (``manifest.present``) after every other output: the
    last nodes of the graph write it, so a host may bind both to one buffer.

    Args:
        spec: the graph.
        path: the file.
        weights: takes the weights; None leaves them in the graph's file as long as they fit.
        lane: what the recurrences of a sequence are made of, as in ``recurrences.py``.

    Raises:
        ExportError: an operation without translation, or a dimension that was promised free and
            came out fixed.
    """
    program, traced = _trace(spec)
    model = program.model
    fuse(model)
    _name_weights(model, spec.module)
    n_bytes = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    if weights is None and n_bytes >= EXTERNAL_DATA_FROM:
        weights = WeightFile(path.with_name(WEIGHTS))
    if weights is not None:
        weights.take(model)
    proto = ir.to_proto(model)
    if lane == "triangle":
        without_cumsum(proto)
    for op, (heads, size) in traced.items():
        proto.functions.extend(functions(op, lane, heads=heads, size=size, opset=OPSET))
    for domain in sorted({f.domain for f in proto.functions}):
        if domain not in {o.domain for o in proto.opset_import}:
            proto.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    strip(proto)
    _check_dynamic(proto, spec)
    onnx.save(proto, path)
    onnx.checker.check_model(path)
    return proto


def _trace(spec: ExportSpec) -> tuple[torch.onnx.ONNXProgram, dict[str, tuple[int, int]]]:
    """Return the traced program and what recurrences are nodes of it."""
    inputs = {**spec.inputs, **spec.state}
    tensors = tuple(
        torch.from_numpy(_not_one(array, spec.dynamic.get(name, {})))
        for name, array in inputs.items()
    )
    outputs = [*spec.outputs, *map(present, spec.state)]
    dims: dict[str, torch.export.Dim] = {}
    shapes = tuple(
        {
            axis: dims.setdefault(dim, torch.export.Dim(dim, min=1))
            for axis, dim in spec.dynamic.get(name, {}).items()
        }
        for name in inputs
    )
    # an earlier export with fixed sizes would bake them in
    torch._dynamo.reset()
    module = _Positional(spec.module).eval()
    # the exporter prints its progress and warns about its own internals
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(io.StringIO()),
            torch.no_grad(),
            as_nodes(spec.module) as traced,
        ):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tensors,
                input_names=list(inputs),
                output_names=outputs,
                opset_version=OPSET,
                dynamic_shapes=(shapes,),
                dynamo=True,
            )
    except Exception as error:
        raise ExportError(
            f"graph {spec.name!r} cannot be written as ONNX: {_first_line(error)}"
        ) from error
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    return program, traced


def _name_weights(model: ir.Model, module: nn.Module) -> None:
    """Give the weights the names that the module has for them.

    The exporter transposes the weights of linear maps into constants of its own.
    """
    transposed = {
        hashlib.sha256(p.detach().mT.contiguous().numpy().tobytes()).digest(): name
        for name, p in module.named_parameters()
        if p.ndim == 2 and p.is_cpu
    }
    taken = set(model.graph.initializers)
    for value in list(model.graph.initializers.values()):
        tensor, name = value.const_value, str(value.name)
        if tensor is None or len(tensor.shape) != 2:
            continue
        if not name.startswith("module."):
            name = transposed.get(hashlib.sha256(tensor.numpy().tobytes()).digest(), name)
        name = name.removeprefix("module.")
        if name != value.name and name not in taken:
            taken.add(name)
            model.graph.initializers.pop(str(value.name))
            value.name = name
            tensor.name = name
            model.graph.register_initializer(value)


def _not_one(array: np.ndarray, axes: Iterable[int]) -> np.ndarray:
    """Return an example without free axes of size 1, which tracing would take for fixed."""
    for axis in axes:
        if array.shape[axis] == 1:
            array = array.repeat(2, axis)
    return array


def nodes_per_op(model: onnx.ModelProto) -> dict[str, int]:
    """Return how often each operator occurs, the most frequent first."""
    counts: dict[str, int] = {}
    for node in model.graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


class _Positional(torch.nn.Module):
    """A module with one variadic argument, whatever the wrapped one declares."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.module(*inputs)
        return out if isinstance(out, tuple) else (out,)


def _check_dynamic(model: onnx.ModelProto, spec: ExportSpec) -> None:
    for value in model.graph.input:
        for axis, dim in spec.dynamic.get(value.name, {}).items():
            if not value.type.tensor_type.shape.dim[axis].dim_param:
                raise ExportError(
                    f"graph {spec.name!r}: axis {axis} ({dim}) of {value.name!r} was promised free "
                    "but came out fixed"
                )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    cause = error.__cause__ or error
    return f"{type(cause).__name__}: {(str(cause).strip() or text).splitlines()[0]}"
