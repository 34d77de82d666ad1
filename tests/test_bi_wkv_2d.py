"""Bidirectional WKV of a plane: the formula in float64, prefix sums against it, what traces it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rwkv_core.ops import bi_wkv, bi_wkv_2d
from rwkv_core.ops.bi_wkv import MAX_DECAY
from rwkv_core.ops.bi_wkv_2d.prefix import bi_wkv_2d_prefix
from rwkv_core.ops.bi_wkv_2d.reference import bi_wkv_2d_reference
from rwkv_core.testing import check_op, relative_error

GRIDS = [(1, 1), (1, 7), (13, 1), (4, 6), (14, 14), (23, 9)]


def draw(H: int, W: int, decay: float, spread: float, C: int = 6) -> list[Tensor]:
    """Return decays whose sum of sizes is ``decay``, in every share and sign, and u, k, v."""
    w_x_C = decay * torch.tensor([1.0, -1.0, 0.5, -0.5, 0.2, 0.0])[:C]
    w_y_C = decay * torch.tensor([0.0, 0.0, 0.5, 0.5, -0.8, -1.0])[:C]
    k_BHWC = spread * torch.randn(2, H, W, C)
    return [w_x_C, w_y_C, torch.randn(C), k_BHWC, torch.randn(2, H, W, C)]


def formula(w_x: float, w_y: float, u: float, k_HW: np.ndarray, v_HW: np.ndarray) -> np.ndarray:
    """Return y of one channel by the definition."""
    H, W = k_HW.shape
    y_HW = np.empty((H, W))
    for y, x in np.ndindex(H, W):
        weight_HW = np.empty((H, W))
        for i, j in np.ndindex(H, W):
            weight_HW[i, j] = np.exp(-(abs(x - j) * w_x / W + abs(y - i) * w_y / H) + k_HW[i, j])
        weight_HW[y, x] = np.exp(u / (H * W) + k_HW[y, x])
        y_HW[y, x] = (weight_HW * v_HW).sum() / weight_HW.sum()
    return y_HW


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (6, 2)])
def test_reference_is_the_formula(grid: tuple[int, int]) -> None:
    inputs = [x.double() for x in draw(*grid, 100.0, 2.0)]
    y_BHWC = bi_wkv_2d_reference(*inputs).numpy()
    w_x, w_y, u, k, v = (x.numpy() for x in inputs)
    for b, c in np.ndindex(2, 6):
        expected = formula(w_x[c], w_y[c], u[c], k[b, ..., c], v[b, ..., c])
        np.testing.assert_allclose(y_BHWC[b, ..., c], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("decay", [3.0, 20.0, MAX_DECAY])
@pytest.mark.parametrize("grid", GRIDS)
def test_prefix_matches_the_reference_outputs_and_gradients(
    grid: tuple[int, int], decay: float
) -> None:
    for spread in (1.0, 8.0):
        inputs = draw(*grid, decay, spread)
        exact = [x.double() for x in inputs]
        truth = bi_wkv_2d_reference(*exact)
        y = bi_wkv_2d(*inputs)
        assert y.isfinite().all()
        assert relative_error(y, truth) <= 2e-6
        check_op(
            lambda *x: (bi_wkv_2d(*x, impl="prefix"),),
            lambda *x: (bi_wkv_2d(*x, impl="reference"),),
            exact,
            output_bound=1e-12,
            gradient_bound=1e-10,
        )


def test_prefix_is_exact_over_64_by_64_patches() -> None:
    inputs = draw(64, 64, MAX_DECAY, 2.0)
    w_x, w_y, u, k, v = (x.double() for x in inputs)
    y = bi_wkv_2d(*inputs)
    # four patches by the definition; all of them take too long
    rows, columns = torch.arange(64)[:, None, None], torch.arange(64)[:, None]
    for i, j in ((0, 0), (63, 5), (31, 40), (17, 63)):
        dy, dx = abs(rows - i), abs(columns - j)
        score = k - dx * w_x / 64 - dy * w_y / 64 + torch.where(dx + dy == 0, u / 64**2, 0)
        truth = (score.flatten(1, 2).softmax(1) * v.flatten(1, 2)).sum(1)
        assert (y[:, i, j] - truth).abs().max() <= 2e-6 * v.abs().max()


def test_gradients_pass_gradcheck() -> None:
    inputs = [x.requires_grad_() for x in (x.double() for x in draw(3, 2, 9.0, 1.0, C=3))]
    assert torch.autograd.gradcheck(bi_wkv_2d_prefix, inputs)


def test_one_row_is_the_op_in_one_dimension() -> None:
    w_x, w_y, u, k, v = (x.double() for x in draw(1, 11, 8.0, 1.0))
    row = bi_wkv(w_x, u + w_x, k[:, 0], v[:, 0], impl="reference")
    torch.testing.assert_close(bi_wkv_2d(w_x, w_y, u, k, v)[:, 0], row, rtol=0, atol=1e-12)
    column = bi_wkv_2d(w_y, w_x, u, k.transpose(1, 2), v.transpose(1, 2))
    torch.testing.assert_close(column[:, :, 0], row, rtol=0, atol=1e-12)


def test_distance_counts_in_the_plane_whichever_way_it_is_read() -> None:
    w_x, w_y, u, k, v = (x.double() for x in draw(4, 6, 12.0, 1.0))
    y = bi_wkv_2d(w_x, w_y, u, k, v)
    turned = bi_wkv_2d(w_y, w_x, u, k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(turned, y, rtol=0, atol=1e-12)
    for axes in ((1,), (2,)):
        mirrored = bi_wkv_2d(w_x, w_y, u, k.flip(axes), v.flip(axes)).flip(axes)
        torch.testing.assert_close(mirrored, y, rtol=0, atol=1e-12)
    # along the rows' sequence a row's end is next to the start of the one below: not here
    far, strong = torch.zeros(1, 8, 8, 1), torch.tensor([40.0])
    far[0, 4, 0] = 1
    seen = bi_wkv_2d(strong, strong, torch.zeros(1), torch.zeros_like(far), far)[0, :, :, 0]
    assert seen[3, 7] < 1e-10
    assert seen[3, 0] > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_computes_in_fp32_or_fp64_and_returns_the_values_dtype(dtype: torch.dtype) -> None:
    w_x, w_y, u, k, v = draw(5, 8, 20.0, 2.0)
    k, v = k.to(dtype), v.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = bi_wkv_2d(w_x, w_y, u, k, v)
    assert y.dtype == dtype
    truth = bi_wkv_2d_reference(*(x.double() for x in (w_x, w_y, u, k, v)))
    bound = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-12}[dtype]
    assert relative_error(y, truth) <= bound


class Op(nn.Module):
    def forward(self, w_x: Tensor, w_y: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return bi_wkv_2d(w_x, w_y, u, k, v)


@pytest.mark.slow
def test_compiles_without_graph_breaks_and_exports_with_free_sizes() -> None:
    torch._dynamo.reset()
    inputs = tuple(draw(3, 5, 5.0, 1.0))
    compiled = torch.compile(Op(), fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*inputs), Op()(*inputs)) <= 1e-6
    torch._dynamo.reset()
    free = {0: torch.export.Dim("B"), 1: torch.export.Dim("H"), 2: torch.export.Dim("W")}
    with torch.no_grad():
        program = torch.export.export(
            Op(), inputs, dynamic_shapes=(None, None, None, free, free), strict=True
        )
    w_x, w_y, u, k, v = draw(8, 4, 5.0, 1.0)
    ours = program.module()(w_x, w_y, u, k[:1], v[:1])
    torch.testing.assert_close(ours, bi_wkv_2d(w_x, w_y, u, k[:1], v[:1]))


def test_the_range_is_needed_and_the_reference_does_not_need_it() -> None:
    inputs = draw(6, 6, 400.0, 1.0)
    assert not bi_wkv_2d(*inputs, impl="prefix").isfinite().all()
    truth = bi_wkv_2d_reference(*(x.double() for x in inputs))
    assert relative_error(bi_wkv_2d(*inputs, impl="reference"), truth) <= 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 0, 4, 6)}, "H, W ≥ 1"),
        ({"k": torch.zeros(2, 4, 6)}, r"expected k of shape \[B, H, W, C\]"),
        ({"v": torch.zeros(2, 3, 3, 6)}, r"v has shape \(2, 3, 3, 6\), expected \(2, 3, 2, 6\)"),
        ({"w_x": torch.zeros(3)}, r"w_x has shape \(3,\), expected \(6,\)"),
        ({"w_y": torch.zeros(1, 6)}, r"w_y has shape \(1, 6\), expected \(6,\)"),
        ({"u": torch.zeros(())}, r"u has shape \(\), expected \(6,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    names = ("w_x", "w_y", "u", "k", "v")
    inputs = dict(zip(names, draw(3, 2, 1.0, 1.0), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        bi_wkv_2d(*inputs.values())


def test_unknown_impl_is_refused() -> None:
    run: Callable[..., Tensor] = bi_wkv_2d
    with pytest.raises(ValueError, match=r"unknown impl 'native'.*'prefix', 'reference'"):
        run(*draw(2, 2, 1.0, 1.0), impl="native")
