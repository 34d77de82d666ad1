"""WKV-7: the reference against NumPy, the chunked form against the reference."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkv_core.errors import ConfigError
from rwkv_core.ops import _chunks, wkv7, wkv7_step
from rwkv_core.ops.wkv7.chunked import wkv7_chunked
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


def plain(*inputs):
    """Run the operations that eager code does not."""
    r, v = inputs[0], inputs[3]
    if len(inputs) == 6:
        inputs = (*inputs, r.new_zeros(r.shape[0], r.shape[2], r.shape[3], v.shape[3]))
    return wkv7_chunked(*inputs)


@pytest.fixture(params=["adjoint", "segments", "plain"])
def form(request, monkeypatch):
    """Return the chunked form: with its own adjoint, cut into many segments, and what is traced."""
    if request.param == "segments":
        monkeypatch.setattr(_chunks, "SEGMENT", 1)
    return plain if request.param == "plain" else chunked


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
def test_chunked_matches_reference(T, state, form):
    for at_floor in (True, False):
        inputs = make_inputs(2, T, 3, 8, 12, state=state, at_floor=at_floor)
        check_op(form, reference, inputs, gradient_bound=2e-6)


@pytest.mark.parametrize("at_floor", [True, False], ids=["floor", "spread"])
@pytest.mark.parametrize("repeated_keys", [True, False], ids=["repeated", "distinct"])
def test_chunked_is_exact_over_2048_tokens(repeated_keys, at_floor):
    inputs = make_inputs(1, 2048, 2, 16, 24, repeated_keys=repeated_keys, at_floor=at_floor)
    check_op(chunked, reference, inputs, gradient_bound=2e-6)
    for ours, traced in zip(chunked(*inputs), plain(*inputs), strict=True):
        assert relative_error(ours, traced) < 1e-6


@pytest.mark.parametrize("w", [0.0, -1e-4, -2.0, -5.0])
def test_chunked_overflows_nowhere_in_its_range(w, form):
    """The products of tokens that do not see each other would be e^150; they must not be formed."""
    inputs = make_inputs(1, 70, 2, 64, 64)
    inputs[1].fill_(w)
    check_op(form, reference, inputs, gradient_bound=5e-5)


def gradients(run, inputs):
    """Return the gradients of a weighted sum of both outputs for the inputs that require one."""
    outputs = run(*inputs)
    weights = [torch.cos(torch.arange(x.numel()).to(x.dtype)).view(x.shape) for x in outputs]
    total = sum((x * weight).sum() for x, weight in zip(outputs, weights, strict=True))
    return torch.autograd.grad(total, [x for x in inputs if x.requires_grad])


def test_eager_code_uses_the_adjoint():
    inputs = [x.requires_grad_() for x in make_inputs(1, 5, 1, 4, 6)]
    assert "WKV7Chunked" in chunked(*inputs)[1].grad_fn.name()
    with torch.no_grad():
        assert chunked(*inputs)[0].grad_fn is None


@pytest.mark.parametrize("only", range(7))
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
    # r w k v a b, what was found, a state every 32 tokens, and the first
    assert kept[chunked] <= 8.2
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
