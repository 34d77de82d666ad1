r"""Bidirectional WKV of a plane, the truth: for every patch a mean over all patches.

    y_p = ( Σ_{q≠p} e^{-(|Δx|·w_x/W + |Δy|·w_y/H) + k_q} v_q + e^{u/(H·W) + k_p} v_p )
        / ( Σ_{q≠p} e^{-(|Δx|·w_x/W + |Δy|·w_y/H) + k_q}     + e^{u/(H·W) + k_p}     )

with p, q patches, Δx and Δy columns and rows between them; per picture and channel.

Source: what users of OpenGVLab/Vision-RWKV ask for in its issue tracker (16 and 24), in place of
the distance along the rows' sequence. On a single row it is the op in one dimension, ``bi_wkv``,
with the bonus u + w_x: there a neighbour is at distance 0, here at 1.

Shapes: B batch, H rows, W columns, C channels.
"""

import torch
from torch import Tensor


def bi_wkv_2d_reference(
    w_x_C: Tensor, w_y_C: Tensor, u_C: Tensor, k_BHWC: Tensor, v_BHWC: Tensor
) -> Tensor:
    """Return y [B, H, W, C]; every argument already in fp32 or fp64, any decay."""
    _, H, W, _ = k_BHWC.shape
    rows_H11 = torch.arange(H, device=k_BHWC.device)[:, None, None]
    columns_W1 = torch.arange(W, device=k_BHWC.device)[:, None]
    means = []
    for y in range(H):
        for x in range(W):
            dy, dx = abs(rows_H11 - y), abs(columns_W1 - x)
            own_HWC = torch.where((dy == 0) & (dx == 0), u_C / (H * W), 0)
            score_BHWC = k_BHWC - dx * w_x_C / W - dy * w_y_C / H + own_HWC
            weight_BTC = score_BHWC.flatten(1, 2).softmax(1)
            means.append((weight_BTC * v_BHWC.flatten(1, 2)).sum(1))
    return torch.stack(means, 1).view_as(v_BHWC)
