"""The nonlinearity of channel mixing: relu(x)². Source: arXiv 2305.13048, section 3.1."""

from typing import Any

import torch
from torch import Tensor

from rwkv_core.ops._common import differentiable_again
from rwkv_core.ops._pointwise import is_native
from rwkv_core.ops.native.library import loaded

__all__ = ["squared_relu"]

FEW = 1 << 14


def squared_relu(x: Tensor, *, impl: str = "auto") -> Tensor:
    """Return relu(x)² of a tensor of any shape; ``impl`` as in :func:`rwkv_core.ops.token_mix`."""
    # of a few numbers the way into the library would cost more; traced code is not asked how many
    if not is_native("squared_relu", impl, x) or (impl == "auto" and x.numel() < FEW):
        return torch.relu(x).square()
    return _SquaredRelu.apply(x)


def _plain(x: Tensor) -> Tensor:
    return squared_relu(x, impl="plain")


class _SquaredRelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out = torch.empty_like(x)
        loaded().run("squared_relu", (x.numel(),), (x, None), (out,))
        return out

    @staticmethod
    @differentiable_again(_plain)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor]:
        (x,) = ctx.saved_tensors
        out = torch.empty_like(x)
        loaded().run("squared_relu", (x.numel(),), (x, grad.contiguous()), (out,))
        return (out,)
