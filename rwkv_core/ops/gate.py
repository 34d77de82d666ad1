"""The gate behind a recurrence: σ(r)·y. Source: arXiv 2305.13048, section 3.1."""

from typing import Any

import torch
from torch import Tensor

from rwkv_core.ops._common import differentiable_again, learns
from rwkv_core.ops._pointwise import is_native
from rwkv_core.ops.native.library import loaded

__all__ = ["gate"]


def gate(r: Tensor, y: Tensor, *, impl: str = "auto") -> Tensor:
    """Return sigmoid(r)·y of two tensors of one shape; ``impl`` as in ``token_mix``."""
    if r.shape != y.shape or not is_native("gate", impl, r, y):
        return torch.sigmoid(r) * y
    return _Gate.apply(r, y) if learns(r, y) else _native(r, y)


def _plain(r: Tensor, y: Tensor) -> Tensor:
    return gate(r, y, impl="plain")


def _native(r: Tensor, y: Tensor) -> Tensor:
    r, y = r.contiguous(), y.contiguous()
    out = torch.empty_like(y)
    loaded().run("gate_forward", (y.numel(),), (r, y), (out,))
    return out


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, r: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(r, y)
        return _native(r, y)

    @staticmethod
    @differentiable_again(_plain)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        r, y = (x.contiguous() for x in ctx.saved_tensors)
        dr, dy = torch.empty_like(r), torch.empty_like(y)
        loaded().run("gate_backward", (y.numel(),), (r, y, grad.contiguous()), (dr, dy))
        return dr, dy
