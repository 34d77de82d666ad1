"""Bidirectional WKV: the formula in float64, every implementation against it, what traces it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rwkv_core.errors import CheckpointError, ExportError
from rwkv_core.ops import bi_wkv
from rwkv_core.ops.bi_wkv import IMPLS, MAX_DECAY, check_decay
from rwkv_core.ops.bi_wkv.prefix import bi_wkv_prefix
from rwkv_core.ops.bi_wkv.reference import bi_wkv_reference
from rwkv_core.testing import relative_error

# 2 and a prime beside the lengths of images: 14 × 14, 24 × 24 + 1, 64 × 64 patches
LENGTHS = [1, 2, 7, 196, 577, 4096]
ADJOINT, PLAIN = IMPLS["prefix"], bi_wkv_prefix


def formula(w_C: np.ndarray, u_C: np.ndarray, k_BTC: np.ndarray, v_BTC: np.ndarray) -> np.ndarray:
    """Return y by the definition: for every token a softmax over all tokens."""
    B, T, C = k_BTC.shape
    y_BTC = np.empty((B, T, C))
    for start in range(0, T, 256):
        rows = np.arange(start, min(start + 256, T))
        apart = np.abs(rows[:, None] - np.arange(T))
        for b, c in np.ndindex(B, C):
            score = k_BTC[b, :, c] - (apart - 1) * w_C[c] / T
            score[apart == 0] = u_C[c] / T + k_BTC[b, rows, c]
            weight = np.exp(score - score.max(1, keepdims=True))
            y_BTC[b, rows, c] = weight @ v_BTC[b, :, c] / weight.sum(1)
    return y_BTC


def draw(T: int, decay: float, spread: float, C: int = 4) -> list[Tensor]:
    """Return w from -decay to decay, and u, k, v; ``spread`` is the keys' standard deviation."""
    w_C = torch.linspace(-decay, decay, C)
    return [w_C, torch.randn(C), spread * torch.randn(2, T, C), torch.randn(2, T, C)]


