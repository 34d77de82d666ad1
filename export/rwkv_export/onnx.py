"""One torch graph to one ONNX file: exported, stripped of the machine it was made on, checked."""

import io
import logging
import warnings
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import onnx
import torch

from rwkv_core.adapter import ExportSpec
from rwkv_core.errors import ExportError

__all__ = ["nodes_per_op", "write_onnx"]

OPSET = 20  # loads in every onnxruntime since 1.18
EXTERNAL_DATA_FROM = 1 << 30  # bytes; protobuf ends at 2 GiB


def write_onnx(spec: ExportSpec, path: Path) -> onnx.ModelProto:
    """Trace ``spec.module`` and write it to ``path``; return the model without external data.

    State comes in under its name and goes out as ``<name>_out``, after every other output: the last
    nodes of the graph write it, so a host may bind both to one buffer.

    Raises:
        ExportError: an operation without translation, or a dimension that was promised free and
            came out fixed.
    """
    inputs = {**spec.inputs, **spec.state}
    tensors = tuple(
        torch.from_numpy(_not_one(array, spec.dynamic.get(name, {})))
        for name, array in inputs.items()
    )
    outputs = [*spec.outputs, *(f"{name}_out" for name in spec.state)]
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
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), torch.no_grad():
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
    model = program.model_proto
    _strip(model)
    _check_dynamic(model, spec)
    size = model.ByteSize()
    options = {}
    if size >= EXTERNAL_DATA_FROM:
        options = {"save_as_external_data": True, "location": f"{path.name}.data"}
    onnx.save(model, path, **options)  # type: ignore[arg-type]
    onnx.checker.check_model(path)
    return model


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


def _strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes of this machine: source paths, code lines, its own names."""
    model.producer_name, model.producer_version = "rwkv-toolkit", ""
    model.doc_string = ""
    del model.metadata_props[:]
    model.graph.name = "graph"
    _strip_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        _strip_nodes(function.node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in [*graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:  # the body of a Scan, the branches of an If
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
            for graph in attribute.graphs:
                _strip_graph(graph)


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
