"""WKV-7: the reference against NumPy, the chunked form against the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkv_core.errors import ConfigError
from rwkv_core.ops import wkv7, wkv7_step
from rwkv_core.testing import check_op, relative_error

FLOOR = -float(np.exp(-0.5))


def make_inputs(
    B, T, H, K, V, *, repeated_keys=False, at_floor=False, state=True, dtype=torch.float32
):
    """Return (r, w, k, v, a, b[, state]) as RWKV-7 makes them: unit keys, bounded decays."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    keys = normal(B, 1, H, K).expand(B, T, H, K) if repeated_keys else normal(B, T, H, K)
    keys = F.normalize(keys, dim=-1)
    w = FLOOR * (torch.ones(B, T, H, K) if at_floor else torch.sigmoid(2 * normal(B, T, H, K)))
    rate = torch.sigmoid(3 * normal(B, T, H, K))
    inputs = [normal(B, T, H, K), w, normal(B, T, H, K), normal(B, T, H, V), -keys, keys * rate]
    return [x.to(dtype) for x in inputs + ([normal(B, H, K, V)] if state else [])]


def reference(*inputs):
    return wkv7(*inputs, impl="reference")


def chunked(*inputs):
    return wkv7(*inputs, impl="chunked")


def test_reference_is_the_papers_formula():
    # the paper writes the state V×K and one matrix per token
    inputs = [x.numpy() for x in make_inputs(2, 9, 2, 4, 6, dtype=torch.float64)]
    r, w, k, v, a, b, state = inputs
    expected = np.empty_like(v)
    S = state.transpose(0, 1, 3, 2).copy()
    for i in np.ndindex(2, 2):
        n, h = i
        for t in range(9):
            transition = np.diag(np.exp(w[n, t, h])) + np.outer(a[n, t, h], b[n, t, h])
            S[i] = S[i] @ transition + np.outer(v[n, t, h], k[n, t, h])
            expected[n, t, h] = S[i] @ r[n, t, h]
    y, after = reference(*map(torch.from_numpy, inputs))
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(after, S.transpose(0, 1, 3, 2), rtol=1e-12, atol=1e-12)


def test_reference_gradients_are_finite_differences():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 1, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: tuple(reference(*x)), inputs)


@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
@pytest.mark.parametrize("T", [1, 7, 31, 32, 33, 63, 101])
def test_chunked_matches_reference(T, state):
    check_op(chunked, reference, make_inputs(2, T, 3, 8, 12, state=state))


@pytest.mark.parametrize("at_floor", [True, False], ids=["floor", "spread"])
@pytest.mark.parametrize("repeated_keys", [True, False], ids=["repeated", "distinct"])
def test_chunked_is_exact_over_2048_tokens(repeated_keys, at_floor):
    inputs = make_inputs(1, 2048, 2, 16, 24, repeated_keys=repeated_keys, at_floor=at_floor)
    check_op(chunked, reference, inputs, output_bound=2e-6, gradient_bound=1e-5)


def test_one_token_is_the_step():
    inputs = make_inputs(2, 1, 3, 4, 6, dtype=torch.float64)
    *rows, state = inputs
    y_step, after_step = wkv7_step(*(x[:, 0, :, None] for x in rows), state)
    for impl in ("reference", "chunked"):
        y, after = wkv7(*inputs, impl=impl)
        assert relative_error(y[:, 0], y_step[:, :, 0]) < 1e-14
        assert relative_error(after, after_step) < 1e-14


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_no_tokens_leave_the_state_alone(impl):
    *inputs, state = make_inputs(2, 0, 3, 4, 6)
    y, after = wkv7(*inputs, state, impl=impl)
    assert y.shape == (2, 0, 3, 6)
    assert torch.equal(after, state)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_state_is_fp32_for_half_precision_and_under_autocast(impl):
    inputs = make_inputs(1, 40, 2, 4, 4, state=False)
    half = [x.bfloat16() for x in inputs]
    y, after = wkv7(*half, impl=impl)
    assert (y.dtype, after.dtype) == (torch.bfloat16, torch.float32)
    # only the inputs' rounding may show, not bf16 arithmetic
    exact, _ = wkv7(*(x.float() for x in half), impl=impl)
    assert torch.equal(y, exact.bfloat16())
    plain, _ = wkv7(*inputs, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        same, _ = wkv7(*inputs, impl=impl)
    assert torch.equal(same, plain)


def test_wrong_shapes_are_named():
    *inputs, state = make_inputs(1, 5, 2, 4, 6)
    with pytest.raises(ValueError, match=r"k has shape \(1, 4, 2, 4\), expected \(1, 5, 2, 4\)"):
        wkv7(*inputs[:2], inputs[2][:, :4], *inputs[3:])
    with pytest.raises(ValueError, match=r"v has shape"):
        wkv7(*inputs[:3], inputs[3][:, :, :1], *inputs[4:])
    with pytest.raises(
        ValueError, match=r"state has shape \(1, 2, 6, 4\), expected \(1, 2, 4, 6\)"
    ):
        wkv7(*inputs, state.mT)
    with pytest.raises(ValueError, match="rank 4"):
        wkv7(*(x[0] for x in inputs))


def test_unknown_implementation_is_refused():
    with pytest.raises(ConfigError, match="unknown impl 'chunk'; did you mean 'chunked'"):
        wkv7(*make_inputs(1, 2, 1, 2, 2), impl="chunk")
