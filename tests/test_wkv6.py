"""WKV-6: the reference against NumPy, the chunked form against the reference at any decay."""

import numpy as np
import pytest
import torch

from rwkv_core.errors import ConfigError
from rwkv_core.ops import wkv6, wkv6_step
from rwkv_core.testing import check_op, relative_error


def make_inputs(B, T, H, K, V, *, ww=(-6.0, -1.0), state=True, static=False, dtype=torch.float32):
    """Return (r, w, k, v, u[, state]) with w = -exp(ww), ww uniform in the given interval."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    low, high = ww
    raw = low + (high - low) * torch.rand(B, T, H, K, generator=generator, dtype=torch.float64)
    w = -raw[:, :1].exp().expand(B, T, H, K) if static else -raw.exp()
    inputs = [normal(B, T, H, K), w, normal(B, T, H, K), normal(B, T, H, V), normal(H, K)]
    return [x.to(dtype) for x in inputs + ([normal(B, H, K, V)] if state else [])]


def reference(*inputs):
    return wkv6(*inputs, impl="reference")


def chunked(*inputs):
    return wkv6(*inputs, impl="chunked")


def test_reference_is_the_papers_formula():
    # the closed form of the paper: every earlier token, faded by the decays strictly between
    r, w, k, v, u, state = (x.numpy() for x in make_inputs(2, 9, 2, 4, 6, dtype=torch.float64))
    expected, last = np.zeros_like(v), np.zeros_like(state)
    for n, h in np.ndindex(2, 2):
        for t in range(10):
            memory = np.diag(np.exp(w[n, :t, h].sum(0))) @ state[n, h]
            for i in range(t):
                faded = np.exp(w[n, i + 1 : t, h].sum(0)) * k[n, i, h]
                memory = memory + np.outer(faded, v[n, i, h])
            if t == 9:
                last[n, h] = memory
            else:
                now = np.outer(u[h] * k[n, t, h], v[n, t, h])
                expected[n, t, h] = r[n, t, h] @ (memory + now)
    y, after = reference(*map(torch.from_numpy, (r, w, k, v, u, state)))
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(after, last, rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_finite_differences():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 1, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: tuple(reference(*x)), inputs)


@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
@pytest.mark.parametrize("T", [1, 7, 16, 17, 64, 101, 131])
def test_chunked_matches_reference(T, state):
    check_op(chunked, reference, make_inputs(2, T, 3, 8, 12, state=state))


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-token"])
@pytest.mark.parametrize("ww", [(-6, -1), (-8, 2), (-8, 4), (3, 4), (-8, 12)], ids=str)
def test_chunked_is_exact_at_any_decay(ww, static):
    """From hardly any fading to e^-160000 in one token, where products of factors overflow."""
    check_op(chunked, reference, make_inputs(1, 300, 2, 16, 24, ww=ww, static=static))


def test_one_strong_decay_does_not_blur_the_tokens_after_it():
    """Differences of large sums would lose every digit of the small decays that follow."""
    r, w, k, v, u, state = make_inputs(1, 64, 1, 8, 8, ww=(-5, -4))
    w[:, 3] = -1e6
    check_op(chunked, reference, (r, w, k, v, u, state))


def test_one_token_is_the_step():
    r, w, k, v, u, state = make_inputs(3, 1, 2, 4, 6)
    y, after = wkv6(r, w, k, v, u, state)
    rows = (x[:, 0, :, None] for x in (r, w, k, v))
    y_step, after_step = wkv6_step(*rows, u[:, None], state)
    assert relative_error(y[:, 0], y_step.squeeze(-2)) < 1e-6
    assert relative_error(after, after_step) < 1e-6


@pytest.mark.parametrize("run", [reference, chunked])
def test_no_tokens_leave_the_state_alone(run):
    inputs = make_inputs(2, 0, 2, 4, 6)
    y, after = run(*inputs)
    assert y.shape == (2, 0, 2, 6)
    assert torch.equal(after, inputs[-1])


@pytest.mark.parametrize("run", [reference, chunked])
def test_dtypes(run):
    half = [x.bfloat16() for x in make_inputs(1, 20, 2, 4, 6, state=False)]
    y, after = run(*half)
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    exact, _ = run(*(x.double() for x in half))
    assert relative_error(y, exact) < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = run(*(x.float() for x in half))
    assert relative_error(inside, exact) < 2e-6, "autocast must not reach the recurrence"


def test_misfits_are_named():
    r, w, k, v, u, state = make_inputs(1, 5, 2, 4, 6)
    with pytest.raises(ValueError, match=r"k has shape \(1, 4, 2, 4\), expected \(1, 5, 2, 4\)"):
        wkv6(r, w, k[:, :4], v, u)
    with pytest.raises(ValueError, match=r"u has shape \(2,\), expected \(2, 4\)"):
        wkv6(r, w, k, v, u[:, 0])
    with pytest.raises(
        ValueError, match=r"state has shape \(1, 2, 6, 4\), expected \(1, 2, 4, 6\)"
    ):
        wkv6(r, w, k, v, u, state.mT)
    with pytest.raises(ConfigError, match="unknown impl 'chunk'; did you mean 'chunked'"):
        wkv6(r, w, k, v, u, impl="chunk")
