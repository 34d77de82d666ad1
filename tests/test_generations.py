"""Generations 4, 5 and 6: each against an independent NumPy model and the official recipe."""

import math

import numpy as np
import pytest
import torch

from rwkv_core.backbone import Backbone
from rwkv_core.mixers.base import Shared
from rwkv_core.mixers.rwkv4 import ChannelMix4, TimeMix4
from rwkv_core.mixers.rwkv5 import ChannelMix5, TimeMix5, hidden_width
from rwkv_core.mixers.rwkv6 import ChannelMix6, TimeMix6
from rwkv_core.testing import check_mixer, perturb
from rwkv_core.train.optim import param_groups
from rwkv_text import CausalLM, TextConfig

DIM, DEPTH, HEAD = 48, 3, 16
HEADS = DIM // HEAD
TOKENS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]
R50 = {"per_channel": False, "gate": False, "exp_bonus": True}
R51 = {"per_channel": False}
CASES = {
    "4": ("rwkv4", {}),
    "5.0": ("rwkv5", {"head_dim": HEAD, **R50}),
    "5.1": ("rwkv5", {"head_dim": HEAD, **R51}),
    "5.2": ("rwkv5", {"head_dim": HEAD}),
    "6": ("rwkv6", {"head_dim": HEAD, "mix_rank": 3, "decay_rank": 5}),
    "6 stable": ("rwkv6", {"head_dim": HEAD, "stabilize_key": True, "norm_eps": 1e-5}),
}


def small_model(case: str) -> CausalLM:
    mixer, options = CASES[case]
    config = TextConfig(
        dim=DIM, depth=DEPTH, vocab_size=20, mixer=mixer,
        mixer_options={"hidden_dim": 80, **options},
    )  # fmt: skip
    model = CausalLM(config).eval()
    perturb(model, 0.2)
    return model


def norm(x, weight, bias, eps):
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def time_mix4(t, h, last, memory):
    """Numerator and denominator, unscaled, as the paper writes them."""
    r, k, v = (
        t(f"{name}.weight") @ (h * t(f"time_mix_{c}") + last * (1 - t(f"time_mix_{c}")))
        for name, c in (("receptance", "r"), ("key", "k"), ("value", "v"))
    )
    num, den = memory.setdefault("sums", (np.zeros(DIM), np.zeros(DIM)))
    now = np.exp(t("time_first") + k)
    wkv = (num + now * v) / (den + now)
    fade = np.exp(-np.exp(t("time_decay")))
    memory["sums"] = (fade * num + np.exp(k) * v, fade * den + np.exp(k))
    return t("output.weight") @ (sigmoid(r) * wkv)


def read_and_write(r, k, v, u, decay, memory, t, eps):
    """One token of every head: y reads S and the bonus, then S fades and takes k vᵀ."""
    S = memory.setdefault("S", np.zeros((HEADS, HEAD, HEAD)))
    r, k, v, decay = (x.reshape(HEADS, HEAD) for x in (r, k, v, decay))
    out = np.empty((HEADS, HEAD))
    for n in range(HEADS):
        for j in range(HEAD):  # value channel by value channel
            out[n, j] = sum(
                r[n, i] * (S[n, i, j] + u[n, i] * k[n, i] * v[n, j]) for i in range(HEAD)
            )
        rows = slice(n * HEAD, (n + 1) * HEAD)
        S[n] = decay[n][:, None] * S[n] + np.outer(k[n], v[n])
        out[n] = norm(out[n], t("ln_x.weight")[rows], t("ln_x.bias")[rows], eps)
    return out.ravel()


def time_mix5(t, h, last, memory, case):
    def mixed(name, c):
        return t(f"{name}.weight") @ (h * t(f"time_mix_{c}") + last * (1 - t(f"time_mix_{c}")))

    r, k, v = mixed("receptance", "r"), mixed("key", "k"), mixed("value", "v")
    u = np.exp(t("time_first")) if case == "5.0" else t("time_faaaa")
    decay = np.exp(-np.exp(t("time_decay")))
    if case != "5.2":  # one number a head
        u, decay = np.repeat(u, HEAD).reshape(HEADS, HEAD), np.repeat(decay, HEAD)
    y = read_and_write(r, k, v, u, decay, memory, t, 64e-5)
    return t("output.weight") @ (y if case == "5.0" else y * silu(mixed("gate", "g")))


