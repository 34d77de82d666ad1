"""Bidirectional WKV-6 as two sweeps of the causal op in C++, in one call."""

import torch
from torch import Tensor

from rwkv_core.ops.wkv6.native import wkv6_native


def bi_wkv6_native(
    r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, u_HK: Tensor
) -> Tensor:
    """Return y [B, T, H, V]; every argument already in fp32.

    The second half of the batch reads from right to left; the token itself is added once.
    """
    B, _, H, V = v_BTHV.shape
    r, w, k, v = (torch.cat([x, x.flip(1)]) for x in (r_BTHK, w_BTHK, k_BTHK, v_BTHV))
    start = v_BTHV.new_zeros(2 * B, H, r_BTHK.shape[-1], V)
    y_BTHV, _ = wkv6_native(r, w, k, v, torch.zeros_like(u_HK), start)
    past_BTHV, future_BTHV = y_BTHV.chunk(2)
    own_BTH1 = (r_BTHK * u_HK * k_BTHK).sum(-1, keepdim=True)
    return past_BTHV + future_BTHV.flip(1) + own_BTH1 * v_BTHV
