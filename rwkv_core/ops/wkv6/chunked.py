r"""WKV-6 over chunks of tokens: matrix products inside a chunk, a short loop over chunks.

Inside a chunk that starts from S₀, with D(i, j) = exp of the sum of w strictly between i and j:

    y_t = r_tᵀ D(start, t) S₀ + Σ_{j<t} (Σ_c r_tc k_jc D_c(j, t)) v_j + (Σ_c r_tc u_c k_tc) v_t
    S_L = diag(exp Σ w) S₀ + Σ_j D(j, end) k_j v_jᵀ

The middle term is a matrix product only where D(j, t) splits into a factor of j and one of t.
Around any place between them it does, and both factors are ≤ 1. So a chunk is halved again and
again: tokens of the second half meet those of the first at the middle, in one product, and what is
left are pairs within blocks of 4, which are summed over channels outright.

Range: any w ≤ 0. Every exponent is a sum of log-decays, never a difference of sums, so that nothing
overflows and nothing cancels, whatever the decays. There is no clamp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, BLOCK = 64, 4


def wkv6_chunked(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    u_HK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHV, state_BHKV)``; every argument already in the state's dtype."""
    B, T, H, V = v_BTHV.shape
    if T == 0:
        return v_BTHV, state_BHKV
    chunk = BLOCK
    while chunk < min(T, CHUNK):
        chunk *= 2
    pad = -T % chunk

    # [B, T, H, X] -> [N, B, H, L, X]; a padded token has w = 0 and k = 0: it changes nothing
    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
        return x.view(B, -1, chunk, H, x.shape[-1]).permute(1, 0, 3, 2, 4).contiguous()

    r, w, k, v = map(chunks, (r_BTHK, w_BTHK, k_BTHK, v_BTHV))
    y = (r * k * u_HK[:, None]).sum(-1, keepdim=True) * v + _within_blocks(r, w, k, v)
    half = BLOCK
    while half < chunk:
        (_, r_2), (w_1, w_2), (k_1, _), (v_1, _), (y_1, y_2) = (
            x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (r, w, k, v, y)
        )
        A = (r_2 * _sum_before(w_2).exp()) @ (k_1 * _sum_after(w_1).exp()).mT
        y = torch.stack([y_1, y_2 + A @ v_1], -3).flatten(-4, -2)
        half *= 2

    # the state: read by every token, handed from chunk to chunk
    read = r * _sum_before(w).exp()
    written = (k * _sum_after(w).exp()).mT @ v
    states = []
    for decay, new in zip(w.sum(-2)[..., None].exp(), written, strict=True):
        states.append(state_BHKV)
        state_BHKV = decay * state_BHKV + new
    y = y + read @ torch.stack(states)
    return y.permute(1, 0, 3, 2, 4).reshape(B, T + pad, H, V)[:, :T], state_BHKV


def _within_blocks(r: Tensor, w: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return what each token [..., L, X] reads of the earlier ones in its block."""
    r, w, k, v = (x.unflatten(-2, (-1, BLOCK)) for x in (r, w, k, v))
    y = torch.zeros_like(v)
    faded = torch.ones_like(k[..., 1:, :])  # D(j, t) for t = j + distance
    for distance in range(1, BLOCK):
        A = (r[..., distance:, :] * faded * k[..., :-distance, :]).sum(-1, keepdim=True)
        y = y + F.pad(A * v[..., :-distance, :], (0, 0, distance, 0))
        faded = faded[..., :-1, :] * w[..., distance:-1, :].exp()
    return y.flatten(-3, -2)


def _sum_before(x: Tensor) -> Tensor:
    """Return, for every token [..., L, K], the sum over the tokens before it."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Return, for every token [..., L, K], the sum over the tokens after it."""
    return _sum_before(x.flip(-2)).flip(-2)
