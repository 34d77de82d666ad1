"""The recurrences as ONNX functions, in every lane, against the loops over time."""

import numpy as np
import onnx
import onnxruntime
import pytest
import rwkv_export
import torch
from onnx import helper
from rwkv_export.prefix_sums import without_cumsum
from rwkv_export.recurrences import CHUNK, DOMAIN, functions

from rwkv_core import checkpoint
from rwkv_core.errors import ExportError
from rwkv_core.ops.wkv4 import wkv4
from rwkv_core.ops.wkv6 import wkv6
from rwkv_core.ops.wkv7 import wkv7
from rwkv_core.testing import perturb
from rwkv_vision.config import ClassifyConfig

OPSET = 20
INPUTS = {"WKV4": "w u k v num den top", "WKV6": "r w k v u state", "WKV7": "r w k v a b state"}
STATES = {"WKV4": ["num", "den", "top"], "WKV6": ["state"], "WKV7": ["state"]}


def session(op, lane, heads, size):
    names = INPUTS[op].split()
    outputs = ["y", *(f"{name}_out" for name in STATES[op])]
    node = helper.make_node(op, names, outputs, domain=DOMAIN)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "graph",
        [value(name, onnx.TensorProto.FLOAT, None) for name in names],
        [value(name, onnx.TensorProto.FLOAT, None) for name in outputs],
    )
    bodies = functions(op, lane, heads=heads, size=size, opset=OPSET)
    imports = [helper.make_opsetid(d, v) for d, v in (("", OPSET), (DOMAIN, 1))]
    imports.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, functions=bodies, opset_imports=imports, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()), names, outputs


def example7(B, T, H, K, V, *, harsh=False):
    """Return inputs as the mixer makes them; ``harsh``: keys that repeat, rates at both ends."""
    rng = np.random.default_rng(T)
    r, k, kappa = (rng.normal(size=(B, T, H, K)) for _ in range(3))
    if harsh:
        kappa[:] = kappa[:, :1]
        kappa[..., 0] = 0
    kappa /= np.linalg.norm(kappa, axis=-1, keepdims=True)
    rate = 1 / (1 + np.exp(rng.normal(size=(B, T, H, K)) * (15 if harsh else 2)))
    w = -0.606531 / (1 + np.exp(rng.normal(size=(B, T, H, K)) * 3))
    v, state = rng.normal(size=(B, T, H, V)), rng.normal(size=(B, H, K, V))
    return [x.astype(np.float32) for x in (r, w, k, v, -kappa, kappa * rate, state)]


def example6(B, T, H, K, V, *, harsh=False):
    rng = np.random.default_rng(T)
    r, k = rng.normal(size=(2, B, T, H, K))
    w = -np.exp(rng.normal(size=(B, T, H, K)) * (6 if harsh else 2) - 1)
    v, state, u = (rng.normal(size=s) for s in ((B, T, H, V), (B, H, K, V), (H, K)))
    return [x.astype(np.float32) for x in (r, w, k, v, u, state)]


def example4(B, T, D):
    rng = np.random.default_rng(T)
    w, u = -np.exp(rng.normal(size=D)), rng.normal(size=D)
    k, v = rng.normal(size=(2, B, T, D)) * 4
    num, den, top = rng.normal(size=(B, D)), rng.uniform(1, 2, (B, D)), rng.normal(size=(B, D))
    top[:, 0], num[:, 0], den[:, 0] = -1e30, 0, 0
    return [x.astype(np.float32) for x in (w, u, k, v, num, den, top)]


def compare(run, arrays, expected, bound):
    session, names, outputs = run
    found = session.run(outputs, dict(zip(names, arrays, strict=True)))
    for x, y in zip(found, expected, strict=True):
        assert x.shape == tuple(y.shape)
        assert np.abs(x - y.numpy()).max() <= bound * max(1.0, y.abs().max().item())


@pytest.mark.parametrize("harsh", [False, True])
@pytest.mark.parametrize("lane", ["scan", "chunk", "linear_attention"])
def test_generation_7(lane, harsh):
    sizes = [(2, CHUNK)] if lane == "chunk" else [(2, 1), (1, 13), (2, 16), (2, 50), (1, 200)]
    K, V = (8, 8) if lane == "linear_attention" else (8, 6)
    run = session("WKV7", lane, 3, 8)
    for B, T in sizes:
        arrays = example7(B, T, 3, K, V, harsh=harsh)
        expected = wkv7(*(torch.from_numpy(x).double() for x in arrays), impl="reference")
        compare(run, arrays, expected, 5e-6)


