"""Bidirectional WKV-6: the reference against NumPy, every other form against the reference."""

import numpy as np
import pytest
import torch
from torch import nn

from rwkv_core.errors import ConfigError
from rwkv_core.ops import bi_wkv6, wkv6
from rwkv_core.ops.bi_wkv6.chunked import BiWKV6Chunked, bi_wkv6_chunked
from rwkv_core.ops.native.library import available
from rwkv_core.testing import check_op, relative_error


def make_inputs(B, T, H, K, V, *, ww=(-6.0, -1.0), dtype=torch.float32):
    """Return (r, w, k, v, u) with w = -exp(ww), ww uniform in the given interval."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low, high = ww
    w = -(low + (high - low) * torch.rand(B, T, H, K, generator=generator).double()).exp()
    inputs = [normal(B, T, H, K), w, normal(B, T, H, K), normal(B, T, H, V), normal(H, K)]
    return [x.to(dtype) for x in inputs]


def reference(r, w, k, v, u):
    # of a lone token the decay is no part of the formula; its gradient is zero, not missing
    return (bi_wkv6(r, w, k, v, u, impl="reference") + 0 * w.sum(),)


def with_adjoint(*inputs):
    return (BiWKV6Chunked.apply(*inputs),)


def plain(*inputs):
    return (bi_wkv6_chunked(*inputs),)


def native(*inputs):
    return (bi_wkv6(*inputs, impl="native"),)


built = pytest.mark.skipif(not available(), reason="the native ops are not built")
every_form = pytest.mark.parametrize(
    "run", [with_adjoint, plain, pytest.param(native, marks=built)]
)


def test_reference_is_the_formula():
    r, w, k, v, u = (x.numpy() for x in make_inputs(2, 9, 2, 4, 6, dtype=torch.float64))
    expected = np.zeros_like(v)
    for n, t, h in np.ndindex(2, 9, 2):
        for i in range(9):
            between = w[n, min(i, t) + 1 : max(i, t), h].sum(0)
            weight = u[h] if i == t else np.exp(between)
            expected[n, t, h] += (r[n, t, h] * weight * k[n, i, h]).sum() * v[n, i, h]
    (y,) = reference(*map(torch.from_numpy, (r, w, k, v, u)))
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_finite_differences():
    inputs = [x.requires_grad_() for x in make_inputs(1, 4, 1, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(reference, inputs)


def test_adjoint_passes_gradcheck():
    inputs = [x.requires_grad_() for x in make_inputs(1, 7, 2, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(with_adjoint, inputs)


@every_form
@pytest.mark.parametrize("T", [1, 2, 7, 16, 17, 64, 101, 131, 257])
def test_chunked_matches_reference(run, T):
    check_op(run, reference, make_inputs(2, T, 3, 8, 12))


@every_form
@pytest.mark.parametrize("ww", [(-8, 2), (-8, 4), (3, 4), (-8, 12)], ids=str)
def test_chunked_is_exact_at_any_decay(run, ww):
    """From hardly any fading to e^-160000 in one token, where products of factors overflow."""
    check_op(run, reference, make_inputs(1, 200, 2, 16, 24, ww=ww))


@every_form
def test_one_strong_decay_does_not_blur_the_tokens_around_it(run):
    """Differences of large sums would lose every digit of the small decays beside it."""
    inputs = make_inputs(1, 150, 1, 8, 8, ww=(-5, -4))
    inputs[1][:, [3, 75]] = -1e6
    check_op(run, reference, inputs)


def test_is_two_causal_sweeps_that_count_the_token_once():
    r, w, k, v, u = make_inputs(2, 33, 2, 4, 6, dtype=torch.float64)
    past = wkv6(r, w, k, v, u).y_BTHV
    future = wkv6(*(x.flip(1) for x in (r, w, k, v)), torch.zeros_like(u)).y_BTHV.flip(1)
    assert relative_error(bi_wkv6(r, w, k, v, u), past + future) <= 1e-12


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_every_token_sees_every_token_and_reading_backwards_gives_the_same(impl):
    r, w, k, v, u = make_inputs(1, 9, 1, 4, 6, dtype=torch.float64)
    y = bi_wkv6(r, w, k, v, u, impl=impl)
    back = bi_wkv6(*(x.flip(1) for x in (r, w, k, v)), u, impl=impl).flip(1)
    assert relative_error(back, y) <= 1e-12
    for changed, seen in ((-1, 0), (0, -1)):
        v2 = v.clone()
        v2[:, changed] += 1
        difference = bi_wkv6(r, w, k, v2, u, impl=impl) - y
        assert difference[:, seen].abs().min() > 1e-4


def test_adjoint_keeps_the_inputs_alone():
    inputs = [x.requires_grad_() for x in make_inputs(1, 50, 2, 8, 8)]
    seen = set()
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda x: seen.add(x.untyped_storage().data_ptr()), lambda x: x
    )
    with hooks:
        y = bi_wkv6(*inputs, impl="chunked")
    assert y.grad_fn is not None
    assert seen == {x.untyped_storage().data_ptr() for x in inputs}


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_dtypes_and_autocast(impl):
    half = [x.bfloat16() for x in make_inputs(1, 20, 2, 4, 6)]
    y = bi_wkv6(*half, impl=impl)
    assert y.dtype == torch.bfloat16
    exact = bi_wkv6(*(x.double() for x in half), impl=impl)
    assert relative_error(y, exact) < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        inside = bi_wkv6(*(x.float() for x in half), impl=impl)
    assert relative_error(inside, exact) < 2e-6, "autocast must not reach the recurrence"


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("shape", [(2, 0, 2), (0, 5, 2)], ids=["no token", "no sequence"])
def test_nothing_in_nothing_out(impl, shape):
    inputs = [x.requires_grad_() for x in make_inputs(*shape, 4, 6)]
    y = bi_wkv6(*inputs, impl=impl)
    assert y.shape == (*shape, 6)
    y.sum().backward()


class Op(nn.Module):
    def forward(self, r, w, k, v, u):
        return bi_wkv6(r, w, k, v, u)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    inputs = [x.requires_grad_() for x in make_inputs(1, 21, 2, 4, 6)]
    compiled = torch.compile(Op(), fullgraph=True, backend="aot_eager")
    y, expected = compiled(*inputs), Op()(*inputs)
    assert relative_error(y, expected) <= 2e-6
    weight = torch.randn_like(y)
    ours, truth = (torch.autograd.grad((x * weight).sum(), inputs) for x in (y, expected))
    for a, b in zip(ours, truth, strict=True):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_free_batch_and_length(strict):
    torch._dynamo.reset()
    free = {0: torch.export.Dim("B", min=1), 1: torch.export.Dim("T", min=1)}
    inputs = tuple(make_inputs(2, 17, 2, 4, 6))
    with torch.no_grad():
        program = torch.export.export(
            Op(), inputs, dynamic_shapes=(free, free, free, free, None), strict=strict
        )
    for B, T in ((1, 1), (3, 40), (1, 130)):
        inputs = make_inputs(B, T, 2, 4, 6)
        assert relative_error(program.module()(*inputs), bi_wkv6(*inputs)) <= 2e-6


def test_misfits_are_named():
    r, w, k, v, u = make_inputs(1, 5, 2, 4, 6)
    with pytest.raises(ValueError, match=r"k has shape \(1, 4, 2, 4\), expected \(1, 5, 2, 4\)"):
        bi_wkv6(r, w, k[:, :4], v, u)
    with pytest.raises(ValueError, match=r"u has shape \(2,\), expected \(2, 4\)"):
        bi_wkv6(r, w, k, v, u[:, 0])
    with pytest.raises(ConfigError, match="bi_wkv6: unknown impl 'chunk'; did you mean 'chunked'"):
        bi_wkv6(r, w, k, v, u, impl="chunk")
