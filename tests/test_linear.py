"""The product of one token with a matrix: against float64, and who gets it and who F.linear."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from rwkv_core.mixers.base import Linear
from rwkv_core.ops import linear as module
from rwkv_core.ops.linear import linear
from rwkv_core.ops.native import library
from rwkv_core.testing import relative_error

pytestmark = pytest.mark.usefixtures("native_library")

SIZES = [(1, 2), (2, 1), (3, 5), (4, 16), (16, 4), (65, 33), (31, 129), (200, 1000), (97, 768)]
DTYPES = [torch.float32, torch.bfloat16]
Calls = list[tuple[int, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Return a list of the sizes of every product that the native form computes."""
    seen: Calls = []
    bind = module._gemv

    def counted(found: library.Library) -> Callable[..., int]:
        def call(parallel: object, form: int, rows: int, columns: int, *addresses: int) -> int:
            seen.append((rows, columns))
            return bind(found)(parallel, form, rows, columns, *addresses)

        return call

    monkeypatch.setattr(module, "_gemv", counted)
    return seen


def by_columns(weight: Tensor) -> Tensor:
    return weight.mT.contiguous().mT


def make(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return a token, a third of it zeros, and a weight."""
    x = torch.randn(1, 1, columns).mul(torch.rand(columns) > 0.3)
    x[..., 0] = 1.5
    return x.to(dtype), torch.randn(rows, columns).to(dtype)


LAYOUTS = pytest.mark.parametrize("lay", [Tensor.contiguous, by_columns], ids=["rows", "columns"])


@LAYOUTS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_fp32_matches_float64(
    size: tuple[int, int], lay: Callable[[Tensor], Tensor], isa: str, calls: Calls
) -> None:
    x, weight = make(*size)
    assert relative_error(linear(x, lay(weight)), x.double() @ weight.double().mT) <= 2e-6
    assert calls == [size]


@LAYOUTS
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bf16_is_a_rounded_sum_in_fp32(
    size: tuple[int, int], lay: Callable[[Tensor], Tensor], isa: str, calls: Calls
) -> None:
    """One rounding to 8 bits, and those of the longest chain of additions to 24 bits.

    A product of two bf16 numbers is exact in fp32. At least 8 sums are kept, whether of lanes or of
    columns, and put together in at most 18 additions.
    """
    x, weight = make(*size, torch.bfloat16)
    y = linear(x, lay(weight))
    exact = x.double() @ weight.double().mT
    chain = size[1] / 8 + 18
    allowed = 2**-24 * chain * (x.double().abs() @ weight.double().abs().mT)
    allowed = allowed + 2**-8 * exact.abs().log2().floor().exp2()  # half of the last digit
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= allowed).all()
    assert calls == [size]


def test_bf16_rounds_to_nearest_ties_to_even() -> None:
    values = torch.tensor([1.0, 1.00390625, 1.01171875, 3.3895313892515355e38, -1e-40, 0.0])
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    # two exact terms whose sum is the value to be rounded
    high = values.bfloat16()
    low = (values - high.float()).bfloat16()
    weight = torch.stack([high, low], 1)
    for laid in (weight, by_columns(weight)):
        assert torch.equal(linear(x, laid)[0], (high.float() + low.float()).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
def test_numbers_that_are_none(dtype: torch.dtype, lay: Callable[[Tensor], Tensor]) -> None:
    x, weight = make(33, 40, dtype)
    x[..., 3], weight[5, 7], x[..., 7] = 1.0, torch.inf, 2.0
    weight[6, 3], weight[7, 3] = torch.nan, -torch.inf
    y = linear(x, lay(weight))[0, 0]
    assert y[5] == torch.inf
    assert y[6].isnan()
    assert y[7] == -torch.inf
    assert y[torch.arange(33).sub(6).abs() > 1].isfinite().all()
    x[..., 4] = torch.nan
    assert linear(x, lay(weight)).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_of_zeros_are_not_read(dtype: torch.dtype) -> None:
    x, weight = make(33, 40, dtype)
    expected = linear(x, by_columns(weight))
    weight[:, x[0, 0] == 0] = torch.nan
    assert torch.equal(linear(x, by_columns(weight)), expected)
    assert not linear(torch.zeros_like(x), by_columns(weight)).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@LAYOUTS
def test_the_number_of_threads_changes_no_bit(
    dtype: torch.dtype, lay: Callable[[Tensor], Tensor]
) -> None:
    for size in ((1003, 260), (259, 1030)):
        x, weight = make(*size, dtype)
        expected = linear(x, lay(weight))
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear(x, lay(weight)), expected)
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layout_in_memory_does_not_matter(dtype: torch.dtype, calls: Calls) -> None:
    x, weight = make(21, 37, dtype)
    expected = linear(x, weight)
    shifted = torch.cat([weight.flatten()[:1], weight.flatten()])[1:].view_as(weight)
    token = torch.cat([x.flatten()[:1], x.flatten()])[1:].view_as(x)
    assert torch.equal(linear(token, shifted), expected)
    assert torch.equal(linear(torch.stack([x, x], -1)[..., 0], weight), expected)
    assert len(calls) == 3
    # a weight that is neither by rows nor by columns goes to torch
    gaps = torch.stack([weight, weight], -1)[..., 0]
    torch.testing.assert_close(linear(x, gaps), expected)
    assert len(calls) == 3


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (1, 1, 1, 5)], ids=str)
def test_the_result_has_the_shape_of_the_token(shape: tuple[int, ...], calls: Calls) -> None:
    x, weight = torch.randn(shape), torch.randn(3, 5)
    assert linear(x, weight).shape == (*shape[:-1], 3)
    assert len(calls) == 1


def test_nothing_in_and_nothing_out() -> None:
    assert linear(torch.randn(1, 5), torch.empty(0, 5)).shape == (1, 0)
    assert not linear(torch.empty(1, 0), torch.empty(5, 0)).any()


def test_sequences_and_other_dtypes_are_torch_s(calls: Calls) -> None:
    weight = torch.randn(3, 5)
    for x in (torch.randn(1, 2, 5), torch.randn(2, 1, 5), torch.empty(0, 5)):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    for dtype in (torch.float64, torch.float16):
        x = torch.randn(1, 5, dtype=dtype)
        assert torch.equal(linear(x, weight.to(dtype)), F.linear(x, weight.to(dtype)))
    for x, other in ((torch.randn(5, 1), weight), (torch.randn(1, 5).bfloat16(), weight)):
        with pytest.raises(RuntimeError):
            linear(x, other)
    assert linear(torch.randn(1, 5, device="meta"), weight.to("meta")).shape == (1, 3)
    assert not calls


def test_gradients_are_torch_s(calls: Calls) -> None:
    x, weight = torch.randn(1, 5), torch.randn(3, 5)
    for needs in ((True, False), (False, True)):
        leaves = [t.clone().requires_grad_(n) for t, n in zip((x, weight), needs, strict=True)]
        assert linear(*leaves).requires_grad
        assert not calls
        with torch.no_grad():
            assert not linear(*leaves).requires_grad
        assert len(calls) == 1
        calls.clear()
    torch.autograd.gradcheck(linear, (x.double().requires_grad_(), weight.double()))


def test_modes_of_torch_see_plain_operations(calls: Calls) -> None:
    x, weight = torch.randn(1, 5), torch.randn(3, 5)
    plain = F.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    rows = torch.func.vmap(linear, (0, None))(torch.randn(4, 1, 5), weight)
    assert rows.shape == (4, 1, 3)
    _, tangent = torch.func.jvp(lambda x: linear(x, weight), (x,), (x,))
    torch.testing.assert_close(tangent, plain)
    with forward_ad.dual_level():
        y = linear(forward_ad.make_dual(x, x), weight)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, plain)
    with FlopCounterMode(display=False) as counter:
        linear(x, weight)
    assert counter.get_total_flops() == 2 * 3 * 5
    assert not calls
    linear(x, weight)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated")
def test_tracers_see_a_linear_map(calls: Calls) -> None:
    layer, x = Linear(5, 3).requires_grad_(False), torch.randn(1, 1, 5)
    plain = F.linear(x, layer.weight)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), plain)
    for strict in (True, False):
        graph = torch.export.export(layer, (x,), strict=strict).graph
        assert "aten.linear.default" in [str(n.target) for n in graph.nodes]
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert "aten::linear" in str(traced.inlined_graph)
    assert F.linear in [n.target for n in torch.fx.symbolic_trace(layer).graph.nodes]
    assert not calls


def test_without_a_library_it_is_torch_s(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> None:
    monkeypatch.setattr(library, "_found", "not built")
    x, weight = make(33, 40)
    assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert not calls


def test_the_module_is_a_linear_without_bias(calls: Calls) -> None:
    torch.manual_seed(1)
    ours = Linear(40, 33)
    torch.manual_seed(1)
    theirs = nn.Linear(40, 33, bias=False)
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == ["weight"]
    assert torch.equal(ours.weight, theirs.weight)
    for x in (torch.randn(1, 1, 40), torch.randn(2, 7, 40)):
        torch.testing.assert_close(ours(x), theirs(x))
    with torch.inference_mode():
        ours(torch.randn(1, 1, 40))
    assert calls == [(33, 40)]


def test_a_layer_laid_by_columns_keeps_its_values(calls: Calls) -> None:
    layer = Linear(40, 33).requires_grad_(False)
    x, _ = make(33, 40)
    expected, before = layer(x), layer.weight.clone()
    layer.lay_by_columns()
    assert layer.weight.stride() == (1, 33)
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), expected)
    copied = copy.deepcopy(layer)
    copied.load_state_dict({"weight": 2 * before})
    assert copied.weight.stride() == (1, 33)
    torch.testing.assert_close(copied(x), 2 * expected)
    assert calls == 3 * [(33, 40)]


@pytest.mark.parametrize("has_kernels", [True, False])
def test_bf16_of_many_tokens(has_kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch has no kernels for it, the product is taken in fp32 and rounded once."""
    monkeypatch.setattr(module, "_has_bf16_kernels", lambda: has_kernels)
    torch.manual_seed(0)
    x = torch.randn(2, 5, 96).bfloat16().requires_grad_()
    weight = torch.randn(33, 96).bfloat16().requires_grad_()
    exact = x.double() @ weight.double().mT
    for y in (
        linear(x, weight),
        linear(x, weight.mT.contiguous().mT),
        module.product(x, weight.mT),
    ):
        assert y.dtype == torch.bfloat16
        assert ((y - exact).abs() <= exact.abs() / 128 + 1e-2).all()  # torch's sums may be bf16's
        if not has_kernels:
            assert torch.equal(y, (x.float() @ weight.float().mT).bfloat16())
        grads = torch.autograd.grad(y.float().sum(), (x, weight))
        assert all(g.dtype == torch.bfloat16 and g.any() for g in grads)
