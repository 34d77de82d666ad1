"""WKV-6: the reference against NumPy, the chunked form against the reference at any decay."""

import numpy as np
import pytest
import torch

from rwkv_core.errors import ConfigError
from rwkv_core.ops import _chunks, wkv6, wkv6_step
from rwkv_core.ops.wkv6.chunked import wkv6_chunked
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


def plain(*inputs):
    """Run the operations that eager code does not."""
    r, v = inputs[0], inputs[3]
    if len(inputs) == 5:
        inputs = (*inputs, r.new_zeros(r.shape[0], r.shape[2], r.shape[3], v.shape[3]))
    return wkv6_chunked(*inputs)


@pytest.fixture(params=["adjoint", "segments", "plain"])
def form(request, monkeypatch):
    """Return the chunked form: with its own adjoint, cut into many segments, and what is traced."""
    if request.param == "segments":
        monkeypatch.setattr(_chunks, "SEGMENT", 1)
    return plain if request.param == "plain" else chunked


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
def test_chunked_matches_reference(T, state, form):
    inputs = make_inputs(2, T, 3, 8, 12, state=state)
    check_op(form, reference, inputs, gradient_bound=2e-6)


@pytest.mark.parametrize("static", [True, False], ids=["static", "per-token"])
@pytest.mark.parametrize("ww", [(-9, -8), (-6, -1), (-8, 2), (-8, 4), (3, 4), (-8, 12)], ids=str)
def test_chunked_is_exact_at_any_decay(ww, static, form):
    """From hardly any fading to e^-160000 in one token, where products of factors overflow."""
    inputs = make_inputs(1, 300, 2, 16, 24, ww=ww, static=static)
    check_op(form, reference, inputs, gradient_bound=2e-6)


def test_chunked_is_exact_over_2048_tokens():
    inputs = make_inputs(1, 2048, 2, 16, 24, ww=(-9, 2))
    check_op(chunked, reference, inputs, gradient_bound=2e-6)


def test_the_gradient_of_a_strong_decay_keeps_its_digits(form):
    """Each is e^-8 of the others and more; what cancels would leave nothing of it."""
    inputs = make_inputs(1, 70, 1, 8, 8)
    inputs[1].fill_(-8.0)
    check_op(form, reference, inputs, gradient_bound=2e-6)


def test_one_strong_decay_does_not_blur_the_tokens_after_it(form):
    """Differences of large sums would lose every digit of the small decays that follow."""
    for token in range(3, 11):
        r, w, k, v, u, state = make_inputs(1, 64, 1, 8, 8, ww=(-5, -4))
        w[:, token] = -1e6
        check_op(form, reference, (r, w, k, v, u, state), gradient_bound=2e-6)


def gradients(run, inputs):
    """Return the gradients of a weighted sum of both outputs for the inputs that require one."""
    outputs = run(*inputs)
    weights = [torch.cos(torch.arange(x.numel()).to(x.dtype)).view(x.shape) for x in outputs]
    total = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, [x for x in inputs if x.requires_grad])


def test_eager_code_uses_the_adjoint():
    inputs = [x.requires_grad_() for x in make_inputs(1, 5, 1, 4, 6)]
    assert "WKV6Chunked" in chunked(*inputs)[1].grad_fn.name()
    with torch.no_grad():
        assert chunked(*inputs)[0].grad_fn is None


@pytest.mark.parametrize("only", range(6))
def test_gradients_of_some_inputs_alone(only, form):
    inputs = make_inputs(2, 70, 2, 4, 6, dtype=torch.float64)
    everything = gradients(reference, [x.clone().requires_grad_() for x in inputs])
    inputs[only].requires_grad_()
    (grad,) = gradients(form, inputs)
    assert relative_error(grad, everything[only]) < 1e-13


def test_gradients_can_be_differentiated_again():
    inputs = [x.requires_grad_() for x in make_inputs(1, 3, 1, 2, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: tuple(chunked(*x)), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: tuple(chunked(*x)), inputs)
    inputs[0].requires_grad_(False)
    assert torch.autograd.gradgradcheck(lambda *x: tuple(chunked(*x)), inputs)


def test_backward_under_autocast_computes_in_fp32():
    inputs = [x.requires_grad_() for x in make_inputs(1, 40, 2, 8, 8)]
    expected = gradients(chunked, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        for grad, truth in zip(gradients(chunked, inputs), expected, strict=True):
            assert torch.equal(grad, truth)


def test_adjoint_keeps_few_tensors_for_the_backward_pass():
    inputs = [x.requires_grad_() for x in make_inputs(1, 512, 2, 32, 32)]
    kept = {}
    for run in (chunked, plain):
        seen = {}

        def note(x, seen=seen):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            outputs = run(*inputs)
        kept[run] = sum(seen.values()) / inputs[0].nbytes
        del outputs
    # r w k v, A of 64 by 64 and a state every 64 tokens, the first and u
    assert kept[chunked] <= 6.7
    assert kept[plain] >= 2 * kept[chunked]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_is_traced_holds_plain_operations():
    inputs = [x.requires_grad_() for x in make_inputs(2, 7, 2, 4, 6, dtype=torch.float64)]
    expected, grads = chunked(*inputs), gradients(chunked, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(chunked, fullgraph=True, backend="eager")
    for ours, truth in zip(gradients(compiled, inputs), grads, strict=True):
        assert relative_error(ours, truth) < 1e-13

    class Op(torch.nn.Module):
        def forward(self, *x):
            return chunked(*x)

    frozen = tuple(x.detach() for x in inputs)
    with torch.no_grad():
        exported = torch.export.export(Op(), frozen, strict=True)
        traced = torch.jit.trace(chunked, frozen, check_trace=False)
    modules = [m for m in exported.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    nodes = [n for m in modules for n in m.graph.nodes if n.op == "call_function"]
    known = ("aten.", "wrap_with_autocast", "<built-in function getitem")
    assert [str(n.target) for n in nodes if not str(n.target).startswith(known)] == []
    assert "PythonOp" not in str(traced.graph)
    for run in (exported.module(), traced):
        assert relative_error(run(*frozen)[0], expected[0]) < 1e-13


def test_functorch_transforms_see_plain_operations():
    inputs = make_inputs(2, 5, 2, 4, 6, dtype=torch.float64)

    def total(*x):
        return sum(y.square().sum() for y in chunked(*x))

    with_grad = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(total(*with_grad), with_grad)
    every = tuple(range(len(inputs)))
    for ours, truth in zip(torch.func.grad(total, every)(*inputs), expected, strict=True):
        assert relative_error(ours, truth) < 1e-13
    _, tangent = torch.func.jvp(total, tuple(inputs), tuple(inputs))
    exact = sum((x * g).sum() for x, g in zip(inputs, expected, strict=True))
    assert relative_error(tangent, exact) < 1e-12
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(x, x) for x in inputs]
        tangent = torch.autograd.forward_ad.unpack_dual(total(*duals)).tangent
    assert relative_error(tangent, exact) < 1e-12
    batch = [torch.stack([x, x + 0.01]) for x in inputs]
    mapped, _ = torch.func.vmap(chunked)(*batch)
    assert relative_error(mapped[1], chunked(*(x[1] for x in batch))[0]) < 1e-13


@pytest.mark.parametrize(("B", "T"), [(0, 5), (0, 70), (2, 0), (0, 0)])
def test_nothing_to_do_is_done(B, T, form):
    check_op(form, reference, make_inputs(B, T, 2, 4, 6))


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
