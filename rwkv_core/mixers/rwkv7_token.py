"""One token through a layer of RWKV-7 in two native calls: what decoding does all day.

The thirty small operations of a layer cost up to a fifth of the time in which memory brings its
weights. Here they are one call for each half, made of the kernels that a sequence gets
(``ops/native/src/token7.h``), for one token of one sequence, on CPU in fp32 or bf16, where no
gradient will be asked for and nobody looks inside: no hook, no tracer, no autocast, no module of
another type. With weights in bf16 everything between two matrices is in fp32.
"""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

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

FORMATS = {torch.float32: 0, torch.bfloat16: 4}  # of matrices, as in token7.h


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
    if state.wkv_BHKV.dtype is not torch.float32:
        return None
    mixing = (m.v0, m.v1, m.v2) if m.layer else (None, None, None)
    rows = (x_11D, state.att_shift_BD, state.wkv_BHKV, v_first_11D)
    vectors = (
        m.x_r, m.x_w, m.x_k, m.x_v, m.x_a, m.x_g, m.w0, m.a0, mixing[0], m.k_k, m.k_a, m.r_k,
        m.ln_x.weight, m.ln_x.bias,
    )  # fmt: skip
    low_rank = (m.w1, m.w2, m.a1, m.a2, *mixing[1:], m.g1, m.g2)
    weights = [one.weight for one in maps]
    layout = _layout(x_11D.dtype, weights, low_rank, (*rows, *vectors))
    if layout is None:
        return None
    *mix, w0, a0, v0, k_k, k_a, r_k, weight, bias = _widened(vectors)
    w1, w2, a1, a2, v1, v2, g1, g2 = low_rank
    ranks = [0 if one is None else one.shape[1] for one in (w1, a1, v1, g1)]
    inputs = (
        *_widened(rows), *mix, w0, w1, w2, a0, a1, a2, v0, v1, v2, g1, g2, k_k, k_a, r_k,
        *weights, weight, bias, _scalar(m.ln_x.eps),
    )  # fmt: skip
    y, wkv, value = map(torch.empty_like, (inputs[0], state.wkv_BHKV, inputs[0]))
    sizes = (m.dim // m.head_dim, m.head_dim, *ranks, *layout)
    loaded().run("time_mix7_token", sizes, inputs, (y, wkv, value))
    return y.to(x_11D.dtype), wkv, value.to(x_11D.dtype)


def channel_mix_token(mixer: "ChannelMix7", x_11D: Tensor, last_1D: Tensor) -> Tensor | None:
    """Return y [1, 1, D]; None if the token is not taken here."""
    maps = (mixer.key, mixer.value)
    if not _is_seen_from_outside_only(*maps):
        return None
    rows, weights = (x_11D, last_1D, mixer.x_k), [one.weight for one in maps]
    layout = _layout(x_11D.dtype, weights, (), rows)
    if layout is None:
        return None
    inputs = _widened(rows)
    y = torch.empty_like(inputs[0])
    loaded().run("channel_mix7_token", (*weights[0].mT.shape, *layout), (*inputs, *weights), (y,))
    return y.to(x_11D.dtype)


def _is_seen_from_outside_only(*modules: nn.Module) -> bool:
    # compilers must not follow the way into the library
    return not (is_watched() or _has_any_global_hook()) and all(
        type(one) in (Linear, HeadNorm) and not (one._forward_hooks or one._forward_pre_hooks)
        for one in modules
    )


def _layout(
    dtype: torch.dtype,
    weights: Sequence[Tensor],
    low_rank: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
) -> list[int] | None:
    """Return the format of the matrices and how each weight lies in memory.

    None if one of the tensors cannot be taken: matrices are of the token's dtype, rows may be of
    another.
    """
    maps = [x for x in low_rank if x is not None]
    present = [x for x in rows if x is not None]
    if dtype not in FORMATS or not available() or learns(*weights, *maps, *present):
        return None
    if not all(_fits(x) and x.dtype is dtype for x in (*weights, *maps)):
        return None
    if not all(_fits(x) and x.dtype in FORMATS for x in present):
        return None
    if not all(x.is_contiguous() for x in (*maps, *present)):
        return None
    orders = [order for weight in weights if (order := memory_order(weight)) is not None]
    return [FORMATS[dtype], *orders] if len(orders) == len(weights) else None


def _fits(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu


def _widened(rows: Sequence[Tensor | None]) -> list[Any]:
    # a call of torch for each would be felt: they are eighteen of a layer
    return [x if x is None or x.dtype is torch.float32 else x.float() for x in rows]


@functools.lru_cache(maxsize=8)
def _scalar(value: float) -> Tensor:
    return torch.tensor(value)
