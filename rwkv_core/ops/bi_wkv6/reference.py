r"""Bidirectional WKV-6, the truth: one sweep over time in each direction, the token itself once.

    y_t = r_tᵀ (P_t + F_t + diag(u) k_t v_tᵀ)                          [V] per head
    P_t = Σ_{i<t} diag(exp Σ_{i<j<t} w_j) k_i v_iᵀ                     [K, V]: the past
    F_t = Σ_{i>t} diag(exp Σ_{t<j<i} w_j) k_i v_iᵀ                     [K, V]: the future

The decay between two tokens is that of the tokens strictly between them: neighbours see each other
undimmed. Keys, values, receptances and decays serve both directions.

Source: OpenGVLab/Vision-RWKV, classification/mmcls_custom/models/backbones/vrwkv6.py; each
direction is the recurrence of arXiv 2404.05892, section 4.

Shapes: B batch, T tokens, H heads, K key dim, V value dim.
"""

import torch
from torch import Tensor


def bi_wkv6_reference(
    r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, u_HK: Tensor
) -> Tensor:
    """Return y [B, T, H, V]; every argument already in fp32 or fp64."""
    inputs = (r_BTHK, w_BTHK, k_BTHK, v_BTHV)
    past_BTHV = _sweep(*inputs)
    future_BTHV = _sweep(*(x.flip(1) for x in inputs)).flip(1)
    own_BTH1 = (r_BTHK * u_HK * k_BTHK).sum(-1, keepdim=True)
    return past_BTHV + future_BTHV + own_BTH1 * v_BTHV


def _sweep(r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor) -> Tensor:
    """Return what every token reads of those before it [B, T, H, V]."""
    B, T, H, V = v_BTHV.shape
    state_BHKV = v_BTHV.new_zeros(B, H, r_BTHK.shape[-1], V)
    outputs = []
    for t in range(T):
        outputs.append((r_BTHK[:, t, :, None] @ state_BHKV).squeeze(-2))
        new_BHKV = k_BTHK[:, t, :, :, None] * v_BTHV[:, t, :, None]
        state_BHKV = w_BTHK[:, t, :, :, None].exp() * state_BHKV + new_BHKV
    return torch.stack(outputs, 1) if outputs else v_BTHV
