"""The RWKV-7 mixers: against an independent NumPy model, the official recipe, the contract."""

import math

import numpy as np
import pytest
import torch

import rwkv_text
from rwkv_core.backbone import Backbone
from rwkv_core.errors import ConfigError, UnknownNameError
from rwkv_core.mixers.base import lora_rank
from rwkv_core.mixers.rwkv7 import ChannelMix7, TimeMix7
from rwkv_core.registry import MIXERS
from rwkv_core.testing import check_mixer, perturb
from rwkv_core.train.optim import param_groups
from rwkv_text import CausalLM, TextConfig

DIM, DEPTH, HEAD = 48, 3, 16


@pytest.mark.parametrize("name", list(MIXERS))
def test_mixer_keeps_the_contract(name):
    check_mixer(name)


def small_model() -> CausalLM:
    config = TextConfig(dim=DIM, depth=DEPTH, vocab_size=20, mixer_options={"head_dim": HEAD})
    model = CausalLM(config).eval()
    perturb(model, 0.2)
    return model


def numpy_forward(p: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """Return logits [T, V], token by token in fp64, written from the paper's formulas alone."""

    def norm(x, weight, bias, eps):
        return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    H = DIM // HEAD
    S = np.zeros((DEPTH, H, HEAD, HEAD))  # V×K, as in the paper
    att_last, ffn_last = np.zeros((DEPTH, DIM)), np.zeros((DEPTH, DIM))
    logits = []
    for token in tokens:
        x = p["emb.weight"][token]
        x = norm(x, p["backbone.ln_in.weight"], p["backbone.ln_in.bias"], 1e-5)
        for i in range(DEPTH):

            def q(name, i=i):
                return p[f"backbone.blocks.{i}.{name}"]

            def t(name, i=i):
                return q(f"time_mix.{name}", i)

            h = norm(x, q("ln1.weight"), q("ln1.bias"), 1e-5)
            shifted = {c: h + (att_last[i] - h) * t(f"x_{c}") for c in "rwkvag"}
            att_last[i] = h
            r, k, v = (
                t(f"{name}.weight") @ shifted[name[0]] for name in ("receptance", "key", "value")
            )
            decay = np.exp(
                -np.exp(
                    -np.logaddexp(0, -(t("w0") + np.tanh(shifted["w"] @ t("w1")) @ t("w2"))) - 0.5
                )
            )
            if i == 0:
                v_first = v
            else:
                v = v + (v_first - v) * sigmoid(t("v0") + shifted["v"] @ t("v1") @ t("v2"))
            a = sigmoid(t("a0") + shifted["a"] @ t("a1") @ t("a2"))
            g = sigmoid(shifted["g"] @ t("g1")) @ t("g2")
            kappa = (k * t("k_k")).reshape(H, HEAD)
            kappa = kappa / np.maximum(np.linalg.norm(kappa, axis=1, keepdims=True), 1e-12)
            k = k * (1 + (a - 1) * t("k_a"))
            r, k, v, a, decay = (z.reshape(H, HEAD) for z in (r, k, v, a, decay))
            out = np.empty((H, HEAD))
            for n in range(H):
                removed = S[i, n] @ -kappa[n]
                S[i, n] = (
                    S[i, n] * decay[n] + np.outer(removed, kappa[n] * a[n]) + np.outer(v[n], k[n])
                )
                rows = slice(n * HEAD, (n + 1) * HEAD)
                out[n] = (
                    norm(S[i, n] @ r[n], t("ln_x.weight")[rows], t("ln_x.bias")[rows], 64e-5)
                    + (r[n] * k[n] * t("r_k")[n]).sum() * v[n]
                )
            x = x + t("output.weight") @ (out.ravel() * g)
            h = norm(x, q("ln2.weight"), q("ln2.bias"), 1e-5)
            key = q("channel_mix.key.weight") @ (h + (ffn_last[i] - h) * q("channel_mix.x_k"))
            ffn_last[i] = h
            x = x + q("channel_mix.value.weight") @ np.maximum(key, 0) ** 2
        x = norm(x, p["backbone.ln_out.weight"], p["backbone.ln_out.bias"], 1e-5)
        logits.append(p["head.weight"] @ x)
    return np.array(logits)


def test_model_matches_an_independent_numpy_forward():
    model = small_model()
    tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
    weights = {n: t.detach().double().numpy() for n, t in model.state_dict().items()}
    expected = numpy_forward(weights, tokens)
    with torch.no_grad():
        actual = model(torch.tensor([tokens])).logits_BTV[0].numpy()
        exact = model.double()(torch.tensor([tokens])).logits_BTV[0].numpy()
    scale = np.abs(expected).max()
    assert np.abs(exact - expected).max() / scale < 1e-12
    assert np.abs(actual - expected).max() / scale < 1e-5


@pytest.mark.shared
def test_official_tiny_model_gives_its_published_logits(shared_data):
    """A model nobody here made: RWKV/rwkv.cpp's byte-level RWKV-7, read from its own file."""
    folder = shared_data / "rwkv_cpp_tiny"
    model = rwkv_text.load(folder / "tiny-rwkv-7v0-834K-FP32.bin")
    expected = np.fromfile(folder / "expected-logits-7v0-834K.bin", np.float32)
    tokens, state = torch.tensor([[34, 105, 110]]), None
    with torch.no_grad():
        whole = model(tokens).logits_BTV[0, -1].numpy()
        for token in tokens[0]:
            out = model(token.view(1, 1), state)
            state = out.state
    assert np.abs(whole - expected).max() <= 1e-6
    assert np.abs(out.logits_BTV[0, -1].numpy() - expected).max() <= 1e-6


def test_initial_values_are_the_official_trainers():
    D, L, layer, N = 128, 4, 2, 32
    mixer = TimeMix7(D, head_dim=N, layer=layer, depth=L)
    got = {n: p.detach().double().numpy() for n, p in mixer.named_parameters()}
    rho, rest = layer / (L - 1), 1 - layer / L
    expected: dict[str, np.ndarray] = {}
    for n in range(D):
        t = ((n % N) - (N - 1) / 2) / ((N - 1) / 2)
        z, lin = t * abs(t), n / (D - 1) - 0.5
        values = {
            "w0": -6 + 6 * (n / (D - 1)) ** (1 + rho**0.3) + 0.5 + 2.5 * z,
            "a0": -0.19 + 0.3 * z + 0.4 * lin,
            "v0": 0.73 - 0.4 * lin,
            "k_k": 0.71 - 0.1 * lin,
            "k_a": 1.02,
            "ln_x.weight": ((1 + layer) / L) ** 0.7,
            "ln_x.bias": 0.0,
        }
        values |= {f"x_{c}": 1 - (n / D) ** (0.2 * rest) for c in "rg"}
        values |= {f"x_{c}": 1 - (n / D) ** (0.9 * rest) for c in "wa"}
        values |= {f"x_{c}": 1 - (n / D) ** (0.7 * rest) for c in "kv"}
        for name, value in values.items():
            expected.setdefault(name, np.empty(D))[n] = value
    for name, values in expected.items():
        np.testing.assert_allclose(got.pop(name), values, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(got.pop("r_k"), -0.04, atol=1e-8)
    for c, factor in (("w", 2.5), ("a", 2.5), ("v", 1.7), ("g", 5.0)):
        rank = max(32, round(factor * math.sqrt(D) / 32) * 32)
        assert got[f"{c}1"].shape == (D, rank)
        assert not got.pop(f"{c}1").any()
        w2 = got.pop(f"{c}2")  # orthogonal rows, gain 0.1
        np.testing.assert_allclose(w2 @ w2.T, 0.01 * np.eye(rank), atol=1e-6)
    for name, gain in (("receptance", 1.0), ("value", 1.0), ("key", 0.1), ("output", 0.0)):
        weight = got.pop(f"{name}.weight")
        np.testing.assert_allclose(weight @ weight.T, gain**2 * np.eye(D), atol=1e-5)
    assert not got, f"not in the official table: {sorted(got)}"

    channel = ChannelMix7(D, layer=layer, depth=L)
    n = np.arange(D) / D
    np.testing.assert_allclose(channel.x_k.detach(), 1 - n ** (rest**4), atol=2e-6)
    key = channel.key.weight.detach().double().numpy()
    assert key.shape == (4 * D, D)
    np.testing.assert_allclose(key.T @ key, np.eye(D), atol=1e-5)
    assert not channel.value.weight.any()


def test_initial_ends_and_first_loss_are_the_official_ones():
    V, D = 512, 64
    model = CausalLM(TextConfig(dim=D, depth=2, vocab_size=V, mixer_options={"head_dim": 32}))
    emb = model.emb.weight.detach()
    assert emb.abs().max() <= 1e-4
    assert abs(emb.std().item() - 1e-4 / math.sqrt(3)) < 2e-6
    head = model.head.weight.detach().double()
    gain = 0.5 * math.sqrt(V / D)
    torch.testing.assert_close(
        head.T @ head, gain**2 * torch.eye(D, dtype=torch.float64), atol=1e-4, rtol=0
    )
    tokens = torch.randint(V, (4, 65))
    with torch.no_grad():
        logits = model(tokens[:, :-1]).logits_BTV
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    # blocks start as the identity: ln V plus half the variance that the head gives
    assert abs(loss.item() - (math.log(V) + 0.5**2 / 2)) < 0.02


def test_optimiser_groups_are_the_official_trainers():
    model = small_model()
    groups = {name: (lr, decays) for names, lr, decays in param_groups(model) for name in names}
    assert groups.keys() == dict(model.named_parameters()).keys()
    decayed = ("receptance", "key", "value", "output", "emb", "head")
    for name, (lr, decays) in groups.items():
        *_, owner, kind = ["", *name.split(".")]
        assert decays == (owner in decayed and kind == "weight"), name
        assert lr == (2.0 if kind == "w0" else 1.0), name


def test_official_rank_rule():
    # width → ranks of (decay and rate, value, gate), as the official trainer computes them
    table = {128: (32, 32, 64), 512: (64, 32, 128), 1024: (64, 64, 160), 4096: (160, 96, 320)}
    for dim, ranks in table.items():
        assert tuple(lora_rank(dim, f) for f in (2.5, 1.7, 5.0)) == ranks


def test_first_layer_has_no_value_mix_and_one_layer_is_enough():
    assert not {"v0", "v1", "v2"} & dict(TimeMix7(32, head_dim=16).named_parameters()).keys()
    y, _ = Backbone(32, 1, mixer_options={"head_dim": 16})(torch.randn(1, 4, 32))
    assert y.isfinite().all()


def test_wrong_names_and_options_are_refused_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'rwkv7'"):
        Backbone(32, 1, mixer="rwkv77")
    with pytest.raises(
        ConfigError, match="unknown mixer option 'head_size'; did you mean 'head_dim'"
    ):
        Backbone(32, 1, mixer_options={"head_size": 16})
    for options in ({"head_dim": 24}, {"head_dim": 0}):
        with pytest.raises(ConfigError, match="dim 32 is not a multiple of head_dim"):
            Backbone(32, 1, mixer_options=options)
    with pytest.raises(ConfigError, match=r"mixer options .* do not fit"):
        Backbone(32, 1, mixer_options={"head_dim": "16"})