def gradients(run: Callable[..., Tensor], inputs: list[Tensor], weight: Tensor) -> list[Tensor]:
    """Return the gradients of a weighted sum; where there is none, zeros."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = (run(*inputs) * weight).sum()
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("T", LENGTHS)
def test_reference_is_the_formula(T: int) -> None:
    inputs = [x.double() for x in draw(T, 100.0, 5.0, C=2)]
    expected = formula(*(x.numpy() for x in inputs))
    np.testing.assert_allclose(bi_wkv_reference(*inputs).numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("decay", [3.0, 20.0, MAX_DECAY])
@pytest.mark.parametrize("T", LENGTHS)
def test_prefix_matches_the_formula(T: int, decay: float) -> None:
    for spread in (1.0, 8.0):
        inputs = draw(T, decay, spread, C=2)  # both signs of the decay
        expected = torch.from_numpy(formula(*(x.double().numpy() for x in inputs)))
        for run in (PLAIN, ADJOINT):
            y_BTC = run(*(x.requires_grad_() for x in inputs))
            assert y_BTC.dtype == torch.float32
            assert y_BTC.isfinite().all()
            assert relative_error(y_BTC, expected) <= 2e-6


@pytest.mark.parametrize("decay", [3.0, 20.0, MAX_DECAY])
@pytest.mark.parametrize(
    "T", [1, 2, 7, 196, 577, pytest.param(4096, marks=pytest.mark.slow)]
)  # fmt: skip
def test_prefix_gradients_match_the_reference(T: int, decay: float) -> None:
    for spread in (1.0, 8.0):
        inputs = draw(T, decay, spread, C=8)
        weight = torch.randn(2, T, 8)
        expected = gradients(bi_wkv_reference, [x.double() for x in inputs], weight.double())
        # tokens that have no neighbour two steps away leave the decay without effect, and a lone
        # token its bonus and key: what is left is the rounding of the other gradients
        floor = expected[3].abs().max()
        for run in (PLAIN, ADJOINT):
            for ours, truth in zip(gradients(run, inputs, weight), expected, strict=True):
                error = (ours.double() - truth).abs().max()
                scale = truth.abs().max() if truth.abs().max() > 1e-9 else floor
                assert error <= 1e-5 * scale


def test_adjoint_passes_gradcheck_twice() -> None:
    inputs = [x.double().requires_grad_() for x in draw(5, 9.0, 1.0, C=3)]
    assert ADJOINT(*inputs).grad_fn.name() == "BiWKVPrefixBackward"
    assert torch.autograd.gradcheck(ADJOINT, inputs)
    assert torch.autograd.gradgradcheck(ADJOINT, inputs)


def test_functorch_transforms_see_plain_operations() -> None:
    inputs = tuple(x.double() for x in draw(5, 9.0, 1.0, C=3))
    ours = torch.func.grad(lambda *x: ADJOINT(*x).square().sum(), (0, 1, 2, 3))(*inputs)
    leaves = [x.clone().requires_grad_() for x in inputs]
    for grad, truth in zip(
        ours, torch.autograd.grad(ADJOINT(*leaves).square().sum(), leaves), strict=True
    ):
        assert relative_error(grad, truth) <= 1e-12


def test_adjoint_keeps_few_tensors_for_the_backward_pass() -> None:
    inputs = [x.requires_grad_() for x in draw(50, 5.0, 1.0, C=16)]
    kept: dict[Callable[..., Tensor], int] = {}
    for run in (PLAIN, ADJOINT):
        seen: dict[int, int] = {}

        def note(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            y = run(*inputs)
        kept[run] = sum(seen.values()) // inputs[2].nbytes
        del y
    # k, v, y, the denominator and one difference of sums
    assert kept[ADJOINT] == 5
    assert kept[PLAIN] >= 2 * kept[ADJOINT]


@pytest.mark.parametrize("impl", ["auto", "prefix", "reference"])
def test_every_token_sees_every_token(impl: str) -> None:
    w, u, k, v = draw(9, 3.0, 1.0)
    before = bi_wkv(w, u, k, v, impl=impl)
    for changed, seen in ((-1, 0), (0, -1)):
        v2 = v.clone()
        v2[:, changed] += 1
        assert ((bi_wkv(w, u, k, v2, impl=impl) - before)[:, seen] > 1e-4).all()


@pytest.mark.parametrize("impl", ["prefix", "reference"])
def test_is_a_mean_that_no_shift_of_keys_changes(impl: str) -> None:
    w, u, k, v = draw(33, 20.0, 4.0)
    y = bi_wkv(w, u, k, v, impl=impl)
    assert (y <= v.amax(1, keepdim=True) + 1e-5).all()
    assert (y >= v.amin(1, keepdim=True) - 1e-5).all()
    torch.testing.assert_close(bi_wkv(w, u, k + 300, v, impl=impl), y, rtol=0, atol=2e-4)
    torch.testing.assert_close(bi_wkv(w, u, k, torch.ones_like(v), impl=impl), torch.ones_like(v))


@pytest.mark.parametrize("impl", ["prefix", "reference"])
def test_reading_backwards_gives_the_same(impl: str) -> None:
    w, u, k, v = (x.double() for x in draw(12, 5.0, 1.0))
    y = bi_wkv(w, u, k, v, impl=impl)
    back = bi_wkv(w, u, k.flip(1), v.flip(1), impl=impl).flip(1)
    torch.testing.assert_close(back, y, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["prefix", "reference"])
def test_length_scales_decay_and_bonus(impl: str) -> None:
    w, u, k, v = (x.double() for x in draw(10, 5.0, 1.0))
    # twice the tokens, twice the parameters: the same weights for the tokens both have
    silent = torch.full_like(k, -200.0)
    k2, v2 = torch.cat([k, silent], 1), torch.cat([v, v], 1)
    y2 = bi_wkv(2 * w, 2 * u, k2, v2, impl=impl)[:, :10]
    torch.testing.assert_close(y2, bi_wkv(w, u, k, v, impl=impl), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_fp32_or_fp64_and_returns_the_values_dtype(dtype: torch.dtype) -> None:
    w, u, k, v = draw(40, 20.0, 2.0)
    k, v = k.to(dtype), v.to(dtype)
    y = bi_wkv(w, u, k, v)
    assert y.dtype == dtype
    exact = bi_wkv(w.double(), u.double(), k.double(), v.double(), impl="reference")
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}[dtype]
    assert relative_error(y, exact) <= bound


def test_autocast_changes_nothing() -> None:
    inputs = draw(40, 20.0, 2.0)
    expected = bi_wkv(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bi_wkv(*inputs), expected)


class Op(nn.Module):
    def forward(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bi_wkv(w, u, k, v)


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    inputs = draw(17, 5.0, 1.0)
    compiled = torch.compile(Op(), fullgraph=True, backend="aot_eager")
    weight = torch.randn_like(inputs[3])
    for ours, truth in zip(
        gradients(compiled, inputs, weight), gradients(Op(), inputs, weight), strict=True
    ):
        assert relative_error(ours, truth) <= 1e-5


@pytest.mark.parametrize("impl", ["prefix"])
def test_exports_strictly_with_free_batch_and_length(impl: str) -> None:
    torch._dynamo.reset()
    B, T = torch.export.Dim("B", min=1), torch.export.Dim("T", min=2)
    free = {0: B, 1: T}
    inputs = tuple(draw(17, 5.0, 1.0))
    with torch.no_grad():
        program = torch.export.export(
            Op(), inputs, dynamic_shapes=(None, None, free, free), strict=True
        )
    w, u, k, v = draw(40, 5.0, 1.0)
    torch.testing.assert_close(program.module()(w, u, k[:1], v[:1]), bi_wkv(w, u, k[:1], v[:1]))


def test_unknown_impl_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown impl 'cuda'.*'prefix', 'reference'"):
        bi_wkv(*draw(3, 1.0, 1.0), impl="cuda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 0, 4)}, "T ≥ 1"),
        ({"k": torch.zeros(3, 4)}, r"expected k of shape \[B, T, C\]"),
        ({"v": torch.zeros(2, 4, 4)}, r"v has shape \(2, 4, 4\), expected \(2, 3, 4\)"),
        ({"w": torch.zeros(3)}, r"w has shape \(3,\), expected \(4,\)"),
        ({"u": torch.zeros(1, 4)}, r"u has shape \(1, 4\), expected \(4,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    inputs = dict(zip("wukv", draw(3, 1.0, 1.0), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        bi_wkv(*inputs.values())


def test_decay_out_of_range_is_an_error_that_names_the_layer() -> None:
    good = torch.tensor([-MAX_DECAY, MAX_DECAY])
    check_decay(good, good, layer="layer 7", error=ExportError)
    for bad in (60.5, -61.0, float("nan"), float("inf")):
        with pytest.raises(ExportError, match=r"layer 7: \|decay\| reaches .*impl='reference'"):
            check_decay(torch.tensor([0.0, bad]), good, layer="layer 7", error=ExportError)
        with pytest.raises(CheckpointError, match=r"layer 7: \|bonus\| reaches"):
            check_decay(good, torch.tensor([0.0, bad]), layer="layer 7", error=CheckpointError)


def test_the_range_is_needed_and_the_reference_does_not_need_it() -> None:
    w, u, k, v = draw(196, 400.0, 1.0)
    assert not bi_wkv(w, u, k, v, impl="prefix").isfinite().all()
    expected = torch.from_numpy(formula(*(x.double().numpy() for x in (w, u, k, v))))
    assert relative_error(bi_wkv(w, u, k, v, impl="reference"), expected) <= 1e-4
