r"""WKV-7 over chunks of tokens: matrix products inside a chunk, a short loop over chunks.

Inside a chunk with inclusive cumulative log-decay g_t and exclusive e_t = g_t - w_t:

    z_t = a_tᵀ S_{t-1}                     what token t finds under its removal key
    Z   = (I - A_ab)⁻¹ (A_ak V + ã S₀)     because z_t depends on every earlier z
    Y   = A_rk V + A_rb Z + r̃ S₀
    S_L = diag(exp g_L) S₀ + (k exp(g_L - g))ᵀ V + (b exp(g_L - g))ᵀ Z

with A_xy[t, j] = Σ_c x[t, c] y[j, c] exp(decay between j and t), strictly lower triangular for
x = a (which reads before the update), lower triangular for x = r (after). The inverse is a
triangular solve, that is forward substitution: the product form Π(I + A^(2^i)) loses every digit
when keys repeat.

Range: decays are split around the middle of the chunk, so that exponents stay below
``CHUNK / 2 · max|w|``. RWKV-7 bounds |w| by exp(-1/2) = 0.6065; any |w| ≤ 5 is safe in fp32. The
reference has no such limit.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 32


def wkv7_chunked(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHV, state_BHKV)``; every argument already in the state's dtype."""
    B, T, H, V = v_BTHV.shape
    if T == 0:
        return v_BTHV, state_BHKV
    chunk = min(CHUNK, T)
    pad = -T % chunk
    n_chunks = (T + pad) // chunk

    # [B, T, H, X] -> [N, B, H, L, X]; a padded token has w = 0 and k = b = 0: it changes nothing
    def chunks(x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, 0, 0, pad))
        return x.view(B, n_chunks, chunk, H, x.shape[-1]).permute(1, 0, 3, 2, 4)

    r, w, k, v, a, b = map(chunks, (r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK))
    g = w.cumsum(-2)
    middle = (chunk - 1) // 2
    mid = g[..., middle : middle + 1, :]
    end = g[..., -1:, :]
    g = g - mid

    # rows read (r after the update, a before it), columns were written (k and b)
    read_r, read_a = r * g.exp(), a * (g - w).exp()
    written_k, written_b = k * (-g).exp(), b * (-g).exp()
    A = torch.cat([read_r, read_a], -2) @ torch.cat([written_k, written_b], -2).mT
    lower = torch.ones(chunk, chunk, dtype=A.dtype, device=A.device).tril()
    A = A * torch.cat([lower, lower.tril(-1)]).repeat(1, 2)
    (A_rk, A_rb), (A_ak, A_ab) = (rows.split(chunk, -1) for rows in A.split(chunk, -2))

    # Z = found_v + found_s S₀, one triangular solve for both
    from_start = mid.exp()
    rhs = torch.cat([A_ak @ v, read_a * from_start], -1)
    unit = torch.eye(chunk, dtype=A.dtype, device=A.device)
    found = torch.linalg.solve_triangular(unit - A_ab, rhs, upper=False, unitriangular=True)
    found_v, found_s = found.split([V, found.shape[-1] - V], -1)
    to_end = (end - mid).exp()
    k_end, b_end = (written_k * to_end).mT, (written_b * to_end).mT
    # split all at once: the gradient of an index into N chunks is N tensors of zeros
    parts = (found_v, found_s, A_rb, read_r * from_start, A_rk @ v, end.exp().mT, k_end @ v, b_end)
    ys = []
    for z_v, z_s, y_z, y_s, y_v, decay, s_v, s_z in zip(*(p.unbind() for p in parts), strict=True):
        z = z_v + z_s @ state_BHKV
        ys.append(y_v + y_z @ z + y_s @ state_BHKV)
        state_BHKV = decay * state_BHKV + s_v + s_z @ z
    y = torch.stack(ys).permute(1, 0, 3, 2, 4).reshape(B, n_chunks * chunk, H, V)
    return y[:, :T], state_BHKV
