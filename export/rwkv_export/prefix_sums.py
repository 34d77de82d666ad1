"""Prefix sums as products, for runtimes that have no ``CumSum``: y = L x, L a triangle of ones.

The graph makes L [T, T] of the length that it meets, once for all sums over it. A product of T² · X
multiplications takes the place of T · X additions: of 196 tokens little, of 4,096 most of the time
and 64 MB.
"""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rwkv_core.errors import ExportError

__all__ = ["without_cumsum"]

# which tokens (in the row) another (in the column) sums: by exclusive, reverse
SUMMED = {
    (0, 0): "GreaterOrEqual",
    (1, 0): "Greater",
    (0, 1): "LessOrEqual",
    (1, 1): "Less",
}


def without_cumsum(model: onnx.ModelProto) -> None:
    """Replace every ``CumSum`` along the last axis but one, in place.

    Raises:
        ExportError: a sum along another axis.
    """
    graph = model.graph
    shapes = {v.name: v.type.tensor_type.shape.dim for v in graph.value_info}
    constants = {t.name: t for t in graph.initializer}
    triangles: dict[tuple[str, int, int], str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "CumSum":
            nodes.append(node)
            continue
        x, axis = node.input
        rank = len(shapes.get(x, ()))
        known = axis in constants and int(numpy_helper.to_array(constants[axis]))
        if not rank or known not in (-2, rank - 2):
            raise ExportError(f"cannot write the sums {node.output[0]!r} without CumSum")
        name = node.output[0]
        given = {a.name: a.i for a in node.attribute}
        kind = (given.get("exclusive", 0), given.get("reverse", 0))
        length = shapes[x][rank - 2]
        key = (length.dim_param or str(length.dim_value or name), *kind)
        if key not in triangles:
            triangles[key] = f"{name}.L"
            nodes += [
                helper.make_node("Shape", [x], [f"{name}.length"], start=rank - 2, end=rank - 1),
                helper.make_node("Squeeze", [f"{name}.length"], [f"{name}.T"]),
                helper.make_node("Range", ["sums.0", f"{name}.T", "sums.1"], [f"{name}.row"]),
                helper.make_node("Unsqueeze", [f"{name}.row", "sums.last"], [f"{name}.column"]),
                helper.make_node(
                    SUMMED[kind], [f"{name}.column", f"{name}.row"], [f"{name}.summed"]
                ),
                helper.make_node("Cast", [f"{name}.summed"], [f"{name}.L"], to=TensorProto.FLOAT),
            ]
        nodes.append(helper.make_node("MatMul", [triangles[key], x], [name]))
    if not triangles:
        return
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for constant, array in (("0", np.array(0)), ("1", np.array(1)), ("last", np.array([-1]))):
        graph.initializer.append(numpy_helper.from_array(array, f"sums.{constant}"))
