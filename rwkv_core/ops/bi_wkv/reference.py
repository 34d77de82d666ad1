r"""Bidirectional WKV, the truth: one sweep over time in each direction.

    y_t = ( Σ_{i≠t} e^{-(|t-i|-1)·w/T + k_i} v_i + e^{u/T + k_t} v_t )
        / ( Σ_{i≠t} e^{-(|t-i|-1)·w/T + k_i}     + e^{u/T + k_t}     )      per batch and channel

A sweep carries numerator, denominator and the exponent both are scaled by, the largest seen so far:
so nothing overflows, whatever the decay.

Source: arXiv 2403.02308, section 3.2. There u is not divided by T; the authors' model divides both
(OpenGVLab/Vision-RWKV, classification/mmcls_custom/models/backbones/vrwkv.py), and so do we. The
authors' CUDA kernels are off by one power of the decay where two of their 32 segments meet; this is
the formula, not the kernel.

Shapes: B batch, T tokens, C channels.
"""

import torch
from torch import Tensor


def bi_wkv_reference(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """Return y [B, T, C]; every argument already in fp32 or fp64, any decay."""
    T = k_BTC.shape[1]
    w, u = w_C / T, u_C / T
    past = _sweep(w, k_BTC, v_BTC)
    future = [x.flip(1) for x in _sweep(w, k_BTC.flip(1), v_BTC.flip(1))]
    here = [v_BTC, torch.ones_like(v_BTC), u + k_BTC]
    top = torch.maximum(torch.maximum(past[2], future[2]), here[2])
    parts = [(n, d, torch.exp(o - top)) for n, d, o in (past, future, here)]
    num_BTC, den_BTC = torch.zeros_like(v_BTC), torch.zeros_like(v_BTC)
    for n, d, scale in parts:
        num_BTC, den_BTC = num_BTC + n * scale, den_BTC + d * scale
    return num_BTC / den_BTC


def _sweep(w: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> list[Tensor]:
    """Return numerator, denominator and their exponent over the tokens before each one."""
    num_BC = den_BC = torch.zeros_like(k_BTC[:, 0])
    top_BC = torch.full_like(num_BC, -torch.inf)
    before = []
    for k_BC, v_BC in zip(k_BTC.unbind(1), v_BTC.unbind(1), strict=True):
        before.append((num_BC, den_BC, top_BC))
        new_BC = torch.maximum(top_BC - w, k_BC)
        keep, add = torch.exp(top_BC - w - new_BC), torch.exp(k_BC - new_BC)
        num_BC, den_BC, top_BC = num_BC * keep + v_BC * add, den_BC * keep + add, new_BC
    return [torch.stack(column, 1) for column in zip(*before, strict=True)]