@pytest.mark.parametrize("harsh", [False, True])
@pytest.mark.parametrize("lane", ["scan", "chunk", "linear_attention"])
def test_generations_5_and_6(lane, harsh):
    sizes = [(2, CHUNK)] if lane == "chunk" else [(2, 1), (1, 13), (2, 16), (2, 50), (1, 200)]
    K, V = (8, 8) if lane == "linear_attention" else (8, 6)
    run = session("WKV6", lane, 3, 8)
    for B, T in sizes:
        arrays = example6(B, T, 3, K, V, harsh=harsh)
        expected = wkv6(*(torch.from_numpy(x).double() for x in arrays), impl="reference")
        compare(run, arrays, expected, 5e-6)


def test_generation_4():
    run = session("WKV4", "scan", 1, 1)
    for B, T in ((1, 1), (2, 13), (1, 64)):
        arrays = example4(B, T, 10)
        tensors = [torch.from_numpy(x).double() for x in arrays]
        y, state = wkv4(*tensors[:4], tuple_state(tensors[4:]), impl="reference")
        session_, names, outputs = run
        found = session_.run(outputs, dict(zip(names, arrays, strict=True)))
        np.testing.assert_allclose(found[0], y, atol=1e-5)
        scale = np.exp(found[3] - state.max_BD.numpy())
        for x, expected in zip(found[1:3], state[:2], strict=True):
            np.testing.assert_allclose(x * scale, expected, rtol=1e-5, atol=1e-5)


def tuple_state(tensors):
    from rwkv_core.ops.wkv4 import WKV4State

    return WKV4State(*tensors)


def summing(axis, **attributes):
    """Return a graph of one CumSum over [B, T, 5]."""
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", "time", 5])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", "time", 5])
    double = helper.make_node("Add", ["x", "x"], ["z"])
    node = helper.make_node("CumSum", ["z", "axis"], ["y"], **attributes)
    axis = onnx.numpy_helper.from_array(np.array(axis), "axis")
    graph = helper.make_graph([double, node], "g", [x], [y], [axis])
    imports = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("axis", [1, -2])
@pytest.mark.parametrize(
    ("attributes", "sums"),
    [
        ({}, lambda x: x.cumsum(1)),
        ({"exclusive": 1}, lambda x: x.cumsum(1) - x),
        ({"reverse": 1}, lambda x: x[:, ::-1].cumsum(1)[:, ::-1]),
        ({"reverse": 1, "exclusive": 1}, lambda x: x[:, ::-1].cumsum(1)[:, ::-1] - x),
    ],
    ids=["plain", "exclusive", "reverse", "both"],
)
def test_prefix_sums_are_products_at_any_length(axis, attributes, sums):
    model = summing(axis, **attributes)
    without_cumsum(model)
    assert "CumSum" not in {node.op_type for node in model.graph.node}
    run = onnxruntime.InferenceSession(model.SerializeToString())
    for size in ((2, 1, 5), (1, 7, 5), (3, 64, 5)):
        x = np.random.default_rng(0).normal(size=size).astype(np.float32)
        np.testing.assert_allclose(run.run(None, {"x": x})[0], 2 * sums(x), atol=1e-5)


def test_sums_along_other_axes_are_refused():
    for axis in (0, 2):
        with pytest.raises(ExportError, match="cannot write the sums 'y' without CumSum"):
            without_cumsum(summing(axis))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mixer": "vrwkv_2d"}])
def test_pictures_of_any_size_without_cumsum(options, tmp_path):
    config = ClassifyConfig(
        model="test_vrwkv",
        model_options={"embed_dim": 32, "depth": 1, "patch_size": 4, **options},
        labels=("a", "b"),
        image_size=(12, 8),
        uint8_graph=True,
    )
    model = checkpoint.build("classify", config)
    perturb(model, 0.05)
    report = rwkv_export.export(model.eval(), tmp_path / "out", lane="triangle")
    assert report.worst <= 1e-5
    for name in ("image", "pixels"):  # three sizes that were not traced, batches of 1, 2 and 3
        rows = report.parity["graphs"][name]
        assert len({(row["height"], row["width"]) for row in rows}) >= 3
        assert {row["batch"] for row in rows} == {1, 2, 3}
        graph = onnx.load(tmp_path / "out" / f"{name}.onnx")
        assert "CumSum" not in {node.op_type for node in graph.graph.node}
