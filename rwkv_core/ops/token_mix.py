"""Token shift and interpolation: every linear map reads its own mixture of a token and the last.

Source: arXiv 2503.14456, section 4.1 (lerp); older generations write the same with 1 - μ for μ.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_core.ops._common import differentiable_again, learns
from rwkv_core.ops._pointwise import BLOCK, MIXES, is_native
from rwkv_core.ops.native.library import loaded
from rwkv_core.ops.shift import token_shift

__all__ = ["token_mix"]


def token_mix(
    x_BTD: Tensor, last_BD: Tensor, mix_ND: Tensor, *, impl: str = "auto"
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return N tensors ``x + (x⁻ - x)·μ_n`` [B, T, D], and the last token [B, D] to carry.

    Args:
        x_BTD: tokens.
        last_BD: the token before the sequence, zeros at a document's start.
        mix_ND: μ, the share of the previous token in each of the N mixtures; 1 - μ is the token's.
        impl: ``"plain"``, ``"native"`` (C++ on CPU, one pass over memory), or ``"auto"``, native
            where it is built and all tensors are fp32 on CPU.
    """
    if len(mix_ND) > MIXES or not is_native("token_mix", impl, x_BTD, last_BD, mix_ND):
        previous_BTD, after_BD = token_shift(x_BTD, last_BD)
        d_BTD = previous_BTD - x_BTD
        return tuple(torch.addcmul(x_BTD, d_BTD, mix_D) for mix_D in mix_ND), after_BD
    run = _TokenMix.apply if learns(x_BTD, last_BD, mix_ND) else _native
    return run(x_BTD, last_BD, mix_ND), x_BTD[:, -1]


def _plain(x_BTD: Tensor, last_BD: Tensor, mix_ND: Tensor) -> tuple[Tensor, ...]:
    return token_mix(x_BTD, last_BD, mix_ND, impl="plain")[0]


def _native(x_BTD: Tensor, last_BD: Tensor, mix_ND: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.contiguous() for x in (x_BTD, last_BD, mix_ND)]
    out = tuple(torch.empty_like(inputs[0]) for _ in range(len(mix_ND)))
    loaded().run("token_mix_forward", (*x_BTD.shape, len(mix_ND)), inputs, out)
    return out


class _TokenMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, last_BD: Tensor, mix_ND: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x_BTD, last_BD, mix_ND)
        return _native(x_BTD, last_BD, mix_ND)

    @staticmethod
    @differentiable_again(_plain)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        x_BTD, last_BD, mix_ND = (x.contiguous() for x in ctx.saved_tensors)
        B, T, D = x_BTD.shape
        dx, dlast = torch.empty_like(x_BTD), torch.empty_like(last_BD)
        sums = x_BTD.new_empty(B * -(-T // BLOCK), len(mix_ND), D)
        inputs = (x_BTD, last_BD, mix_ND, *(g.contiguous() for g in grads))
        loaded().run("token_mix_backward", (B, T, D, len(mix_ND)), inputs, (dx, dlast, sums))
        return dx, dlast, sums.sum(0)
