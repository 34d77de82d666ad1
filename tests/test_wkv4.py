"""WKV-4: the reference against the paper's sums, the scan against the reference, both stable."""

import numpy as np
import pytest
import torch

from rwkv_core.errors import ConfigError
from rwkv_core.ops import WKV4State, wkv4, wkv4_step
from rwkv_core.testing import check_op, relative_error


def make_inputs(B, T, D, *, keys=1.0, decay=1.0, state=True, dtype=torch.float32):
    """Return (w, u, k, v[, num, den, max]): k of the given spread, w = -exp of one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [-(decay * normal(D)).exp(), normal(D), keys * normal(B, T, D), normal(B, T, D)]
    if state:
        inputs += [normal(B, D), normal(B, D).exp(), keys * normal(B, D)]
    return [x.to(dtype) for x in inputs]


def run(impl):
    """Return the op as a function of tensors to tensors: y and what the state stands for."""

    def call(w, u, k, v, *state):
        y, (num, den, top) = wkv4(w, u, k, v, WKV4State(*state) if state else None, impl=impl)
        largest = torch.cat(
            [k.detach().flatten(), *(x.detach().flatten() for x in state[2:])]
        ).max()
        scale = (top.double() - largest).exp()
        return y, num * scale, den * scale

    return call


def test_reference_is_the_papers_formula():
    w, u, k, v = (x.numpy() for x in make_inputs(2, 9, 5, state=False, dtype=torch.float64))
    expected = np.empty_like(v)
    for t in range(9):
        weights = [np.exp((t - 1 - i) * w + k[:, i]) for i in range(t)] + [np.exp(u + k[:, t])]
        total = sum(weights)
        expected[:, t] = sum(x * v[:, i] for i, x in enumerate(weights)) / total
    y, state = wkv4(*map(torch.from_numpy, (w, u, k, v)), impl="reference")
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)
    held = sum(np.exp((8 - i) * w + k[:, i]) * v[:, i] for i in range(9))
    np.testing.assert_allclose(state.num_BD * state.max_BD.exp(), held, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("impl", ["reference", "scan"])
def test_gradients_are_finite_differences(impl):
    inputs = [x.requires_grad_() for x in make_inputs(1, 4, 2, dtype=torch.float64)]

    def stands_for(*x):
        y, (num, den, top) = wkv4(*x[:4], WKV4State(*x[4:]), impl=impl)
        return y, num * top.exp(), den * top.exp()

    assert torch.autograd.gradcheck(stands_for, inputs)


@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
@pytest.mark.parametrize("T", [1, 2, 7, 64, 101])
def test_scan_matches_reference(T, state):
    check_op(run("scan"), run("reference"), make_inputs(2, T, 12, state=state))


@pytest.mark.parametrize("state", [True, False], ids=["state", "fresh"])
def test_scan_is_exact_with_huge_keys_and_any_decay(state):
    inputs = make_inputs(1, 300, 16, keys=30.0, decay=2.0, state=state)
    check_op(run("scan"), run("reference"), inputs)


@pytest.mark.parametrize("impl", ["reference", "scan"])
@pytest.mark.parametrize("key", [-200.0, 200.0])
def test_extreme_first_keys_are_no_division_by_zero(impl, key):
    k, v = torch.full((1, 3, 2), key), torch.randn(1, 3, 2)
    y, state = wkv4(torch.tensor([-0.5, -3.0]), torch.zeros(2), k, v, impl=impl)
    torch.testing.assert_close(y[:, 0], v[:, 0])
    assert all(x.isfinite().all() for x in (y, *state))


def test_the_scan_holds_the_same_state_as_the_loop():
    w, u, k, v, *state = make_inputs(2, 37, 8)
    states = [wkv4(w, u, k, v, WKV4State(*state), impl=i).state for i in ("reference", "scan")]
    for a, b in zip(*states, strict=True):
        assert relative_error(b, a) < 2e-6


def test_one_token_is_the_step():
    w, u, k, v, *state = make_inputs(3, 1, 8)
    y, after = wkv4(w, u, k, v, WKV4State(*state))
    y_step, after_step = wkv4_step(w, u, k[:, 0], v[:, 0], WKV4State(*state))
    assert relative_error(y[:, 0], y_step) < 1e-6
    for a, b in zip(after, after_step, strict=True):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize("impl", ["reference", "scan"])
def test_no_tokens_leave_the_state_alone(impl):
    w, u, k, v, *state = make_inputs(2, 0, 8)
    y, after = wkv4(w, u, k, v, WKV4State(*state), impl=impl)
    assert y.shape == (2, 0, 8)
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


@pytest.mark.parametrize("impl", ["reference", "scan"])
def test_dtypes(impl):
    half = [x.bfloat16() for x in make_inputs(1, 20, 8, state=False)]
    y, after = wkv4(*half, impl=impl)
    assert y.dtype == torch.bfloat16
    assert {x.dtype for x in after} == {torch.float32}
    exact, _ = wkv4(*(x.double() for x in half), impl=impl)
    assert relative_error(y, exact) < 2**-8
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = wkv4(*(x.float() for x in half), impl=impl)
    assert relative_error(inside, exact) < 2e-6, "autocast must not reach the recurrence"


def test_misfits_are_named():
    w, u, k, v, *state = make_inputs(1, 5, 4)
    with pytest.raises(ValueError, match=r"v has shape \(1, 4, 4\), expected \(1, 5, 4\)"):
        wkv4(w, u, k, v[:, :4])
    with pytest.raises(ValueError, match=r"w has shape \(3,\), expected \(4,\)"):
        wkv4(w[:3], u, k, v)
    with pytest.raises(ValueError, match=r"state den_BD has shape \(2, 4\), expected \(1, 4\)"):
        wkv4(w, u, k, v, WKV4State(state[0], state[1].repeat(2, 1), state[2]))
    with pytest.raises(ValueError, match="rank 3"):
        wkv4(w, u, k[0], v[0])
    with pytest.raises(ConfigError, match="unknown impl 'scann'; did you mean 'scan'"):
        wkv4(w, u, k, v, impl="scann")