def time_mix6(t, h, last, memory, case):
    d = last - h
    low = np.tanh((h + d * t("time_maa_x")) @ t("time_maa_w1"))
    rank = len(low) // 5
    x = {
        c: h + d * (t(f"time_maa_{c}") + low[i * rank : (i + 1) * rank] @ t("time_maa_w2")[i])
        for i, c in enumerate("wkvrg")
    }
    raw = t("time_decay") + np.tanh(x["w"] @ t("time_decay_w1")) @ t("time_decay_w2")
    k = t("key.weight") @ x["k"]
    if case == "6 stable":
        k = k * np.exp(np.minimum(raw, 0))
    y = read_and_write(
        t("receptance.weight") @ x["r"], k, t("value.weight") @ x["v"], t("time_faaaa"),
        np.exp(-np.exp(raw)), memory, t, 1e-5 if case == "6 stable" else 64e-5,
    )  # fmt: skip
    return t("output.weight") @ (y * silu(t("gate.weight") @ x["g"]))


def numpy_forward(p: dict[str, np.ndarray], tokens: list[int], case: str) -> np.ndarray:
    """Return logits [T, V], token by token in fp64, written from the papers' formulas alone."""
    att_last, ffn_last = np.zeros((DEPTH, DIM)), np.zeros((DEPTH, DIM))
    memories: list[dict] = [{} for _ in range(DEPTH)]
    logits = []
    for token in tokens:
        x = p["emb.weight"][token]
        x = norm(x, p["backbone.ln_in.weight"], p["backbone.ln_in.bias"], 1e-5)
        for i in range(DEPTH):

            def q(name, i=i):
                return p[f"backbone.blocks.{i}.{name}"]

            def t(name, q=q):
                return q(f"time_mix.{name}")

            h = norm(x, q("ln1.weight"), q("ln1.bias"), 1e-5)
            if case == "4":
                x = x + time_mix4(t, h, att_last[i], memories[i])
            else:
                mix = time_mix6 if case.startswith("6") else time_mix5
                x = x + mix(t, h, att_last[i], memories[i], case)
            att_last[i] = h
            h = norm(x, q("ln2.weight"), q("ln2.bias"), 1e-5)
            d = ffn_last[i] - h
            if case.startswith("6"):
                x_k = h + d * q("channel_mix.time_maa_k")
                x_r = h + d * q("channel_mix.time_maa_r")
            else:
                x_k = h + d * (1 - q("channel_mix.time_mix_k"))
                x_r = h + d * (1 - q("channel_mix.time_mix_r"))
            ffn_last[i] = h
            hidden = np.maximum(q("channel_mix.key.weight") @ x_k, 0) ** 2
            gate = sigmoid(q("channel_mix.receptance.weight") @ x_r)
            x = x + gate * (q("channel_mix.value.weight") @ hidden)
        x = norm(x, p["backbone.ln_out.weight"], p["backbone.ln_out.bias"], 1e-5)
        logits.append(p["head.weight"] @ x)
    return np.array(logits)


@pytest.mark.parametrize("case", list(CASES))
def test_model_matches_an_independent_numpy_forward(case):
    model = small_model(case)
    weights = {n: t.detach().double().numpy() for n, t in model.state_dict().items()}
    expected = numpy_forward(weights, TOKENS, case)
    with torch.no_grad():
        actual = model(torch.tensor([TOKENS])).logits_BTV[0].numpy()
        exact = model.double()(torch.tensor([TOKENS])).logits_BTV[0].numpy()
    scale = np.abs(expected).max()
    assert np.abs(exact - expected).max() / scale < 1e-12
    assert np.abs(actual - expected).max() / scale < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "options"),
    [("rwkv5", R50), ("rwkv6", {"stabilize_key": True, "tuned_state": True}),
     ("rwkv7", {"tuned_state": True})],
)  # fmt: skip
def test_every_release_keeps_the_contract(mixer, options):
    check_mixer(mixer, **options)


def test_the_mixture_of_two_states_of_generation_4_is_that_of_their_sums():
    trunk = Backbone(DIM, 2, mixer="rwkv4")
    perturb(trunk, 0.5)
    _, (a, _) = trunk(5 * torch.randn(2, 9, DIM))
    _, (b, _) = trunk(5 * torch.randn(2, 4, DIM))

    def sums(s):
        s = [x.double() for x in s]
        return torch.stack([s[1], s[2]]) * s[3].exp()

    expected = 0.75 * sums(a) + 0.25 * sums(b)
    torch.testing.assert_close(sums(a.mix(b, 0.25)), expected, rtol=1e-5, atol=0)
    assert not torch.allclose(a.wkv_max_BD, b.wkv_max_BD)


