"""The recurrences as ONNX functions, in every lane, against the loops over time."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from rwkv_export.recurrences import CHUNK, DOMAIN, functions

from rwkv_core.ops.wkv4 import wkv4
from rwkv_core.ops.wkv6 import wkv6
from rwkv_core.ops.wkv7 import wkv7

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
