"""What is fused after tracing: fewer nodes, the same numbers; what only looks alike stays."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rwkv_export.fuse import END, fuse

X = np.random.default_rng(0).normal(size=(2, 7, 3)).astype(np.float32)
Node = tuple[str, tuple[Any, ...], dict[str, Any]]
FLIP = ([-1], [END], [1], [-1])


def model_of(*nodes: Node) -> onnx.ModelProto:
    """Return a chain of ``(op, constants, attributes)`` over x."""
    chain, constants = [], []
    for i, (op, given, attributes) in enumerate(nodes):
        names = [f"c{i}_{j}" for j in range(len(given))]
        arrays = [np.array(value) for value in given]
        constants += [numpy_helper.from_array(a, n) for a, n in zip(arrays, names, strict=True)]
        y = "y" if i + 1 == len(nodes) else f"y{i}"
        x = f"y{i - 1}" if i else "x"
        chain.append(helper.make_node(op, [x, *names], [y], **attributes))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(chain, "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": X})[0]


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    found = ir.from_proto(model)
    fuse(found)
    return ir.to_proto(found)


SUM: Node = ("CumSum", (1,), {})
BEFORE: Node = ("Pad", ([0, 1, 0, 0, -1, 0],), {})
AFTER: Node = ("Pad", ([0, -1, 0, 0, 1, 0],), {})
FUSED: dict[str, tuple[Node, ...]] = {
    "reverse": (("Slice", FLIP, {}), SUM, ("Slice", FLIP, {})),
    "exclusive": (SUM, BEFORE),
    "exclusive and reverse": (("Slice", FLIP, {}), SUM, ("Slice", FLIP, {}), AFTER),
    "literal shape": (("Reshape", ([2, 21],), {}), ("Reshape", ([3, -1],), {})),
    "two axes": (
        ("Slice", ([1], [5], [1], [2]), {}), ("Slice", ([0, 0], [1, 2], [0, 2], [1, 1]), {}),
    ),
    "square": (("Pow", (np.float32(2),), {}),),
    "one axis": (("Reshape", ([14, 1, 3],), {}), ("Squeeze", ([-2],), {}),
                 ("Unsqueeze", ([-2],), {})),
}  # fmt: skip
KEPT: dict[str, tuple[Node, ...]] = {
    "another axis": (("Slice", FLIP, {}), ("CumSum", (0,), {}), ("Slice", FLIP, {})),
    "reverse already": (
        ("Slice", FLIP, {}), ("CumSum", (1,), {"reverse": 1}), ("Slice", FLIP, {}),
    ),
    "moved the other way": (SUM, AFTER),
    "exclusive already": (("CumSum", (1,), {"exclusive": 1}), BEFORE),
    "moved along another axis": (SUM, ("Pad", ([1, 0, 0, -1, 0, 0],), {})),
    "not by zeros": (SUM, ("Pad", ([0, 1, 0, 0, -1, 0], np.float32(1)), {})),
    "the same axis again": (
        ("Slice", ([1], [5], [1], [1]), {}), ("Slice", ([1], [5], [1], [1]), {}),
    ),
    "perhaps the same axis": (
        ("Slice", ([1], [5], [1], [1]), {}), ("Slice", ([1], [5], [-2], [1]), {}),
    ),
    "cube": (("Pow", (np.float32(3),), {}),),
    "a size that is meant": (("Reshape", ([6, 7],), {}), ("Reshape", ([0, 7, 1],), {})),
    "another axis back": (
        ("Reshape", ([14, 1, 3],), {}), ("Squeeze", ([1],), {}), ("Unsqueeze", ([0],), {}),
    ),
}  # fmt: skip


@pytest.mark.parametrize("nodes", FUSED.values(), ids=FUSED)
def test_one_node_takes_the_place_of_several(nodes: tuple[Node, ...]) -> None:
    model = model_of(*nodes)
    after = fused(model)
    assert len(after.graph.node) == 1
    assert "Pow" not in after.graph.node[0].op_type
    np.testing.assert_allclose(run(after), run(model), rtol=0, atol=2e-6)


@pytest.mark.parametrize("nodes", KEPT.values(), ids=KEPT)
def test_what_means_something_else_stays(nodes: tuple[Node, ...]) -> None:
    model = model_of(*nodes)
    after = fused(model)
    assert [n.op_type for n in after.graph.node] == [n.op_type for n in model.graph.node]
    np.testing.assert_array_equal(run(after), run(model))


@pytest.mark.parametrize("backwards", [False, True])
def test_loops_read_as_it_lies(backwards: bool) -> None:
    """Over the second axis: state += x forwards or backwards, y = state + x the other way."""
    rows = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "sabtz"]
    adds = [helper.make_node("Add", ["s", "a"], ["t"]), helper.make_node("Add", ["t", "b"], ["z"])]
    body = helper.make_graph(adds, "body", rows[:3], rows[3:])
    flip = ["begin", "end", "axis", "by"]
    forth = helper.make_node("Transpose", ["x"], ["forth"], perm=[1, 0, 2])
    flipped = helper.make_node("Slice", ["x", *flip], ["flipped"])
    back = helper.make_node("Transpose", ["flipped"], ["back"], perm=[1, 0, 2])
    first, second = ("back", "forth") if backwards else ("forth", "back")
    scan = helper.make_node(
        "Scan", ["start", first, second], ["last", "out"], body=body, num_scan_inputs=2
    )
    nodes = [forth, flipped, back, scan]
    if backwards:
        nodes.append(helper.make_node("Transpose", ["out"], ["swapped"], perm=[1, 0, 2]))
        nodes.append(helper.make_node("Slice", ["swapped", *flip], ["turned"]))
    else:
        nodes.append(helper.make_node("Transpose", ["out"], ["turned"], perm=[1, 0, 2]))
    nodes.append(helper.make_node("Neg", ["turned"], ["y"]))
    model = model_of(("Neg", (), {}))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for name, value in zip(flip, FLIP, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    start = np.zeros((2, 3), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(start, "start"))

    after = fused(model)
    assert [n.op_type for n in after.graph.node] == ["Scan", "Neg"]
    attributes = after.graph.node[0].attribute
    said = {a.name: list(a.ints) for a in attributes if a.name.startswith("scan")}
    assert said == {
        "scan_input_axes": [1, 1],
        "scan_output_axes": [1],
        "scan_input_directions": [1, 0] if backwards else [0, 1],
        "scan_output_directions": [int(backwards)],
    }
    np.testing.assert_array_equal(run(after), run(model))


def test_loops_over_other_axes_stay() -> None:
    rows = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 7]) for n in "satz"]
    nodes = [helper.make_node("Add", ["s", "a"], ["t"]), helper.make_node("Neg", ["t"], ["z"])]
    body = helper.make_graph(nodes, "body", rows[:2], rows[2:])
    model = model_of(("Transpose", (), {"perm": [2, 0, 1]}), ("Neg", (), {}))
    model.graph.node.pop()
    scan = helper.make_node("Scan", ["start", "y0"], ["last", "y"], body=body, num_scan_inputs=1)
    model.graph.node.append(scan)
    start = np.zeros((2, 7), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(start, "start"))
    after = fused(model)
    assert [n.op_type for n in after.graph.node] == ["Transpose", "Scan"]
    np.testing.assert_array_equal(run(after), run(model))
