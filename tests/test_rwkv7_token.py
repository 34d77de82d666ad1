"""One token through a layer of RWKV-7 in native calls: the numbers of the plain form."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rwkv_core.mixers.base import MatrixState, Mixer, Shared
from rwkv_core.mixers.rwkv7 import ChannelMix7, TimeMix7
from rwkv_core.ops.native import library
from rwkv_core.precision import cast
from rwkv_core.testing import perturb, relative_error

pytestmark = pytest.mark.usefixtures("native_library")

HEADS, TOKENS = 3, 5
RANKS = {"decay_rank": 24, "iclr_rank": 7, "value_rank": 5, "gate_rank": 33}


def mixers(layer: int, head_dim: int = 16) -> list[Mixer]:
    torch.manual_seed(layer)
    dim = HEADS * head_dim
    both = [
        TimeMix7(dim, head_dim=head_dim, layer=layer, depth=2, **RANKS),
        ChannelMix7(dim, layer=layer, depth=2, hidden_dim=3 * dim + 5),
    ]
    for mixer in both:
        perturb(mixer, 0.1)
    return both


def decode(both: list[Mixer], tokens_T1D: Tensor, v_first_T1D: Tensor | None) -> list[Tensor]:
    """Return y of both halves for token after token, the first layer's values, and the state."""
    time_mix, channel_mix = both
    state, found = time_mix.init_state(1, dtype=tokens_T1D.dtype), []
    for t, x_1D in enumerate(tokens_T1D):
        shared = Shared(v_first=None if v_first_T1D is None else v_first_T1D[t][None])
        y_BTD, state, shared = time_mix(x_1D[None], state, shared)
        z_BTD, state, _ = channel_mix(x_1D[None], state, shared)
        found += [y_BTD, z_BTD, shared.v_first]
    return [*found, *state]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels, as they are called."""
    names: list[str] = []
    run_kernel = library.Library.run

    def run(self: library.Library, name: str, *args: Any) -> None:
        names.append(name)
        run_kernel(self, name, *args)

    monkeypatch.setattr(library.Library, "run", run)
    return names


@torch.no_grad()
@pytest.mark.parametrize("head_dim", [16, 64])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_token_is_that_of_the_plain_form(
    layer: int, head_dim: int, threads: int, called: list[str]
) -> None:
    both = mixers(layer, head_dim)
    exact = [copy.deepcopy(mixer).double() for mixer in both]
    shape = (TOKENS, 1, HEADS * head_dim)
    tokens = torch.randn(shape, dtype=torch.float64)
    first = torch.randn(shape, dtype=torch.float64) if layer else None
    expected = decode(exact, tokens, first)
    both[1].value.lay_by_columns()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        found = decode(both, tokens.float(), None if first is None else first.float())
    finally:
        torch.set_num_threads(before)
    assert called == ["time_mix7_token", "channel_mix7_token"] * TOKENS
    for e, f in zip(expected, found, strict=True):
        assert f.shape == e.shape
        assert f.dtype == torch.float32
        assert relative_error(f, e) <= 2e-6


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_a_token_in_bf16_is_rounded_once_where_the_plain_form_rounds_often(
    layer: int, called: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = [cast(mixer, torch.bfloat16) for mixer in mixers(layer)]
    assert both[0].w0.dtype == torch.float32
    exact = [copy.deepcopy(mixer).double() for mixer in both]
    tokens = torch.randn(TOKENS, 1, HEADS * 16).bfloat16()
    first = torch.randn(tokens.shape).bfloat16() if layer else None
    expected = decode(exact, tokens.double(), None if first is None else first.double())
    both[1].value.lay_by_columns()
    found = decode(both, tokens, first)
    assert called == ["time_mix7_token", "channel_mix7_token"] * TOKENS
    monkeypatch.setattr("rwkv_core.mixers.rwkv7.time_mix_token", lambda *args: None)
    monkeypatch.setattr("rwkv_core.mixers.rwkv7.channel_mix_token", lambda *args: None)
    plain = decode(both, tokens, first)
    assert found[-2].dtype == torch.float32  # the state
    assert relative_error(found[-2], expected[-2]) <= 2e-6
    for e, f, p in zip(expected, found, plain, strict=True):
        assert f.dtype == p.dtype
        assert f.shape == p.shape
        assert relative_error(f, e) <= 2**-8  # half a step of bf16
        assert relative_error(f, e) <= relative_error(p, e)


@torch.no_grad()
def test_a_token_goes_on_where_a_sequence_ended(called: list[str]) -> None:
    both = mixers(0)
    x_BTD = torch.randn(1, 7, HEADS * 16)
    start = both[0].init_state(1)
    expected, state, _ = both[0](x_BTD, start, Shared())
    _, state, _ = both[0](x_BTD[:, :6], start, Shared())
    y_BTD, after, _ = both[0](x_BTD[:, 6:], state, Shared())
    assert called[-1] == "time_mix7_token"
    assert relative_error(y_BTD, expected[:, 6:]) <= 2e-6
    assert torch.equal(after.att_shift_BD, x_BTD[:, 6])


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def doubled(both: list[Mixer]) -> None:
    for mixer in both:
        own = mixer.key
        mixer.key = Doubled(own.in_features, own.out_features, bias=False)
        mixer.key.weight = own.weight


def hooked(both: list[Mixer]) -> None:
    for mixer in both:
        mixer.key.register_forward_hook(lambda *args: 2 * args[2])


def twice_the_keys(both: list[Mixer]) -> None:
    for mixer in both:
        mixer.key.weight.mul_(2)


@torch.no_grad()
@pytest.mark.parametrize("change", [doubled, hooked])
def test_another_linear_map_or_a_hook_is_not_passed_by(
    change: Callable[[list[Mixer]], None], called: list[str]
) -> None:
    tokens = torch.randn(2, 1, HEADS * 16)
    changed, scaled = mixers(0), mixers(0)
    change(changed)
    twice_the_keys(scaled)
    expected = decode(scaled, tokens, None)
    called.clear()
    found = decode(changed, tokens, None)
    assert not {"time_mix7_token", "channel_mix7_token"} & set(called)
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_where_a_gradient_or_another_form_is_asked_for(called: list[str]) -> None:
    x_11D = torch.randn(1, 1, HEADS * 16)
    both = mixers(0)
    state: MatrixState = both[0].init_state(1)
    both[0](x_11D, state, Shared())[0].sum().backward()
    assert both[0].w2.grad is not None
    with torch.no_grad():
        two = both[0].init_state(2)
        both[0](x_11D.expand(2, 1, -1), two, Shared())
        both[0].impl = "reference"
        both[0](x_11D, state, Shared())
        both[0].impl = "auto"
        with torch.autocast("cpu", torch.bfloat16):
            both[1](x_11D, state, Shared())
        both[0](x_11D, state._replace(wkv_BHKV=state.wkv_BHKV.double()), Shared())
        half = both[1].to(torch.float16)
        half(x_11D.half(), state._replace(ffn_shift_BD=x_11D[:, 0].half()), Shared())
    assert not {"time_mix7_token", "channel_mix7_token"} & set(called)
