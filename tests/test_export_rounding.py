"""How weights and activations are rounded, on single matrices: no model, no torch."""

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from rwkv_export.quantize import clipped, quantized

K, N = 128, 64


def product(matrix_KN, rows):
    """Return a graph of one product; ``rows`` is the number of tokens, or a free dimension."""
    node = helper.make_node("MatMul", ["x", "weight"], ["y"])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, rows, K])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, rows, N])
    weight = numpy_helper.from_array(matrix_KN.astype(np.float32), "weight")
    graph = helper.make_graph([node], "g", [x], [y], [weight])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answers(model, x):
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]


@pytest.mark.parametrize("rows", [1, "time"])
def test_large_products_do_not_overflow(rows):
    # pairs of the largest products: signed weights overflow where a processor adds them in 16 bits
    matrix_KN = np.full((K, N), 3.0)
    x = np.full((1, 1 if rows == 1 else 5, K), 2.0, np.float32)
    found = answers(quantized(product(matrix_KN, rows), "int8-dynamic"), x)
    np.testing.assert_allclose(found, x @ matrix_KN, rtol=1e-2)


def test_a_token_is_rounded_whatever_its_neighbours_are():
    rng = np.random.default_rng(0)
    model = quantized(product(rng.normal(size=(K, N)), "time"), "int8-dynamic")
    x = rng.normal(size=(1, 7, K)).astype(np.float32)
    alone = answers(model, x[:, :1])
    x[:, 1:] *= 1000
    np.testing.assert_array_equal(answers(model, x)[:, :1], alone)
    x[:, 1] = 0  # nothing to scale by
    assert not answers(model, x)[:, 1].any()


@pytest.mark.parametrize("block", [16, 32])
def test_a_narrower_range_rounds_closer(block):
    rng = np.random.default_rng(0)
    matrix_KN = rng.standard_t(4, size=(block * 4 + 3, 10)).astype(np.float32)

    def error(matrix):
        """Of blocks along K in 16 values, from the first to the last of each."""
        padded = np.pad(matrix, ((0, -len(matrix) % block), (0, 0))).reshape(-1, block, 10)
        low, high = (f(padded, 1, keepdims=True, initial=0) for f in (np.min, np.max))
        step = (high - low) / 15
        zero = np.round(-low / step)
        rounded = (np.clip(np.round(padded / step) + zero, 0, 15) - zero) * step
        return np.square(rounded.reshape(-1, 10)[: len(matrix)] - matrix_KN).mean()

    narrow = clipped(matrix_KN, block)
    assert narrow.shape == matrix_KN.shape
    assert error(narrow) < 0.98 * error(matrix_KN)
    # no sign changes, nothing grows
    assert (np.abs(narrow) <= np.abs(matrix_KN)).all()
    assert (narrow * matrix_KN >= 0).all()
    assert not clipped(np.zeros((block, 10), np.float32), block).any()
