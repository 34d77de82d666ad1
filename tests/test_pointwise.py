"""The ops around the recurrences: one pass in C++ against plain operations in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from rwkv_core.errors import ConfigError, NativeError
from rwkv_core.mixers.rwkv7 import TimeMix7
from rwkv_core.ops import finish7, gate, gates7, grid_mix, squared_relu, token_mix
from rwkv_core.ops.native import library
from rwkv_core.testing import relative_error

LENGTHS = [1, 7, 64, 131]
GROUPS = [(7, 0, -2), (5, 0, 1), (8, -1, 0), (6, 1, 0), (3, 0, 0)]  # of 29 channels: size, dy, dx
needs_library = pytest.mark.skipif(not library.available(), reason="native ops are not built")


class Case(NamedTuple):
    op: Callable[..., Any]
    inputs: Sequence[Tensor]


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def cases(T: int, B: int = 2, H: int = 3, K: int = 32) -> dict[str, Case]:
    D, odd = H * K, H * K + 5

    def mixing(*x: Tensor, impl: str) -> Any:
        return gates7(*x[:-3], mixed_in=x[-3:], impl=impl)

    def finish(*x: Tensor, impl: str) -> Tensor:
        return finish7(*x, 64e-5, impl=impl)

    def mix(*x: Tensor, impl: str) -> Any:
        return token_mix(*x, impl=impl)

    def grid(*x: Tensor, impl: str) -> Any:
        return grid_mix(*x, GROUPS, x[0].shape[-1] // 29, impl=impl)

    gates = [*(randn(B, T, D) for _ in range(4)), randn(D), randn(D), randn(H, K), randn(D)]
    first = [randn(B, T, D), randn(B, T, D), randn(D)]
    rows = [3 * randn(B, T, H, 1, K) for _ in range(4)]
    return {
        "token_mix of 6": Case(mix, [randn(B, T, D), randn(B, D), randn(6, D)]),
        "token_mix of 1": Case(mix, [randn(B, T, odd), randn(B, odd), randn(1, odd)]),
        "squared_relu": Case(squared_relu, [randn(B, T, odd)]),
        "gate": Case(gate, [randn(B, T, odd), randn(B, T, odd)]),
        "grid_mix": Case(grid, [randn(B, T, 3, 29), randn(3, 29)]),
        "grid_mix of 2 heads": Case(grid, [randn(B, 3, T + 1, 58), randn(2, 58)]),
        "gates7 of layer 0": Case(gates7, gates),
        "gates7": Case(mixing, [*gates, *first]),
        "finish7": Case(finish, [*rows, randn(B, T, D), randn(H, K), randn(D), randn(D)]),
    }


NAMES = list(cases(1))


def flat(outputs: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(outputs)


def run(case: Case, impl: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs, and the gradients of a random function of them."""
    inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
    outputs = flat(case.op(*inputs, impl=impl))
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=dtype)
    for y in outputs:
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64)
        loss = loss + (y * weights.to(dtype)).sum()
    return outputs, list(torch.autograd.grad(loss, inputs, materialize_grads=True))


@needs_library
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("T", LENGTHS)
def test_native_matches_float64(name: str, T: int) -> None:
    torch.manual_seed(T)
    case = cases(T)[name]
    expected, got = run(case, "plain", torch.float64), run(case, "native", torch.float32)
    for exact, found in zip(expected, got, strict=True):
        for e, f in zip(exact, found, strict=True):
            assert f.shape == e.shape
            assert relative_error(f, e) <= 2e-6


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_threads_change_nothing(name: str) -> None:
    torch.manual_seed(0)
    case = cases(331, K=64)[name]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(case, "native", torch.float32)
        torch.set_num_threads(3)
        together = run(case, "native", torch.float32)
    finally:
        torch.set_num_threads(before)
    for a, b in zip((*alone[0], *alone[1]), (*together[0], *together[1]), strict=True):
        assert torch.equal(a, b)


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_second_derivatives_are_those_of_the_plain_form(name: str) -> None:
    def second(impl: str, dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in case.inputs]
        loss = sum(y.square().sum() for y in flat(case.op(*inputs, impl=impl)))
        first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
        total = sum(g.square().sum() for g in first)
        return list(torch.autograd.grad(total, inputs, materialize_grads=True))

    torch.manual_seed(0)
    case = cases(3)[name]
    for e, f in zip(second("plain", torch.float64), second("native", torch.float32), strict=True):
        assert relative_error(f, e) <= 1e-4


