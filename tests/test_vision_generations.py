"""Every family of image models once more in float64 NumPy, loops over pixels and heads included."""

import numpy as np
import pytest
import timm
import torch

from rwkv_core.testing import perturb, relative_error
from rwkv_vision.mixers6 import SpatialMix6
from rwkv_vision.mixers7 import SpatialMix7

HEAD, EPS = 16, 1e-5


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normed(x, p, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def head_normed(y, p):
    """Normalise [T, H, N] per head."""
    y = y - y.mean(-1, keepdims=True)
    y = (y / np.sqrt((y**2).mean(-1, keepdims=True) + EPS)).reshape(len(y), -1)
    return y * p["ln_x.weight"] + p["ln_x.bias"]


def shifted(x, grid, head):
    """Return the four neighbours' quarters of every head, pixel by pixel."""
    rows, columns = grid
    x = x.reshape(rows, columns, -1)
    out = np.zeros_like(x)
    for i, j, c in np.ndindex(x.shape):
        dy, dx = ((0, -1), (0, 1), (-1, 0), (1, 0))[c % head // (head // 4)]
        if 0 <= i + dy < rows and 0 <= j + dx < columns:
            out[i, j, c] = x[i + dy, j + dx, c]
    return out.reshape(rows * columns, -1)


def spatial_mix_4(x, p, grid, layer, shared):
    s = shifted(x, grid, x.shape[-1])
    r, k, v = (
        (x * p[f"spatial_mix_{n[0]}"][0] + s * (1 - p[f"spatial_mix_{n[0]}"][0]))
        @ p[f"{n}.weight"].T
        for n in ("receptance", "key", "value")
    )
    T, y = len(x), np.empty_like(v)
    for t in range(T):
        apart = np.abs(np.arange(T) - t)[:, None]
        score = np.where(apart == 0, p["spatial_first"], -(apart - 1) * p["spatial_decay"]) / T
        weight = np.exp(score + k)
        y[t] = (weight * v).sum(0) / weight.sum(0)
    y = normed(y, p, "key_norm") if "key_norm.weight" in p else y
    return (sigmoid(r) * y) @ p["output.weight"].T


def spatial_mix_6(x, p, grid, layer, shared):
    d = shifted(x, grid, HEAD) - x
    h = np.tanh((x + d * p["time_maa_x"]) @ p["time_maa_w1"]).reshape(len(x), 5, -1)
    mixed = {
        n: x + d * (p[f"time_maa_{n}"] + h[:, i] @ p["time_maa_w2"][i])
        for i, n in enumerate("wkvrg")
    }
    r, k, v = (
        (mixed[n[0]] @ p[f"{n}.weight"].T).reshape(len(x), -1, HEAD)
        for n in ("receptance", "key", "value")
    )
    g = mixed["g"] @ p["gate.weight"].T
    raw = p["time_decay"] + np.tanh(mixed["w"] @ p["time_decay_w1"]) @ p["time_decay_w2"]
    w = -np.exp(raw).reshape(k.shape)
    y = np.zeros_like(v)
    for t, i in np.ndindex(len(x), len(x)):
        between = np.exp(w[min(i, t) + 1 : max(i, t)].sum(0))
        weight = p["time_faaaa"] if i == t else between
        y[t] += (r[t] * weight * k[i]).sum(-1, keepdims=True) * v[i]
    if "key_norm.weight" in p:
        y = normed(y.reshape(len(x), -1), p, "key_norm").reshape(y.shape)
    return (head_normed(y, p) * g * sigmoid(g)) @ p["output.weight"].T


def spatial_mix_7(x, p, grid, layer, shared):
    T = len(x)
    d = shifted(x, grid, HEAD) - x
    m = {n: x + d * p[f"x_{n}"] for n in "rwkvag"}
    r, k, v = (m[n[0]] @ p[f"{n}.weight"].T for n in ("receptance", "key", "value"))
    w = np.exp(-np.exp(-0.5) * sigmoid(p["w0"] + np.tanh(m["w"] @ p["w1"]) @ p["w2"]))
    alpha = sigmoid(p["a0"] + m["a"] @ p["a1"] @ p["a2"])
    g = sigmoid(m["g"] @ p["g1"]) @ p["g2"]
    if layer == 0:
        shared["v"] = v
    else:
        v = v + (shared["v"] - v) * sigmoid(p["v0"] + m["v"] @ p["v1"] @ p["v2"])
    kappa = (k * p["k_k"]).reshape(T, -1, HEAD)
    kappa = kappa / np.linalg.norm(kappa, axis=-1, keepdims=True)
    k = k * (1 + (alpha - 1) * p["k_a"])
    r, w, k, v, alpha = (z.reshape(T, -1, HEAD) for z in (r, w, k, v, alpha))
    y = np.empty_like(v)
    for h in range(v.shape[1]):
        S = np.zeros((HEAD, HEAD))
        for t in range(T) if layer % 2 == 0 else reversed(range(T)):
            removed = -kappa[t, h] @ S
            S = w[t, h][:, None] * S + np.outer(kappa[t, h] * alpha[t, h], removed)
            S = S + np.outer(k[t, h], v[t, h])
            y[t, h] = r[t, h] @ S
    bonus = (r * k * p["r_k"]).sum(-1, keepdims=True) * v
    return ((head_normed(y, p) + bonus.reshape(T, -1)) * g) @ p["output.weight"].T


def channel_mix(x, p, grid, head):
    s = shifted(x, grid, head)
    x_k, x_r = (x * p[f"spatial_mix_{n}"][0] + s * (1 - p[f"spatial_mix_{n}"][0]) for n in "kr")
    k = np.maximum(x_k @ p["key.weight"].T, 0) ** 2
    k = normed(k, p, "key_norm") if "key_norm.weight" in p else k
    return sigmoid(x_r @ p["receptance.weight"].T) * (k @ p["value.weight"].T)


def channel_mix_7(x, p, grid, head):
    x_k = x + (shifted(x, grid, HEAD) - x) * p["x_k"]
    return np.maximum(x_k @ p["key.weight"].T, 0) ** 2 @ p["value.weight"].T


FAMILIES = {
    "test_vrwkv": (spatial_mix_4, channel_mix, 32),
    "test_vrwkv_large": (spatial_mix_4, channel_mix, 32),
    "test_vrwkv6": (spatial_mix_6, channel_mix, HEAD),
    "test_vrwkv7": (spatial_mix_7, channel_mix_7, HEAD),
}


def own(p, prefix):
    return {n.removeprefix(prefix): t for n, t in p.items() if n.startswith(prefix)}


@pytest.mark.parametrize("post_norm", [False, True], ids=["pre-norm", "post-norm"])
@pytest.mark.parametrize("name", FAMILIES)
def test_network_equals_an_independent_one(name, post_norm):
    att, ffn, head = FAMILIES[name]
    options = {"post_norm": post_norm, "init_values": 0.7} if post_norm else {}
    if name == "test_vrwkv6":
        options["key_norm"] = post_norm
    grid = (2, 3)
    net = timm.create_model(
        name, img_size=(8, 12), patch_size=4, num_classes=3, depth=2, **options
    ).double()
    perturb(net, 0.2)
    post_norm = post_norm or name == "test_vrwkv_large"
    p = {n: t.detach().numpy() for n, t in net.eval().state_dict().items()}
    image = torch.randn(1, 3, 8, 12, dtype=torch.float64)

    patches = image.unfold(2, 4, 4).unfold(3, 4, 4).numpy()
    x = np.einsum("bchwij,ocij->bhwo", patches, p["patch_embed.proj.weight"]).reshape(6, -1)
    x = x + p["patch_embed.proj.bias"] + p["pos_embed"][0]
    shared = {}
    for i in range(2):
        q = own(p, f"blocks.{i}.")
        x = normed(x, q, "ln0") if i == 0 else x
        for n, mix in ((1, att), (2, ffn)):
            mixer = own(q, "att." if n == 1 else "ffn.")
            rest = (i, shared) if n == 1 else (head,)
            z = mix(x if post_norm else normed(x, q, f"ln{n}"), mixer, grid, *rest)
            z = normed(z, q, f"ln{n}") if post_norm else z
            x = x + z * q.get(f"gamma{n}", 1.0)
    features = normed(x, p, "norm")
    pooled = features.mean(0)
    if name == "test_vrwkv_large":
        pooled = np.tanh(pooled @ p["head.pre_logits.fc.weight"].T + p["head.pre_logits.fc.bias"])
    logits = pooled @ p["head.fc.weight"].T + p["head.fc.bias"]

    ours = net.forward_features(image).reshape(6, -1)
    assert relative_error(ours, torch.from_numpy(features)) <= 1e-11
    assert relative_error(net(image)[0], torch.from_numpy(logits)) <= 1e-11


def test_init_of_generation_6_follows_its_table():
    C, layer, depth = 32, 1, 4
    mixer = SpatialMix6(C, head_dim=16, layer=layer, depth=depth, weight_std=0.02)
    j = torch.arange(C)
    s, a = (j / C) ** 0.75, 1 / 3
    for name in "xwk":
        torch.testing.assert_close(getattr(mixer, f"time_maa_{name}").data, 1 - s)
    torch.testing.assert_close(mixer.time_maa_v.data, 1 - (s + 0.3 * a))
    for name in "rg":
        torch.testing.assert_close(getattr(mixer, f"time_maa_{name}").data, 1 - s**0.5)
    decay = -6 + 5 * (j / (C - 1)) ** (0.7 + 1.3 * a)
    torch.testing.assert_close(mixer.time_decay.data, decay)
    bonus = a * (1 - j / (C - 1)) + 0.1 * ((j + 1) % 3 - 1)
    torch.testing.assert_close(mixer.time_faaaa.data.flatten(), bonus)
    for name in ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2"):
        values = getattr(mixer, name)
        assert 0.5e-4 < values.abs().max() <= 1e-4
    assert mixer.output.weight.std().item() == pytest.approx(0.88 * 0.02, rel=0.1)
    assert mixer.time_maa_w1.shape == (C, 5 * 32)
    assert mixer.time_decay_w1.shape == (C, 64)
    assert mixer.ln_x.eps == 1e-5
    assert all(p.isfinite().all() for p in SpatialMix6(16, head_dim=16, depth=1).parameters())


@pytest.mark.parametrize("mixer", [SpatialMix6, SpatialMix7])
def test_there_is_no_step_and_no_state(mixer):
    layer = mixer(32, head_dim=16)
    assert not layer.causal
    for call in (lambda: layer.init_state(1), lambda: layer.step(torch.zeros(1, 1, 32), (), None)):
        with pytest.raises(NotImplementedError):
            call()