def test_a_tuned_state_is_where_every_sequence_starts():
    options = {"head_dim": 16, "tuned_state": True}
    for mixer in ("rwkv6", "rwkv7"):
        torch.manual_seed(0)
        tuned = Backbone(32, 2, mixer=mixer, mixer_options=options)
        perturb(tuned)
        plain = Backbone(32, 2, mixer=mixer, mixer_options={"head_dim": 16})
        own = {n: p for n, p in tuned.state_dict().items() if "time_state" not in n}
        plain.load_state_dict(own)
        x_BTD = torch.randn(2, 5, 32)
        start = plain.init_state(2)
        start = tuple(
            s._replace(wkv_BHKV=b.time_mix.time_state.expand_as(s.wkv_BHKV))
            for s, b in zip(start, tuned.blocks, strict=True)
        )
        torch.testing.assert_close(tuned(x_BTD)[0], plain(x_BTD, start)[0], rtol=0, atol=0)
        assert not torch.allclose(tuned(x_BTD)[0], plain(x_BTD)[0])


D, L, LAYER, N = 96, 5, 2, 16
RHO, REST = LAYER / (L - 1), 1 - LAYER / L


def zigzag(n):
    return (n + 1) % 3 - 1


def check_table(mixer, values, orthogonal):
    """Compare every parameter with its law: a function of the index, or an orthogonal gain."""
    got = {n: p.detach().double().numpy() for n, p in mixer.named_parameters()}
    for name, law in values.items():
        actual = got.pop(name).ravel()
        expected = [law(n, len(actual)) for n in range(len(actual))]
        np.testing.assert_allclose(actual, expected, atol=3e-6, err_msg=name)
    for name, gain in orthogonal.items():
        weight = got.pop(f"{name}.weight")
        small = weight if weight.shape[0] <= weight.shape[1] else weight.T
        eye = gain**2 * np.eye(len(small))
        np.testing.assert_allclose(small @ small.T, eye, atol=1e-5, err_msg=name)
    return got


def mixes(names, complement):
    """Return the laws of the interpolation vectors of generations 4 to 6."""
    laws = {
        "k": lambda n, D: (n / D) ** REST,
        "v": lambda n, D: (n / D) ** REST + 0.3 * RHO,
        "r": lambda n, D: (n / D) ** (0.5 * REST),
    }
    laws |= {"g": laws["r"], "w": laws["k"], "x": laws["k"]}
    if complement:
        return {f"time_maa_{c}": lambda n, D, c=c: 1 - laws[c](n, D) for c in names}
    return {f"time_mix_{c}": laws[c] for c in names}


def test_initial_values_of_generation_4():
    left = check_table(
        TimeMix4(D, layer=LAYER, depth=L),
        {
            "time_decay": lambda n, D: -5 + 8 * (n / (D - 1)) ** (0.7 + 1.3 * RHO),
            "time_first": lambda n, D: math.log(0.3) + 0.5 * zigzag(n),
            **mixes("kvr", complement=False),
        },
        {"value": 1, "key": 0, "receptance": 0, "output": 0},
    )
    assert not left
    left = check_table(
        ChannelMix4(D, layer=LAYER, depth=L),
        {f"time_mix_{c}": lambda n, D: (n / D) ** REST for c in "kr"},
        {"key": 2, "receptance": 0, "value": 0},
    )
    assert not left