@needs_library
@pytest.mark.parametrize("name", NAMES)
def test_inputs_may_be_strided_and_need_no_gradient(name: str) -> None:
    torch.manual_seed(0)
    case = cases(5)[name]
    wanted = flat(case.op(*(x.float() for x in case.inputs), impl="native"))
    strided = [x.float().mT.contiguous().mT if x.ndim > 1 else x.float() for x in case.inputs]
    for a, b in zip(flat(case.op(*strided, impl="native")), wanted, strict=True):
        assert torch.equal(a, b)
    for i, x in enumerate(strided):  # one input after the other is the only one that learns
        leaf = x.detach().requires_grad_()
        outputs = flat(case.op(*strided[:i], leaf, *strided[i + 1 :], impl="native"))
        (grad,) = torch.autograd.grad(sum(y.sum() for y in outputs if y.requires_grad), leaf)
        assert grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing_to_mix(shape: tuple[int, int, int]) -> None:
    x_BTD, last_BD = torch.randn(shape), torch.randn(shape[0], 8)
    mixed, after_BD = token_mix(x_BTD, last_BD, torch.rand(2, 8))
    assert [m.shape for m in mixed] == [x_BTD.shape] * 2
    assert torch.equal(after_BD, last_BD)
    assert squared_relu(x_BTD).shape == x_BTD.shape


@needs_library
def test_a_zero_key_has_no_direction() -> None:
    case = cases(2)["gates7"]
    case.inputs[2].zero_()
    for outputs in run(case, "native", torch.float32):
        assert all(x.isfinite().all() for x in outputs)


@needs_library
def test_nan_stays_nan() -> None:
    y = squared_relu(torch.tensor([float("nan"), -1.0, 2.0]), impl="native")
    assert y.isnan().tolist() == [True, False, False]


@needs_library
def test_what_native_cannot_take_is_said() -> None:
    with pytest.raises(ConfigError, match=r"unknown impl 'natve'.*native"):
        squared_relu(torch.randn(3), impl="natve")
    with pytest.raises(NativeError, match="takes float32 on cpu, got float64 on cpu"):
        squared_relu(randn(3), impl="native")
    small = cases(2, K=8)
    for name in ("gates7", "finish7"):
        with pytest.raises(NativeError, match="multiple of 16, got 8"):
            run(small[name], "native", torch.float32)
        for exact, found in zip(
            run(small[name], "plain", torch.float64), run(small[name], "auto", torch.float32),
            strict=True,
        ):  # fmt: skip
            for e, f in zip(exact, found, strict=True):
                assert relative_error(f, e) <= 2e-6


@needs_library
def test_a_layer_in_training_uses_every_native_form(monkeypatch: pytest.MonkeyPatch) -> None:
    from rwkv_core.mixers.base import Shared
    from rwkv_core.mixers.rwkv7 import ChannelMix7

    called = set()
    run_kernel = library.Library.run

    def run(self: library.Library, name: str, *args: Any) -> None:
        called.add(name)
        run_kernel(self, name, *args)

    monkeypatch.setattr(library.Library, "run", run)
    time_mix, channel_mix = TimeMix7(64, head_dim=32), ChannelMix7(64)
    state = time_mix.init_state(1)
    y_BTD, state, shared = time_mix(torch.randn(1, 67, 64), state, Shared())
    y_BTD, *_ = channel_mix(y_BTD, state, shared)
    y_BTD.sum().backward()
    passes = {f"{op}_{way}" for op in ("token_mix", "gates7", "wkv7", "finish7")
              for way in ("forward", "backward")}  # fmt: skip
    assert called == passes | {"squared_relu"}


@needs_library
def test_traced_code_holds_plain_operations() -> None:
    mixer = TimeMix7(64, head_dim=32)
    state = mixer.init_state(1)
    x_BTD = torch.randn(1, 4, 64)
    from rwkv_core.mixers.base import Shared

    def first(x_BTD: Tensor) -> Tensor:
        return mixer(x_BTD, state, Shared())[0]

    compiled = torch.compile(first, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x_BTD), first(x_BTD), rtol=1e-5, atol=1e-6)
