"""Bidirectional WKV tile by tile: equal to the whole, outputs and gradients, however it is cut."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rwkv_core.ops import bi_wkv
from rwkv_core.ops.bi_wkv.reference import bi_wkv_reference
from rwkv_core.ops.bi_wkv.tiles import Summary, bi_wkv_tile, summarise
from rwkv_core.ops.native.library import available
from rwkv_core.testing import check_op, relative_error


def draw(T: int, decay: float, spread: float, C: int = 6) -> list[Tensor]:
    w_C = torch.linspace(-decay, decay, C)
    return [w_C, torch.randn(C), spread * torch.randn(2, T, C), torch.randn(2, T, C)]


def tiled(inputs: Sequence[Tensor], tile: int, impl: str = "prefix") -> Tensor:
    """Return the op's output over tiles of so many tokens, the last one shorter."""
    w, u, k, v = inputs
    T = k.shape[1]
    cuts = [(i, min(i + tile, T)) for i in range(0, T, tile)]
    after, afterwards = None, []
    for i, j in reversed(cuts):
        afterwards.append(after)
        after = summarise(w, k[:, i:j].flip(1), v[:, i:j].flip(1), after, length=T)
    before, outputs = None, []
    for i, j in cuts:
        part = k[:, i:j], v[:, i:j]
        y = bi_wkv_tile(w, u, *part, before, afterwards.pop(), length=T, impl=impl)
        before = summarise(w, *part, before, length=T)
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("decay", [3.0, 60.0])
@pytest.mark.parametrize(
    ("T", "tile"), [(1, 1), (7, 3), (64, 16), (31, 1), (197, 64), (197, 196), (197, 300)]
)
def test_tiles_match_the_reference_outputs_and_gradients(T: int, tile: int, decay: float) -> None:
    for spread in (1.0, 8.0):
        inputs = draw(T, decay, spread)
        exact = [x.double() for x in inputs]
        truth = bi_wkv_reference(*exact)
        # keys of up to 30 are rounded once more in every state: half a unit in the last place, 1e-6
        assert relative_error(tiled(inputs, tile), truth) <= 4e-6
        check_op(
            lambda *x, tile=tile: (tiled(x, tile),),
            lambda *x: (bi_wkv_reference(*x) + 0 * x[0],),  # which one token does without
            exact,
            output_bound=1e-12,
            gradient_bound=1e-10,
        )


@pytest.mark.parametrize("decay", [60.0, 400.0])
@pytest.mark.parametrize("impl", ["native", "prefix", "reference"])
def test_any_implementation_runs_a_tile(impl: str, decay: float) -> None:
    if impl == "native" and not available():
        pytest.skip("native ops are not built")
    inputs = draw(211, decay, 3.0)
    truth = bi_wkv_reference(*(x.double() for x in inputs))
    # a tile's share of a decay of 400 is within the range of prefix sums, which the whole is not
    assert relative_error(tiled(inputs, 20, impl), truth) <= 1e-5


def test_error_does_not_grow_with_the_number_of_tiles() -> None:
    inputs = draw(5000, 20.0, 2.0, C=2)
    truth = bi_wkv(*(x.double() for x in inputs), impl="prefix")
    assert relative_error(tiled(inputs, 5), truth) <= 2e-6


def test_a_summary_is_a_token() -> None:
    w, _, k, v = (x.double() for x in draw(9, 5.0, 1.0))
    seen = summarise(w, k[:, :6], v[:, :6], length=9)
    assert seen.k_BC.shape == seen.v_BC.shape == (2, 6)
    # halves are joined as they are when read in one go
    half = summarise(w, k[:, :2], v[:, :2], length=9)
    both = summarise(w, k[:, 2:6], v[:, 2:6], half, length=9)
    for a, b in zip(both, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # and a token that comes next sees but this one
    alone = summarise(w, seen.k_BC[:, None], seen.v_BC[:, None], length=9)
    for a, b in zip(alone, seen, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_fp32_or_fp64_and_returns_the_values_dtype(dtype: torch.dtype) -> None:
    w, u, k, v = draw(40, 20.0, 2.0)
    inputs = (w, u, k.to(dtype), v.to(dtype))
    with torch.autocast("cpu", torch.float16 if dtype == torch.float16 else torch.bfloat16):
        y = tiled(inputs, 7)
    assert y.dtype == dtype
    truth = bi_wkv_reference(*(x.double() for x in inputs))
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}[dtype]
    assert relative_error(y, truth) <= bound


def test_a_tile_longer_than_the_sequence_is_refused() -> None:
    w, u, k, v = draw(5, 1.0, 1.0)
    with pytest.raises(ValueError, match="a tile of 5 tokens is longer than the sequence of 4"):
        summarise(w, k, v, length=4)
    with pytest.raises(ValueError, match="a tile of 5 tokens"):
        bi_wkv_tile(w, u, k, v, None, Summary(k[:, 0], v[:, 0]), length=4)
