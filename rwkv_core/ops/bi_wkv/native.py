"""Bidirectional WKV in C++, as an operator of torch: what is kept, and the gradients.

The algebra is in ``ops/native/src/bi_wkv.h``. Inputs and outputs are fp32, sums are fp64. Decays
and bonuses of any size; beyond ±60 those channels go a slower way, with running exponents.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_core.errors import NativeError
from rwkv_core.ops._common import learns
from rwkv_core.ops.native.library import check, loaded


def bi_wkv_native(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """Return y [B, T, C]; every argument already in fp32, any decay."""
    check("bi_wkv", v_BTC)
    inputs = (w_C, u_C, k_BTC, v_BTC)
    train = learns(*inputs)
    return _forward(*inputs, train)[0]


@torch.library.custom_op("rwkv::bi_wkv_forward", mutates_args=(), device_types="cpu")
def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (w, u, k, v)]
    y, *kept = outputs = _outputs(v, train)
    loaded().run("bi_wkv_forward", v.shape, inputs, (y, *(kept if train else (None, None))))
    return outputs


def _outputs(v: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    if not train:
        return y, v.new_empty(0), v.new_empty(0)
    return y, torch.empty_like(y), torch.empty_like(y)  # the denominator; y from the mean of v


@_forward.register_fake
def _(w: Tensor, u: Tensor, k: Tensor, v: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(v, train)


@torch.library.custom_op("rwkv::bi_wkv_backward", mutates_args=(), device_types="cpu")
def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, den: Tensor, centred: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (w, u, k, v, den, centred, dy)]
    dw, du, dk, dv = (torch.empty_like(x) for x in inputs[:4])
    loaded().run("bi_wkv_backward", v.shape, inputs, (dw, du, dk, dv))
    return dw, du, dk, dv


@_backward.register_fake
def _(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, den: Tensor, centred: Tensor, dy: Tensor
) -> tuple[Tensor, ...]:
    like = (w, u, k, v)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, train = inputs
    _, *kept = output
    if not train:
        raise NativeError("bi_wkv: the native forward pass was told that no backward pass follows")
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *kept)


def _gradients(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    return (*_backward(*ctx.saved_tensors, dy), None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NativeError(
        "bi_wkv: impl='native' has no second derivative; use impl='reference', or compute "
        "in fp64 with bi_wkv_prefix"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
