"""One token through a layer of RWKV-7 in two native calls: what decoding does all day.

The thirty small operations of a layer cost up to a fifth of the time in which memory brings its
weights. Here they are one call for each half, made of the kernels that a sequence gets
(``ops/native/src/token7.h``), for one token of one sequence, on CPU in fp32, where no gradient will
be asked for and nobody looks inside: no hook, no tracer, no autocast, no module of another type.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rwkv_core.mixers.base import HeadNorm, Linear, MatrixState
from rwkv_core.ops._common import learns
from rwkv_core.ops.linear import is_watched, memory_order
from rwkv_core.ops.native.library import available, loaded

if TYPE_CHECKING:
    from rwkv_core.mixers.rwkv7 import ChannelMix7, TimeMix7

__all__ = ["channel_mix_token", "time_mix_token"]


def time_mix_token(
    mixer: "TimeMix7", x_11D: Tensor, state: MatrixState, v_first_11D: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return y [1, 1, D], the state [1, H, K, V] and the value [1, 1, D].

    None if the token is not taken here.
    """
    m, maps = mixer, (mixer.receptance, mixer.key, mixer.value, mixer.output)
    if m.impl not in ("auto", "native") or not _is_seen_from_outside_only(*maps, m.ln_x):
        return None
    if m.head_dim % 16 or (v_first_11D is None) != (m.layer == 0):
        return None
    mixing = (m.v0, m.v1, m.v2) if m.layer else (None, None, None)
    parameters = (
        m.x_r, m.x_w, m.x_k, m.x_v, m.x_a, m.x_g, m.w0, m.w1, m.w2, m.a0, m.a1, m.a2, *mixing,
        m.g1, m.g2, m.k_k, m.k_a, m.r_k,
    )  # fmt: skip
    inputs = (x_11D, state.att_shift_BD, state.wkv_BHKV, v_first_11D)
    norm, weights = (m.ln_x.weight, m.ln_x.bias), [one.weight for one in maps]
    orders = _memory_orders(weights, (*inputs, *parameters, *norm))
    if orders is None:
        return None
    ranks = [0 if x is None else x.shape[1] for x in (m.w1, m.a1, mixing[1], m.g1)]
    y, wkv, value = torch.empty_like(x_11D), torch.empty_like(inputs[2]), torch.empty_like(x_11D)
    loaded().run(
        "time_mix7_token",
        (m.dim // m.head_dim, m.head_dim, *ranks, *orders),
        (*inputs, *parameters, *weights, *norm, _scalar(m.ln_x.eps)),
        (y, wkv, value),
    )
    return y, wkv, value


def channel_mix_token(mixer: "ChannelMix7", x_11D: Tensor, last_1D: Tensor) -> Tensor | None:
    """Return y [1, 1, D]; None if the token is not taken here."""
    maps = (mixer.key, mixer.value)
    if not _is_seen_from_outside_only(*maps):
        return None
    inputs, weights = (x_11D, last_1D, mixer.x_k), [one.weight for one in maps]
    orders = _memory_orders(weights, inputs)
    if orders is None:
        return None
    y = torch.empty_like(x_11D)
    loaded().run("channel_mix7_token", (*weights[0].mT.shape, *orders), (*inputs, *weights), (y,))
    return y


def _is_seen_from_outside_only(*modules: nn.Module) -> bool:
    # compilers must not follow the way into the library
    return not (is_watched() or _has_any_global_hook()) and all(
        type(one) in (Linear, HeadNorm) and not (one._forward_hooks or one._forward_pre_hooks)
        for one in modules
    )


def _memory_orders(weights: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> list[int] | None:
    """Return how each weight lies in memory, or None if one of the tensors cannot be taken."""
    present = [x for x in tensors if x is not None]
    if not available() or learns(*present, *weights):
        return None
    if not all(_fits(x) and x.is_contiguous() for x in present) or not all(map(_fits, weights)):
        return None
    orders = [order for weight in weights if (order := memory_order(weight)) is not None]
    return orders if len(orders) == len(weights) else None


def _fits(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.dtype is torch.float32 and x.is_cpu


@functools.lru_cache(maxsize=8)
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)
