"""Rounding in blocks: what is stored multiplies as it should, and moments make products closer."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rwkv_export.moments import _Listener
from rwkv_export.quantize import quantized
from rwkv_export.rounding import BLOCK, Rounder, in_blocks

SHAPES = [(64, 64), (96, 130), (100, 65), (67, 71)]  # K, N; whole blocks and pieces of one


@pytest.fixture
def matrix():
    return lambda K, N: np.random.default_rng(0).normal(size=(K, N)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_weight_by_itself_goes_to_the_nearest_level(matrix, shape, bits):
    weights = matrix(*shape)
    made = in_blocks(weights, bits)
    assert made.step_nN.shape == made.zero_nN.shape == (-(-shape[0] // BLOCK), shape[1])
    step = np.repeat(made.step_nN, BLOCK, 0)[: shape[0]]
    inside = (made.levels_KN > 0) & (made.levels_KN < 2**bits - 1)
    error = np.abs(made.matrix_KN - weights)
    assert (error <= 0.5001 * step)[inside].all()
    assert made.levels_KN.max() == 2**bits - 1
    assert error.mean() <= {4: 0.09, 8: 0.005}[bits]
    # what is 0 stays 0, alone and in a matrix of zeros
    weights[::3] = 0
    assert not in_blocks(weights, bits).matrix_KN[::3].any()
    assert not in_blocks(0 * weights, bits).matrix_KN.any()


def test_moments_make_products_closer_and_none_of_their_own_changes_nothing(matrix):
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(12, 96))
    seen, fresh = (
        rng.normal(size=(500, 12)) @ mixing + rng.normal(size=(500, 96)) / 4 for _ in "ab"
    )
    weights = matrix(96, 70)
    alone = in_blocks(weights, 4)
    together = in_blocks(weights, 4, seen.T @ seen)
    for inputs, share in ((seen, 0.2), (fresh, 0.25)):
        error, less = (
            np.square(inputs @ (m.matrix_KN - weights)).mean() for m in (alone, together)
        )
        assert less < share * error
    same = in_blocks(weights, 4, np.eye(96))
    assert np.array_equal(same.levels_KN, alone.levels_KN)
    assert np.array_equal(in_blocks(weights, 4, np.zeros((96, 96))).levels_KN, alone.levels_KN)


def graph(weights, kind):
    """Return a graph of one product, or one table's rows, and its weight's values."""
    if kind == "MatMul":
        node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", weights.shape[0]])
    else:
        node = helper.make_node("Gather", ["w", "x"], ["y"], name="rows", axis=0)
        x = helper.make_tensor_value_info("x", TensorProto.INT64, ["rows"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", weights.shape[1]])
    made = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weights, "w")])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model, x):
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8), ("int4", 4)])
def test_a_product_is_with_the_rounded_matrix(matrix, shape, scheme, bits):
    weights = matrix(*shape)
    moments = {"w": np.diag(np.arange(1.0, shape[0] + 1)) + 1} if bits == 4 else {}
    model = quantized(graph(weights, "MatMul"), scheme, rounder=Rounder(moments))
    (node,) = model.graph.node
    assert node.op_type == "MatMulNBits"
    for attribute in node.attribute:
        if attribute.name == "accuracy_level":
            attribute.i = 0  # activations whole, so that what is left is exact
    x = np.random.default_rng(2).normal(size=(3, shape[0])).astype(np.float32)
    expected = x @ in_blocks(weights, bits, moments.get("w")).matrix_KN
    np.testing.assert_allclose(run(model, x), expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_table_are_those_of_the_rounded_table(matrix, shape):
    weights = matrix(*shape)
    model = quantized(graph(weights, "Gather"), "int4")
    assert [n.op_type for n in model.graph.node] == ["GatherBlockQuantized"]
    at = np.array([0, shape[0] - 1, 5, 5])
    expected = in_blocks(np.ascontiguousarray(weights.T), 4).matrix_KN.T[at]
    np.testing.assert_allclose(run(model, at), expected, atol=1e-6)


def test_what_a_product_reads_is_summed(matrix, tmp_path):
    onnx.save(graph(matrix(64, 70), "MatMul"), tmp_path / "graph.onnx")
    listener = _Listener(tmp_path / "graph.onnx")
    parts = np.split(np.random.default_rng(3).normal(size=(30, 64)).astype(np.float32), [7, 8])
    for part in parts:
        listener({"x": part})
    rows = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(listener.sums["x"], rows.T @ rows, rtol=1e-12)
