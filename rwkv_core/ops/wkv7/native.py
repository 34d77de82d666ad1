"""WKV-7 in C++, as an operator of torch: what is kept for the backward pass, and the gradients.

The algebra is in ``ops/native/src/wkv7.h``. Forward and backward are plain recurrences in fp32, for
any head size and any decay. The forward pass keeps the state at the start of every chunk of tokens
(an extra K·V / CHUNK floats per token and head) and what each token found under its removal key.
"""

from typing import Any

import torch
from torch import Tensor

from rwkv_core.errors import NativeError
from rwkv_core.ops._common import is_traced, learns
from rwkv_core.ops.native.library import check, loaded

CHUNK = 32
TILE = 16  # as in heads.h


def wkv7_native(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHV, state_BHKV)``; every argument already in fp32."""
    check("wkv7", v_BTHV)
    if v_BTHV.shape[1] == 0:
        return v_BTHV, state_BHKV
    inputs = (r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV)
    train = learns(*inputs)
    if not train and not is_traced(*inputs):  # one token takes no longer than an operator's way in
        y_BTHV, state_BHKV, *_ = _run(*inputs, train)
    else:
        y_BTHV, state_BHKV, *_ = _forward(*inputs, train)
    return y_BTHV, state_BHKV


def _sizes(r_BTHK: Tensor, v_BTHV: Tensor) -> tuple[int, ...]:
    return (*r_BTHK.shape, v_BTHV.shape[-1], CHUNK)


def _run(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, state)]
    y, last, found, states = _outputs(r, v, state, train)
    kept = (found, states) if train else (None, None)
    loaded().run("wkv7_forward", _sizes(r, v), inputs, (y, last, *kept))
    return y, last, found, states


def _outputs(
    r: Tensor, v: Tensor, state: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, T, H, K = r.shape
    V = v.shape[-1]
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    if not train:
        return y, last, v.new_empty(0), v.new_empty(0)
    found = torch.empty_like(y)
    # [chunks, tiles of values, K, TILE] per head
    return y, last, found, v.new_empty(B, H, -(-T // CHUNK), -(-V // TILE), K, TILE)


@torch.library.custom_op("rwkv::wkv7_forward", mutates_args=(), device_types="cpu")
def _forward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _run(r, w, k, v, a, b, state, train)


@_forward.register_fake
def _(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor, train: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(r, v, state, train)


@torch.library.custom_op("rwkv::wkv7_backward", mutates_args=(), device_types="cpu")
def _backward(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, found: Tensor, states: Tensor,
    dy: Tensor, dlast: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = [x.contiguous() for x in (r, w, k, v, a, b, found, states, dy, dlast)]
    dr, dw, dk, dv, da, db = (torch.empty_like(x) for x in inputs[:6])
    dstate = torch.empty_like(inputs[-1])
    loaded().run("wkv7_backward", _sizes(r, v), inputs, (dr, dw, dk, dv, da, db, dstate))
    return dr, dw, dk, dv, da, db, dstate


@_backward.register_fake
def _(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, found: Tensor, states: Tensor,
    dy: Tensor, dlast: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    like = (r, w, k, v, a, b, dlast)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _state, train = inputs
    _, last, found, states = output
    if not train:
        raise NativeError("wkv7: the native forward pass was told that no backward pass follows")
    ctx.mark_non_differentiable(found, states)
    ctx.set_materialize_grads(False)
    ctx.last_shape = last.shape
    ctx.save_for_backward(*tensors, found, states)


def _gradients(
    ctx: Any, dy: Tensor | None, dlast: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    v = saved[3]
    dy = torch.zeros_like(v) if dy is None else dy
    dlast = v.new_zeros(ctx.last_shape) if dlast is None else dlast
    return (*_backward(*saved, dy, dlast), None)


def _no_second_derivative(ctx: Any, *_: Any) -> None:
    raise NativeError(
        "wkv7: impl='native' has no second derivative; use impl='chunked' or 'reference'"
    )


_forward.register_autograd(_gradients, setup_context=_save)
_backward.register_autograd(_no_second_derivative)
