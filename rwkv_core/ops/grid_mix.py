"""Shift and interpolation on a grid: every linear map reads its own mixture of a patch and others.

The channels are in groups, and each group sees a patch some rows and columns away. Source: arXiv
2403.02308, section 3.3 (Q-Shift).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.ops._common import differentiable_again, learns
from rwkv_core.ops._pointwise import MIXES, is_native
from rwkv_core.ops.native.library import loaded

__all__ = ["grid_mix", "grid_mix_plain", "grid_shift"]

Groups = list[tuple[int, int, int]]


def grid_shift(x_BHWC: Tensor, groups: Groups, heads: int = 1) -> Tensor:
    """Return what each patch sees [B, H, W, C]; beyond the border there are zeros.

    Args:
        x_BHWC: an image of features, at least as many patches high and wide as a group looks far.
        groups: for each group of channels its size, and how many rows down and columns to the
            right it looks; the sizes add up to C, or to the channels of one head.
        heads: how often the groups follow one another in the channels.
    """
    if heads > 1:
        x_BHWC = x_BHWC.unflatten(-1, [heads, -1])
    if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript reads no further
        if torch.compiler.is_exporting():
            x_BHWC = _shift_views(x_BHWC, groups)
            return x_BHWC.flatten(-2) if heads > 1 else x_BHWC
    parts = x_BHWC.split([group[0] for group in groups], -1)
    inner = [0, 0] if heads == 1 else [0, 0, 0, 0]  # channels, and heads
    moved = []
    for i, (_, dy, dx) in enumerate(groups):
        # a negative pad crops, so that each group moves at once
        pad = inner + [-dx, dx, -dy, dy]  # noqa: RUF005 - TorchScript
        moved.append(F.pad(parts[i], pad) if dy != 0 or dx != 0 else parts[i])
    x_BHWC = torch.cat(moved, -1)
    return x_BHWC.flatten(-2) if heads > 1 else x_BHWC


def _shift_views(x: Tensor, groups: Groups) -> Tensor:
    """Return what each patch sees, in one pad and a view for each group.

    For graphs: where a grid has one row, :func:`grid_shift` crops it to nothing before it pads, and
    what onnxruntime before 1.24 puts there is not zeros.
    """
    reach = max(max(abs(dy), abs(dx)) for _, dy, dx in groups)
    around = F.pad(x, [0, 0] * (x.ndim - 3) + [reach] * 4)
    moved, first = [], 0
    for size, dy, dx in groups:
        rows, columns = (slice(reach + d, d - reach or None) for d in (dy, dx))
        moved.append(around[:, rows, columns, ..., first : first + size])
        first += size
    return torch.cat(moved, -1)


def grid_mix(
    x_BHWC: Tensor, mix_NC: Tensor, groups: Groups, heads: int = 1, *, impl: str = "auto"
) -> tuple[Tensor, ...]:
    """Return N images ``s + (x - s)·μ_n`` [B, H, W, C], s what each patch sees.

    Args:
        x_BHWC: an image of features.
        mix_NC: μ, the patch's own share in each of the N mixtures.
        groups: as in :func:`grid_shift`.
        heads: as there.
        impl: as in :func:`rwkv_core.ops.token_mix`.
    """
    if len(mix_NC) > MIXES or not is_native("grid_mix", impl, x_BHWC, mix_NC):
        return tuple(grid_mix_plain(x_BHWC, mix_NC, groups, heads))
    run = _GridMix.apply if learns(x_BHWC, mix_NC) else _native
    return run(x_BHWC, mix_NC, torch.tensor(groups * heads))


def grid_mix_plain(x_BHWC: Tensor, mix_NC: Tensor, groups: Groups, heads: int) -> list[Tensor]:
    """Return what :func:`grid_mix` does, in plain operations that script."""
    s_BHWC = grid_shift(x_BHWC, groups, heads)
    d_BHWC = x_BHWC - s_BHWC
    return [torch.addcmul(s_BHWC, d_BHWC, mix_C) for mix_C in mix_NC.unbind()]


def _plain(x_BHWC: Tensor, mix_NC: Tensor, groups_G3: Tensor) -> tuple[Tensor, ...]:
    return tuple(grid_mix_plain(x_BHWC, mix_NC, groups_G3.tolist(), 1))


def _sizes(x_BHWC: Tensor, mix_NC: Tensor, groups_G3: Tensor) -> tuple[int, ...]:
    return (*x_BHWC.shape, len(mix_NC), len(groups_G3), *groups_G3.flatten().tolist())


def _native(x_BHWC: Tensor, mix_NC: Tensor, groups_G3: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.contiguous() for x in (x_BHWC, mix_NC)]
    out = tuple(torch.empty_like(inputs[0]) for _ in mix_NC)
    loaded().run("grid_mix_forward", _sizes(x_BHWC, mix_NC, groups_G3), inputs, out)
    return out


class _GridMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHWC: Tensor, mix_NC: Tensor, groups_G3: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BHWC, mix_NC, groups_G3)
        return _native(x_BHWC, mix_NC, groups_G3)

    @staticmethod
    @differentiable_again(_plain)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BHWC, mix_NC, groups_G3 = (x.contiguous() for x in ctx.saved_tensors)
        dx, rows = torch.empty_like(x_BHWC), x_BHWC.shape[0] * x_BHWC.shape[1]
        sums = x_BHWC.new_empty(rows, *mix_NC.shape)
        inputs = (x_BHWC, mix_NC, *(g.contiguous() for g in grads))
        sizes = _sizes(x_BHWC, mix_NC, groups_G3)
        loaded().run("grid_mix_backward", sizes, inputs, (dx, sums))
        return dx, sums.sum(0), None
