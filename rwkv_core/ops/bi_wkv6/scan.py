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
    rows = [x.unsqueeze(-2) for x in (r_BTHK, w_BTHK, k_BTHK, v_BTHV)]
    both = [torch.cat([x, x.flip(1)]) for x in rows]
    y_BTH1V = scan_over_time(_step, v_BTHV.new_zeros(2 * B, H, r_BTHK.shape[-1], V), both)
    past_BTH1V, future_BTH1V = y_BTH1V.split([B, B])
    r_BTH1K, _, k_BTH1K, v_BTH1V = rows
    own_BTH11 = (r_BTH1K * u_HK[:, None] * k_BTH1K).sum(-1, keepdim=True)
    return (past_BTH1V + future_BTH1V.flip(1) + own_BTH11 * v_BTH1V).squeeze(-2)


def _step(state_BHKV: Tensor, rows: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    r_BH1K, w_BH1K, k_BH1K, v_BH1V = rows
    y_BH1V = r_BH1K @ state_BHKV
    return w_BH1K.exp().mT * state_BHKV + k_BH1K.mT @ v_BH1V, y_BH1V
