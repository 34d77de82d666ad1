r"""WKV-6 over chunks of tokens: matrix products inside a chunk, a short loop over chunks.

Inside a chunk that starts from S₀, with D(i, j) = exp of the sum of w strictly between i and j:

    y_t = r_tᵀ D(start, t) S₀ + Σ_{j<t} (Σ_c r_tc k_jc D_c(j, t)) v_j + (Σ_c r_tc u_c k_tc) v_t
    S_L = diag(exp Σ w) S₀ + Σ_j D(j, end) k_j v_jᵀ

The middle term is a matrix product only if D(j, t) splits into a factor of j and a factor of t.
Around any token between them it does, and both factors are ≤ 1. So a chunk of 64 is cut into blocks
of 16: pairs of different blocks meet at the start of the later one, pairs within a block are summed
over channels outright.

Range: any w ≤ 0. Every exponent is a sum of log-decays, never a difference of sums, so that nothing
overflows and nothing cancels, whatever the decays. There is no clamp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK, BLOCK = 64, 16


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
    pad = -T % CHUNK
    n_chunks, n_blocks = (T + pad) // CHUNK, CHUNK // BLOCK

    # [B, T, H, X] -> [N, B, H, M, L, X]: chunks, blocks of a chunk, tokens of a block. A padded
    # token has w = 0 and k = 0: it changes nothing
    def blocks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
        return x.view(B, n_chunks, n_blocks, BLOCK, H, x.shape[-1]).permute(1, 0, 4, 2, 3, 5)

    r, w, k, v = map(blocks, (r_BTHK, w_BTHK, k_BTHK, v_BTHV))
    since_block = _sum_before(w)
    until_block_end = _sum_after(w)
    blocks_w = w.sum(-2)  # [N, B, H, M, K]

    # pairs within a block: the decay between j and t of every channel [..., t, j, K]
    earlier = torch.ones(BLOCK, BLOCK, dtype=torch.bool, device=w.device).tril(-1)
    before = F.pad(w[..., :-1, :], (0, 0, 1, 0))[..., :, None, :]
    between = before.where(earlier.tril(-2)[..., None], 0).cumsum(-3)
    decay = between.where(earlier[..., None], -torch.inf).exp()
    A = (decay * k[..., None, :, :]) @ r[..., None]
    A = A.squeeze(-1) + torch.diag_embed((r * k * u_HK[:, None, None]).sum(-1))
    ys = list((A @ v).unbind(-3))

    # pairs of different blocks meet at the start of the later one
    r_block = (r * since_block.exp()).unbind(-3)
    for m in range(1, n_blocks):
        w_j = until_block_end[..., :m, :, :] + _sum_after(blocks_w[..., :m, :])[..., None, :]
        k_j = (k[..., :m, :, :] * w_j.exp()).flatten(-3, -2)
        ys[m] = ys[m] + (r_block[m] @ k_j.mT) @ v[..., :m, :, :].flatten(-3, -2)

    # the state: read by every token, handed from chunk to chunk
    r_chunk = r * (since_block + _sum_before(blocks_w)[..., None, :]).exp()
    k_chunk = k * (until_block_end + _sum_after(blocks_w)[..., None, :]).exp()
    new = k_chunk.flatten(-3, -2).mT @ v.flatten(-3, -2)
    states = []
    for decay, new_BHKV in zip(blocks_w.sum(-2)[..., None].exp(), new, strict=True):
        states.append(state_BHKV)
        state_BHKV = decay * state_BHKV + new_BHKV
    y = torch.stack(ys, -3) + r_chunk @ torch.stack(states)[..., None, :, :]
    return y.permute(1, 0, 3, 4, 2, 5).reshape(B, T + pad, H, V)[:, :T], state_BHKV


def _sum_before(x: Tensor) -> Tensor:
    """Return, along the last axis but one, the sums over what comes before each entry."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _sum_after(x: Tensor) -> Tensor:
    """Return, along the last axis but one, the sums over what comes after each entry."""
    return _sum_before(x.flip(-2)).flip(-2)