@pytest.mark.parametrize("case", ["5.0", "5.1", "5.2"])
def test_initial_values_of_generation_5(case):
    options = {"5.0": R50, "5.1": R51, "5.2": {}}[case]
    bonus = {
        "5.0": {"time_first": lambda h, H: -3},
        "5.1": {"time_faaaa": lambda h, H: RHO * (1 - h / (H - 1))},
        "5.2": {"time_faaaa": lambda n, D: RHO * (1 - n / (D - 1)) + 0.1 * zigzag(n)},
    }[case]
    mixer = TimeMix5(D, head_dim=N, layer=LAYER, depth=L, **options)
    shape = (D // N, N) if case == "5.2" else (D // N,)
    assert mixer.time_decay.shape == shape == getattr(mixer, mixer.bonus_name).shape
    gate = "" if case == "5.0" else "g"
    left = check_table(
        mixer,
        {
            "time_decay": lambda n, D: -6 + 5 * (n / (D - 1)) ** (0.7 + 1.3 * RHO),
            **bonus,
            **mixes("kvr" + gate, complement=False),
            "ln_x.weight": lambda n, D: ((1 + LAYER) / L) ** 0.7,
            "ln_x.bias": lambda n, D: 0,
        },
        {"receptance": 1, "value": 1, "key": 0.1, "output": 0} | ({"gate": 0.1} if gate else {}),
    )
    assert not left
    left = check_table(
        ChannelMix5(D, layer=LAYER, depth=L),
        {f"time_mix_{c}": lambda n, D: (n / D) ** REST for c in "kr"},
        {"key": 1, "receptance": 0, "value": 0},
    )
    assert not left


def test_initial_values_of_generation_6():
    left = check_table(
        TimeMix6(D, head_dim=N, layer=LAYER, depth=L, tuned_state=True),
        {
            "time_decay": lambda n, D: -6 + 5 * (n / (D - 1)) ** (0.7 + 1.3 * RHO),
            "time_faaaa": lambda n, D: RHO * (1 - n / (D - 1)) + 0.1 * zigzag(n),
            **mixes("xwkvrg", complement=True),
            "time_maa_w1": lambda n, D: 0,
            "time_decay_w1": lambda n, D: 0,
            "time_state": lambda n, D: 0,
            "ln_x.weight": lambda n, D: ((1 + LAYER) / L) ** 0.7,
            "ln_x.bias": lambda n, D: 0,
        },
        {"receptance": 1, "value": 1, "key": 0.1, "gate": 0.1, "output": 0},
    )
    for name, shape in (("time_maa_w2", (5, 32, D)), ("time_decay_w2", (64, D))):
        values = left.pop(name)
        assert values.shape == shape
        assert np.abs(values).max() <= 0.01
        assert abs(values.std() - 0.01 / math.sqrt(3)) < 2e-4
    assert not left
    left = check_table(
        ChannelMix6(D, layer=LAYER, depth=L),
        {f"time_maa_{c}": lambda n, D: 1 - (n / D) ** (REST**3) for c in "kr"},
        {"key": 1, "receptance": 0, "value": 0},
    )
    assert not left


def test_official_widths_and_ranks():
    assert [hidden_width(d) for d in (64, 768, 1024, 2560, 4096)] == [224, 2688, 3584, 8960, 14336]
    with torch.device("meta"):
        small, large = TimeMix6(128), TimeMix6(4096)
    assert (small.time_maa_w1.shape, small.time_decay_w1.shape) == ((128, 160), (128, 64))
    assert (large.time_maa_w1.shape, large.time_decay_w1.shape) == ((4096, 320), (4096, 128))


@pytest.mark.parametrize("case", list(CASES))
def test_optimiser_groups_are_the_official_trainers(case):
    model = small_model(case)
    groups = {name: (lr, decays) for names, lr, decays in param_groups(model) for name in names}
    assert groups.keys() == dict(model.named_parameters()).keys()
    decayed = ("receptance", "key", "value", "gate", "output", "emb", "head")
    faster = {"time_decay": 2.0, "time_first": 3.0}
    for name, (lr, decays) in groups.items():
        *_, owner, kind = ["", *name.split(".")]
        assert decays == (owner in decayed and kind == "weight"), name
        assert lr == faster.get(kind, 1.0), name


@pytest.mark.parametrize("mixer", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_one_layer_is_enough(mixer):
    options = {} if mixer == "rwkv4" else {"head_dim": 32}  # one head, too
    y_BTD, _ = Backbone(32, 1, mixer=mixer, mixer_options=options)(torch.randn(1, 4, 32))
    assert y_BTD.isfinite().all()


def test_the_first_state_of_generation_4_takes_small_first_keys():
    mixer = TimeMix4(16)
    with torch.no_grad():
        mixer.key.weight.fill_(-100.0)
    x_BTD = torch.ones(1, 3, 16)
    y_BTD, state, _ = mixer(x_BTD, mixer.init_state(1), Shared())
    assert y_BTD.isfinite().all()
    assert all(s.isfinite().all() for s in state)
