r"""RWKV-7 around its recurrence: the gates before it, the norm, bonus and gate behind it.

Source: arXiv 2503.14456, section 4; code of reference: BlinkDL/RWKV-LM,
RWKV-v7/train_temp/src/model.py. The symbols are those of ``mixers/rwkv7.py``. Each is plain
element-wise work, which in separate operations costs as much memory traffic as the linear maps;
``impl="native"`` does it in one pass over memory each way, on CPU in fp32, for head sizes that are
a multiple of 16. The gradients stand in ``native/src/rwkv7_layer.h``.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import NativeError
from rwkv_core.ops._common import differentiable_again, learns, state_dtype
from rwkv_core.ops._pointwise import BLOCK, is_native
from rwkv_core.ops.head_norm import head_norm
from rwkv_core.ops.native.library import loaded

__all__ = ["Gates7", "finish7", "gates7"]

MAX_LOG_DECAY = math.exp(-0.5)


class Gates7(NamedTuple):
    """What the recurrence reads beside the receptance; vectors of a head are rows."""

    w_H1K: Tensor
    k_H1K: Tensor
    a_H1K: Tensor
    b_H1K: Tensor
    v_H1V: Tensor


def gates7(
    lora_w_D: Tensor,
    lora_a_D: Tensor,
    k_D: Tensor,
    v_D: Tensor,
    w0_D: Tensor,
    a0_D: Tensor,
    k_k_HK: Tensor,
    k_a_D: Tensor,
    mixed_in: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    impl: str = "auto",
) -> Gates7:
    """Return decay, key, value and the two removal vectors of every token.

    Args:
        lora_w_D: low-rank map of the decay [..., D].
        lora_a_D: low-rank map of the in-context learning rate [..., D].
        k_D: key [..., D].
        v_D: value [..., D].
        w0_D: bias of the decay.
        a0_D: bias of the in-context learning rate.
        k_k_HK: scale of the removal key, [H, K].
        k_a_D: how far the learning rate shrinks the key.
        mixed_in: from the second layer on, the first layer's value [..., D], its share's low-rank
            map [..., D] and v0 [D].
        impl: ``"plain"``, ``"native"``, or ``"auto"``, native where it takes the tensors.

    Raises:
        NativeError: ``impl="native"`` cannot take the tensors; the reason is named.
    """
    inputs = (lora_w_D, lora_a_D, k_D, w0_D, a0_D, k_k_HK, k_a_D)
    mixing = (v_D, *mixed_in) if mixed_in else ()
    if not _is_native("gates7", impl, k_k_HK, *inputs, *mixing):
        return Gates7(*_gates(*inputs, *(mixing or (v_D,))))
    run = _Gates.apply if learns(*inputs, *mixing) else _native_gates
    found = run(*inputs, *mixing)
    return Gates7(*(_rows(x, *k_k_HK.shape) for x in (found if mixing else (*found, v_D))))


def finish7(
    y_H1V: Tensor,
    r_H1K: Tensor,
    k_H1K: Tensor,
    v_H1V: Tensor,
    g_D: Tensor,
    r_k_HK: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    *,
    impl: str = "auto",
) -> Tensor:
    """Normalise each head of y, add the bonus of the current token, and gate: [..., D].

    Rows [..., H, 1, K] as :func:`gates7` returns them, ``g_D`` the gate [..., D]; ``r_k_HK`` scales
    the bonus, the rest belongs to the norm.

    Raises:
        NativeError: ``impl="native"`` cannot take the tensors; the reason is named.
    """
    rows = (y_H1V, r_H1K, k_H1K, v_H1V)
    if not _is_native("finish7", impl, r_k_HK, *rows, g_D, weight_D, bias_D):
        return _finish(*rows, g_D, r_k_HK, weight_D, bias_D, eps)
    flat = (x.flatten(-3) for x in rows)
    others = (g_D, r_k_HK, weight_D, bias_D)
    run = _Finish.apply if learns(*rows, *others) else _native_finish
    return run(*flat, *others, torch.tensor(eps))


# ---- plain -------------------------------------------------------------------------------------


def _rows(x_D: Tensor, heads: int, size: int) -> Tensor:
    """View [..., D] as rows [..., H, 1, K]."""
    return x_D.unflatten(-1, (heads, 1, size))


def _gates(
    lora_w: Tensor, lora_a: Tensor, k: Tensor, w0: Tensor, a0: Tensor, k_k_HK: Tensor, k_a: Tensor,
    v: Tensor, v_first: Tensor | None = None, lora_v: Tensor | None = None,
    v0: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    size = k_k_HK.shape
    # decay and unit keys in fp32: half precision has too few digits near 1
    dtype = state_dtype(k)
    w = _rows(-MAX_LOG_DECAY * torch.sigmoid((w0 + lora_w).to(dtype)), *size)
    k = _rows(k, *size)
    if v_first is not None and lora_v is not None and v0 is not None:
        v = v + (v_first - v) * torch.sigmoid(v0 + lora_v)
    alpha = _rows(torch.sigmoid(a0 + lora_a), *size)
    kappa = (k * k_k_HK[:, None]).to(dtype)
    kappa = kappa / kappa.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    k_a = _rows(k_a, *size)
    k = k * (1 - k_a + alpha * k_a)
    return w, k, -kappa, kappa * alpha, _rows(v, *size)


def _finish(
    y_H1V: Tensor, r_H1K: Tensor, k_H1K: Tensor, v_H1V: Tensor, g_D: Tensor, r_k_HK: Tensor,
    weight_D: Tensor, bias_D: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    bonus_H1V = (r_H1K * k_H1K * r_k_HK[:, None]).sum(-1, keepdim=True) * v_H1V
    return (head_norm(y_H1V, weight_D, bias_D, eps) + bonus_H1V).flatten(-3) * g_D


# ---- native ------------------------------------------------------------------------------------


def _is_native(op: str, impl: str, heads_HK: Tensor, *tensors: Tensor) -> bool:
    if heads_HK.shape[-1] % 16 == 0:
        return is_native(op, impl, *tensors, heads_HK)
    if impl == "native":
        raise NativeError(
            f"{op}: impl='native' takes head sizes that are a multiple of 16, got "
            f"{heads_HK.shape[-1]}; use impl='plain'"
        )
    return False


def _sizes(x_D: Tensor, heads_HK: Tensor) -> tuple[int, int, int]:
    return x_D.numel() // heads_HK.numel(), *heads_HK.shape


def _plain_gates(*inputs: Tensor) -> tuple[Tensor, ...]:
    lora_w, lora_a, k, w0, a0, k_k_HK, k_a, *mixing = inputs
    found = _gates(lora_w, lora_a, k, w0, a0, k_k_HK, k_a, *(mixing or (k,)))
    return tuple(x.flatten(-3) for x in found)[: 5 if mixing else 4]


def _native_gates(*inputs: Tensor) -> tuple[Tensor, ...]:
    inputs = tuple(x.contiguous() for x in inputs)
    k, k_k_HK = inputs[2], inputs[5]
    out = [torch.empty_like(k) for _ in range(5 if len(inputs) > 7 else 4)]
    w, k_out, a, b = out[:4]
    v_out = out[4] if len(out) > 4 else None
    loaded().run("gates7_forward", _sizes(k, k_k_HK), _gate_inputs(inputs), (w, k_out, v_out, a, b))
    return tuple(out)


class _Gates(torch.autograd.Function):
    """Inputs as :func:`_gates`, the value only where the first layer's is mixed into it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        return _native_gates(*inputs)

    @staticmethod
    @differentiable_again(_plain_gates)
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = tuple(x.contiguous() for x in ctx.saved_tensors)
        k, k_k_HK = inputs[2], inputs[5]
        sizes = _sizes(k, k_k_HK)
        dw, dk, da, db, *dv = (g.contiguous() for g in grads)
        dlw, dla, dk_in = (torch.empty_like(k) for _ in range(3))
        dlv, dv_in, dfirst = (torch.empty_like(k) if dv else None for _ in range(3))
        sums = k.new_empty(-(-sizes[0] // BLOCK), 5, k_k_HK.numel())
        loaded().run(
            "gates7_backward",
            sizes,
            [*_gate_inputs(inputs), dw, dk, dv[0] if dv else None, da, db],
            (dlw, dla, dlv, dk_in, dv_in, dfirst, sums),
        )
        dw0, da0, dv0, dk_k, dk_a = sums.sum(0)
        found = (dlw, dla, dk_in, dw0, da0, dk_k.view_as(k_k_HK), dk_a)
        return (*found, dv_in, dfirst, dlv, dv0) if dv else found


def _gate_inputs(inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return the inputs in the order of the kernel."""
    lora_w, lora_a, k, w0, a0, k_k, k_a, *mixing = inputs
    v, first, lora_v, v0 = mixing or (None,) * 4
    return [lora_w, lora_a, lora_v, k, v, first, w0, a0, v0, k_k, k_a]


def _plain_finish(*inputs: Tensor) -> Tensor:
    *rows, g_D, r_k_HK, weight_D, bias_D, eps = inputs
    y, r, k, v = (_rows(x, *r_k_HK.shape) for x in rows)
    return _finish(y, r, k, v, g_D, r_k_HK, weight_D, bias_D, float(eps))


def _native_finish(*inputs: Tensor) -> Tensor:
    inputs = tuple(x.contiguous() for x in inputs)
    out = torch.empty_like(inputs[4])
    loaded().run("finish7_forward", _sizes(out, inputs[5]), inputs, (out,))
    return out


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return _native_finish(*inputs)

    @staticmethod
    @differentiable_again(_plain_finish)
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs = tuple(x.contiguous() for x in ctx.saved_tensors)
        g_D, r_k_HK = inputs[4], inputs[5]
        sizes = _sizes(g_D, r_k_HK)
        out = [torch.empty_like(g_D) for _ in range(5)]
        sums = g_D.new_empty(-(-sizes[0] // BLOCK), 3, r_k_HK.numel())
        loaded().run("finish7_backward", sizes, (*inputs, grad.contiguous()), (*out, sums))
        dr_k, dweight, dbias = sums.sum(0)
        return (*out, dr_k.view_as(r_k_HK), dweight, dbias, None)
