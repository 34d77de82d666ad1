"""WKV-4 in C++, as an operator of torch: what is kept for the backward pass, and the gradients.

The algebra is in ``ops/native/src/wkv4.h``. Inputs and outputs are fp32, sums are fp64 with a whole
exponent of their own, for keys and decays of any size. The forward pass keeps the sums at the start
of every chunk of tokens: an extra 5 / CHUNK floats per token and channel.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_core.errors import NativeError
from rwkv_core.ops._common import learns
from rwkv_core.ops.native.library import check, loaded

CHUNK = 32
WIDTH = 16  # as in channels.h

State4 = tuple[Tensor, Tensor, Tensor]


def wkv4_native(
    w_D: Tensor, u_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state: State4
) -> tuple[Tensor, State4]:
    """Return ``(y_BTD, state)``; every argument already in fp32."""
    check("wkv4", v_BTD)
    if v_BTD.shape[1] == 0:
        return v_BTD, state
    inputs = (w_D, u_D, k_BTD, v_BTD, *state)
    train = learns(*inputs)
    y_BTD, num, den, top, _ = _forward(*inputs, train)
    return y_BTD, (num, den, top)


@torch.library.custom_op("rwkv::wkv4_forward", mutates_args=(), device_types="cpu")
def _forward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, top: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (w, u, k, v, num, den, top)]
    *last, states = outputs = _outputs(v, train)
    loaded().run("wkv4_forward", (*v.shape, CHUNK), inputs, (*last, states if train else None))
    return outputs


def _outputs(v: Tensor, train: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, T, D = v.shape
    num, den, top = (v.new_empty(B, D) for _ in range(3))
    states = v.new_empty(B, -(-T // CHUNK), -(-D // WIDTH), 5 * WIDTH) if train else v.new_empty(0)
    return v.new_empty(v.shape), num, den, top, states


@_forward.register_fake
def _(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, top: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(v, train)


@torch.library.custom_op("rwkv::wkv4_backward", mutates_args=(), device_types="cpu")
def _backward(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, top: Tensor,
    states: Tensor, last_top: Tensor, dy: Tensor, dlast_num: Tensor, dlast_den: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [
        x.contiguous()
        for x in (w, u, k, v, num, den, top, states, last_top, dy, dlast_num, dlast_den)
    ]
    dw_BD, du_BD, dnum, dden, dtop = (torch.empty_like(inputs[4]) for _ in range(5))
    dk, dv = torch.empty_like(inputs[2]), torch.empty_like(inputs[3])
    outputs = (dw_BD, du_BD, dk, dv, dnum, dden, dtop)
    loaded().run("wkv4_backward", (*v.shape, CHUNK), inputs, outputs)
    dw, du = (x.double().sum(0).float() for x in (dw_BD, du_BD))
    return dw, du, dk, dv, dnum, dden, dtop


@_backward.register_fake
def _(
    w: Tensor, u: Tensor, k: Tensor, v: Tensor, num: Tensor, den: Tensor, top: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    like = (w, u, k, v, num, den, top)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, train = inputs
    *_, last_top, states = output
    if not train:
        raise NativeError("wkv4: the native forward pass was told that no backward pass follows")
    ctx.mark_non_differentiable(last_top, states)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, states, last_top)


def _gradients(
    ctx: Any, dy: Tensor | None, dnum: Tensor | None, dden: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dy = torch.zeros_like(saved[3]) if dy is None else dy
    dnum, dden = (torch.zeros_like(saved[4]) if x is None else x for x in (dnum, dden))
    return (*_backward(*saved, dy, dnum, dden), None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NativeError(
        "wkv4: impl='native' has no second derivative; use impl='scan' or 'reference'"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
