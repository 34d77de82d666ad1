r"""Bidirectional WKV tile by tile, for sequences whose tensors do not fit in memory.

What a token t ≥ b sees of all tokens before place b, it would see of a single one there:

    Σ_{i<b} e^{-λ(t-1-i) + k_i} (v_i, 1) = e^{-λ(t-b) + κ} (ν, 1),   λ = w/T
    κ = log Σ_{i<b} e^{-λ(b-1-i) + k_i},   ν the mean of v by the same weights

So the state that goes from tile to tile is a token, and a tile between two of them is the same op
over two tokens more, by any implementation. One pass, from the last tile to the first, leaves for
each what comes after it; the other, from the first to the last, carries what came before and gives
the outputs. Read backwards the future is a past, so that one function makes both states.

Sums within a tile are in fp32, states in fp64: the errors of a tile's sums are its own, and none is
added where states are joined.

Source: our derivation.

Shapes: B batch, T tokens of a tile, S those and their neighbours, C channels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core.ops._common import state_dtype
from rwkv_core.ops.bi_wkv import bi_wkv

__all__ = ["Summary", "bi_wkv_tile", "summarise"]


class Summary(NamedTuple):
    """One token that weighs as much as all those it stands for: key and value [B, C] in fp64."""

    k_BC: Tensor
    v_BC: Tensor


def summarise(
    w_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, before: Summary | None = None, *, length: int
) -> Summary:
    """Return what later tokens see of a tile and of everything before it.

    What earlier tokens see of a tile and of everything after it is the same of ``k.flip(1)`` and
    ``v.flip(1)``.

    Args:
        w_C: decay over the whole sequence [C], of any size.
        k_BTC: key of the tile's tokens [B, T, C].
        v_BTC: value [B, T, C].
        before: the summary of the tiles before; None where there are none.
        length: tokens of the whole sequence.

    Raises:
        ValueError: a tile that is longer than the sequence.
    """
    T = _check(k_BTC, length)
    dtype = state_dtype(v_BTC)
    with torch.autocast(v_BTC.device.type, enabled=False):
        fade_C = w_C.double() / length
        apart_T1 = torch.arange(T - 1, -1, -1, device=w_C.device, dtype=dtype)[:, None]
        score_BTC = k_BTC.to(dtype) - apart_T1 * fade_C.to(dtype)
        top_BC = score_BTC.amax(1)
        weight_BTC = torch.exp(score_BTC - top_BC[:, None])
        den_BC = weight_BTC.sum(1).double()
        num_BC = (weight_BTC * v_BTC.to(dtype)).sum(1).double()
        tile = Summary(top_BC.double() + den_BC.log(), num_BC / den_BC)
        if before is None:
            return tile
        faded_BC = before.k_BC - T * fade_C
        k_BC = torch.logaddexp(faded_BC, tile.k_BC)
        share_BC = torch.exp(faded_BC - k_BC)
        return Summary(k_BC, torch.lerp(tile.v_BC, before.v_BC, share_BC))


def bi_wkv_tile(
    w_C: Tensor,
    u_C: Tensor,
    k_BTC: Tensor,
    v_BTC: Tensor,
    before: Summary | None,
    after: Summary | None,
    *,
    length: int,
    impl: str = "auto",
) -> Tensor:
    """Return the part of :func:`rwkv_core.ops.bi_wkv` that belongs to a tile's tokens.

    Args:
        w_C: decay over the whole sequence [C].
        u_C: bonus of the token itself, times ``length`` [C].
        k_BTC: key of the tile's tokens [B, T, C].
        v_BTC: value [B, T, C].
        before: the summary of the tiles before; None where there are none.
        after: the summary of the tiles after, read backwards; None where there are none.
        length: tokens of the whole sequence.
        impl: as for :func:`rwkv_core.ops.bi_wkv`. The limit of ``"prefix"`` falls on |w| times the
            tile's share of the sequence.

    Returns:
        y [B, T, C] in the dtype of ``v``; computed in fp32 (fp64 for fp64 values), autocast off.

    Raises:
        ValueError: a tile that is longer than the sequence, or what the op refuses.
        NativeError: ``impl="native"`` cannot run here; the reason is named.
    """
    T = _check(k_BTC, length)
    dtype = state_dtype(v_BTC)
    with torch.autocast(v_BTC.device.type, enabled=False):
        k, v = [k_BTC.to(dtype)], [v_BTC.to(dtype)]
        if before is not None:
            k.insert(0, before.k_BC[:, None].to(dtype))
            v.insert(0, before.v_BC[:, None].to(dtype))
        if after is not None:
            k.append(after.k_BC[:, None].to(dtype))
            v.append(after.v_BC[:, None].to(dtype))
        k_BSC, v_BSC = torch.cat(k, 1), torch.cat(v, 1)
        share = k_BSC.shape[1] / length  # the op divides by the tokens it gets
        w_C, u_C = w_C.to(dtype) * share, u_C.to(dtype) * share
        y_BSC = bi_wkv(w_C, u_C, k_BSC, v_BSC, impl=impl)
    first = 0 if before is None else 1
    return y_BSC[:, first : first + T].to(v_BTC.dtype)


def _check(k_BTC: Tensor, length: int) -> int:
    T = k_BTC.shape[1]
    if length < T:
        raise ValueError(f"a tile of {T} tokens is longer than the sequence of {length}")
    return T
