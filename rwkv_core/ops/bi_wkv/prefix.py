r"""Bidirectional WKV by prefix sums: one cumulative sum over the past, one over the future.

With λ = w/T, x_i = e^{k_i - max k}·(v_i, 1) and the position τ_t = t - (T-1)/2:

    P_t = Σ_{i<t} e^{-λ(t-1-i)} x_i = e^{-λτ_t} Σ_{j≤t} e^{λτ_j} x_{j-1}
    F_t = Σ_{i>t} e^{-λ(i-1-t)} x_i = e^{+λτ_t} Σ_{j≥t} e^{-λτ_j} x_{j+1}
    (N, D) = P + F + e^{u/T} x,   y = N / D

The decay is divided by T and τ is centred, so that every exponent stays within |w|/2, and the token
with the largest key keeps D above e^{-|w|}: no running maximum is needed. Shifting x before the sum
and summing the future from its own end, not as total minus past, keeps every digit. Measured in
fp32 against the formula in float64, up to |w| = 60 and T = 4096: y within 2e-6, gradients within
1e-5 of the largest value. Beyond ``MAX_DECAY`` fp32 overflows; the reference has no limit.

The weights between tokens are symmetric, hence the adjoint is the same pair of sums. With
q = ∂y / D and y∂y/D in place of x, and (P, F)(q), (P, F)(qy) their sums:

    Q = (P + F)(q) + e^{u/T} q,   R the same of qy
    ∂v = e·Q,   ∂k = e·(v Q - R),   ∂u' = Σ q e^{u/T} e (v - y),   e = e^{k - max k},   u' = u/T
    ∂λ = -∂u' - Σ τ q [(P-F)(ev) - y (P-F)(e)] + Σ τ [ev (F-P)(q) - e (F-P)(qy)]

where the last line follows from t-1-i = τ_t - τ_i - 1 and N = yD. It keeps three tensors beside the
inputs where automatic differentiation keeps a dozen.

Source of the formula: arXiv 2403.02308, section 3.2; the sums and the adjoint are our derivation.

Shapes: B batch, T tokens, C channels, X any number of channels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.ops._common import differentiable_again

MAX_DECAY = 60.0


def bi_wkv_prefix(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """Return y [B, T, C] in plain operations that trace, script and export.

    Every argument is in fp32 or fp64; |w| and |u| at most ``MAX_DECAY``.
    """
    e_BTC = torch.exp(k_BTC - k_BTC.amax(1, keepdim=True))
    x_BTX = torch.cat([e_BTC * v_BTC, e_BTC], -1)
    past_BTX, future_BTX = _sums(w_C, x_BTX)
    own_X = torch.exp(u_C / k_BTC.shape[1]).repeat(2)
    num_BTC, den_BTC = (past_BTX + future_BTX + own_X * x_BTX).chunk(2, -1)
    return num_BTC / den_BTC


def _position(x_BTX: Tensor) -> Tensor:
    """Return τ [1, T, 1]: positions centred on 0, without asking for T as a number."""
    count = torch.ones_like(x_BTX[:1, :, :1]).cumsum(1)
    return count - (count[:, :1] + count[:, -1:]) / 2


def _sums(w_C: Tensor, x_BTX: Tensor) -> tuple[Tensor, Tensor]:
    """Return the decayed sums over each token's past and over its future [B, T, X = 2 C].

    The exponents are formed in the dtype of ``w_C``.
    """
    grow_1TC = torch.exp(_position(x_BTX) * (w_C / x_BTX.shape[1]))
    shrink = grow_1TC.reciprocal().to(x_BTX.dtype).repeat(1, 1, 2)
    grow = grow_1TC.to(x_BTX.dtype).repeat(1, 1, 2)
    # a negative pad crops: every token moves by one
    before_BTX = F.pad(x_BTX, (0, 0, 1, -1))
    after_BTX = F.pad(x_BTX, (0, 0, -1, 1))
    past_BTX = shrink * (grow * before_BTX).cumsum(1)
    future_BTX = grow * (shrink * after_BTX).flip(1).cumsum(1).flip(1)
    return past_BTX, future_BTX


class BiWKVPrefix(torch.autograd.Function):
    """The prefix form with its own adjoint, for eager training on devices that have fp64.

    Exponents are formed in fp64 (T·C numbers): rounded ones would enter the gradient of the decay
    as the same relative error at every token, and add up instead of averaging out.
    """

    @staticmethod
    def forward(ctx: Any, w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
        """Return y [B, T, C]."""
        e_BTC = torch.exp(k_BTC - k_BTC.amax(1, keepdim=True))
        x_BTX = torch.cat([e_BTC * v_BTC, e_BTC], -1)
        past_BTX, future_BTX = _sums(w_C.double(), x_BTX)
        own_X = torch.exp(u_C / k_BTC.shape[1]).repeat(2)
        num_BTC, den_BTC = (past_BTX + future_BTX).addcmul_(own_X, x_BTX).chunk(2, -1)
        y_BTC = num_BTC / den_BTC
        diff_num_BTC, diff_den_BTC = (past_BTX - future_BTX).chunk(2, -1)
        diff_BTC = diff_num_BTC - y_BTC * diff_den_BTC
        ctx.save_for_backward(w_C, u_C, k_BTC, v_BTC, y_BTC, den_BTC.contiguous(), diff_BTC)
        return y_BTC

    @staticmethod
    @differentiable_again(bi_wkv_prefix)
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the gradients of w, u, k and v."""
        w_C, u_C, k_BTC, v_BTC, y_BTC, den_BTC, diff_BTC = ctx.saved_tensors
        T = k_BTC.shape[1]
        e_BTC = torch.exp(k_BTC - k_BTC.amax(1, keepdim=True))
        own_C = torch.exp(u_C / T)
        q_BTC = grad_BTC / den_BTC
        x_BTX = torch.cat([q_BTC, q_BTC * y_BTC], -1)
        past_BTX, future_BTX = _sums(w_C.double(), x_BTX)
        sum_q_BTC, sum_r_BTC = (past_BTX + future_BTX).addcmul_(own_C.repeat(2), x_BTX).chunk(2, -1)
        diff_q_BTC, diff_r_BTC = (future_BTX - past_BTX).chunk(2, -1)
        grad_v = e_BTC * sum_q_BTC
        grad_k = v_BTC * grad_v - e_BTC * sum_r_BTC
        grad_u = own_C * (q_BTC * e_BTC * (v_BTC - y_BTC)).sum((0, 1))
        moment_BTC = e_BTC * (v_BTC * diff_q_BTC - diff_r_BTC) - q_BTC * diff_BTC
        grad_w = (_position(k_BTC) * moment_BTC).sum((0, 1)) - grad_u
        return grad_w / T, grad_u / T, grad_k, grad_v
