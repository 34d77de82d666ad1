"""Bidirectional WKV-6 as one loop over time: what is exported with a free length."""

import torch
from torch import Tensor

from rwkv_core.ops._scan import scan_over_time


def bi_wkv6_scan(
    r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, u_HK: Tensor
) -> Tensor:
    """Return y [B, T, H, V]; every argument already in fp32 or fp64.

    The second half of the batch reads from right to left; the token itself is added once.
    """
    B, _, H, V = v_BTHV.shape
    both = [torch.stack([x, x.flip(1)]).flatten(0, 1) for x in (r_BTHK, w_BTHK, k_BTHK, v_BTHV)]
    y_BTHV = scan_over_time(_step, v_BTHV.new_zeros(2 * B, H, r_BTHK.shape[-1], V), both)
    past_BTHV, future_BTHV = y_BTHV.unflatten(0, (2, B)).unbind()
    own_BTH1 = (r_BTHK * u_HK * k_BTHK).sum(-1, keepdim=True)
    return past_BTHV + future_BTHV.flip(1) + own_BTH1 * v_BTHV


def _step(state_BHKV: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    r_BH1K, w_BH1K, k_BH1K, v_BH1V = rows
    y_BH1V = r_BH1K @ state_BHKV
    return w_BH1K.exp().mT * state_BHKV + k_BH1K.mT @ v_BH1V, y_BH1V
