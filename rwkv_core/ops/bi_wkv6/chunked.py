r"""Bidirectional WKV-6 over chunks of tokens: matrix products, without a loop over them.

With D(i, t) = exp of the sum of w strictly between i and t, whichever comes first:

    y_t = Σ_{i≠t} (Σ_c r_tc k_ic D_c(i, t)) v_i + (Σ_c r_tc u_c k_tc) v_t

D is symmetric, so both directions share it. Around any place between i and t it splits into two
factors ≤ 1, and a chunk is therefore halved again and again, down to single tokens: the halves meet
at their middle, each token of one reads all of the other, in one product for both directions. With
s_t the sum of w between t and the middle:

    R = r exp(s),  M = k exp(s),  y_1 += (R_1 M_2ᵀ) v_2,  y_2 += (R_2 M_1ᵀ) v_1

Between chunks, where the sums run to the chunk's ends, states are what is read:

    P_n = Σ_{m<n} E(m, n) (k exp(after))ᵀ v        E(m, n) = exp of the sum over the chunks between
    F_n = Σ_{m>n} E(m, n) (k exp(before))ᵀ v       y += (r exp(before)) P + (r exp(after)) F

Both are matrix products over the chunks.

Range: any w ≤ 0. Every exponent is a sum of log-decays, never a difference of sums, so that nothing
overflows and nothing cancels. There is no clamp.

The adjoint takes the same products the other way and keeps nothing but the inputs. A sum's gradient
is that of the factors it scales, ∂s = R∂R + M∂M, and goes down the halvings as the sums came up.

Shapes: N chunks of L tokens, [B, H, N, L, X]; halves of h tokens, [B, H, N, L / 2h, 2, h, X].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
MATMUL_FROM = 4  # tokens of a half from which on a matrix product beats sums of products


def bi_wkv6_chunked(
    r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, u_HK: Tensor
) -> Tensor:
    """Return y [B, T, H, V] in plain operations; every argument already in fp32 or fp64."""
    r, w, k, v = (_chunks(x) for x in (r_BTHK, w_BTHK, k_BTHK, v_BTHV))
    y = (r * k * u_HK[:, None, None]).sum(-1, keepdim=True) * v
    *levels, (before, after, whole) = _sums(w)
    for sums in levels:
        e = _to_middle(*sums)
        r_h, k_h, v_h = (_halves(x, e.shape[-2]) for x in (r, k, v))
        y = y + (_dots(r_h * e, (k_h * e).flip(-3)) @ v_h.flip(-3)).flatten(-4, -2)
    e_b, e_a = before.squeeze(-3).exp(), after.squeeze(-3).exp()
    written = torch.cat([k * e_a, k * e_b], -1).mT @ v
    y = y + torch.cat([r * e_b, r * e_a], -1) @ _carry(_between(whole), written)
    return _tokens(y, v_BTHV.shape[1])


class BiWKV6Chunked(torch.autograd.Function):
    """The chunked form with its own adjoint, for eager training."""

    @staticmethod
    def forward(
        ctx: Any, r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, u_HK: Tensor
    ) -> Tensor:
        """Return y [B, T, H, V]."""
        ctx.save_for_backward(r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK)
        return bi_wkv6_chunked(r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_BTHV: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of r, w, k, v and u."""
        *inputs, u_HK = ctx.saved_tensors
        r, w, k, v, g = (_chunks(x) for x in (*inputs, g_BTHV))
        u = u_HK[:, None, None]

        # the token itself
        own = (g * v).sum(-1, keepdim=True)
        grad_r, grad_k = own * k * u, own * r * u
        grad_v = (r * k * u).sum(-1, keepdim=True) * g
        grad_u = (own * r * k).sum((0, 2, 3))

        # between chunks; what the past wrote the future reads: the adjoint exchanges directions
        *levels, (before, after, whole) = _sums(w)
        e_b, e_a = before.squeeze(-3).exp(), after.squeeze(-3).exp()
        R, M = torch.cat([r * e_b, r * e_a], -1), torch.cat([k * e_a, k * e_b], -1)
        E, written, grad_states = _between(whole), M.mT @ v, R.mT @ g
        K = r.shape[-1]
        grad_written = _carry(E, grad_states.roll(K, -2)).roll(K, -2)
        (R_b, R_a), (M_a, M_b) = (
            x.chunk(2, -1) for x in (g @ _carry(E, written).mT, v @ grad_written.mT)
        )
        grad_r = grad_r + R_b * e_b + R_a * e_a
        grad_k = grad_k + M_a * e_a + M_b * e_b
        grad_v = grad_v + M @ grad_written
        grad_before = ((R_b * r + M_b * k) * e_b).unsqueeze(-3)
        grad_after = ((R_a * r + M_a * k) * e_a).unsqueeze(-3)
        grad_whole = _carry_adjoint(E, written, grad_states)

        # from the largest halves to single tokens
        for sums in reversed(levels):
            e = _to_middle(*sums)
            half = e.shape[-2]
            r_h, k_h, v_h, g_h = (_halves(x, half) for x in (r, k, v, g))
            R, M, v_h = r_h * e, (k_h * e).flip(-3), v_h.flip(-3)
            A, grad_A = _dots(R, M), _dots(g_h, v_h)
            grad_R, grad_M = (grad_A @ M) * e, (grad_A.mT @ R).flip(-3) * e
            grad_r = grad_r + grad_R.flatten(-4, -2)
            grad_k = grad_k + grad_M.flatten(-4, -2)
            grad_v = grad_v + (A.mT @ g_h).flip(-3).flatten(-4, -2)
            s_1, s_2 = (grad_R * r_h + grad_M * k_h).unbind(-3)
            (b_1, b_2), (a_1, a_2) = (x.split(half, -2) for x in (grad_before, grad_after))
            wholes = [grad_whole + x.sum(-2, keepdim=True) for x in (b_2, a_1)]
            grad_whole = torch.stack(wholes, -3).flatten(-4, -3)
            grad_before = torch.stack([b_1, b_2 + s_2], -3).flatten(-4, -3)
            grad_after = torch.stack([a_1 + s_1, a_2], -3).flatten(-4, -3)
        grad_w = grad_whole.flatten(-3, -2)
        T = g_BTHV.shape[1]
        return *(_tokens(x, T) for x in (grad_r, grad_w, grad_k, grad_v)), grad_u


def _chunks(x_BTHX: Tensor) -> Tensor:
    """Return [B, H, N, L, X]; a padded token has w = 0 and k = 0: it changes nothing."""
    B, T, H, X = x_BTHX.shape
    chunk = CHUNK
    while chunk // 2 >= T:
        chunk //= 2
    N = -(-T // chunk)
    x_BTHX = F.pad(x_BTHX, (0, 0, 0, 0, 0, N * chunk - T))
    return x_BTHX.view(B, N, chunk, H, X).permute(0, 3, 1, 2, 4).contiguous()


def _tokens(y: Tensor, T: int) -> Tensor:
    """Return [B, T, H, X]: the chunks in one sequence again, without what was padded."""
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]


def _halves(x: Tensor, half: int) -> Tensor:
    return x.unflatten(-2, (-1, 2, half))


def _sums(w: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return sums of w over runs of 1, 2, 4, ... L tokens [B, H, N, L / run, run or 1, K].

    For each length: over the tokens of the run before each token, after it, and over all of them.
    """
    whole = w[..., None, :]
    before = after = torch.zeros_like(whole)
    sums = [(before, after, whole)]
    for _ in range(w.shape[-2].bit_length() - 1):
        (b_1, b_2), (a_1, a_2), (w_1, w_2) = (_paired(x) for x in (before, after, whole))
        before, after = torch.cat([b_1, b_2 + w_1], -2), torch.cat([a_1 + w_2, a_2], -2)
        whole = w_1 + w_2
        sums.append((before, after, whole))
    return sums


def _paired(x: Tensor) -> tuple[Tensor, ...]:
    return x.unflatten(-3, (-1, 2)).unbind(-3)


def _to_middle(before: Tensor, after: Tensor, _: Tensor) -> Tensor:
    """Return the decay between each token and the middle of its two halves."""
    return torch.stack([_paired(after)[0], _paired(before)[1]], -3).exp()


def _dots(x: Tensor, y: Tensor) -> Tensor:
    """Return x yᵀ; of few rows as sums of products, because tiny matrix products are slow."""
    if x.shape[-2] >= MATMUL_FROM:
        return x @ y.mT
    return (x[..., :, None, :] * y[..., None, :, :]).sum(-1)


def _between(whole: Tensor) -> Tensor:
    """Return the decay over the chunks between the m-th and the n-th [B, H, K, N, N], m < n."""
    x = whole.squeeze((-3, -2)).mT[..., None, :]
    N = x.shape[-1]
    later = x.new_ones(N, N).triu(1)
    # a negative pad crops: the n-th chunk itself does not count
    return F.pad((x * later).cumsum(-1), (1, -1)).exp() * later


def _carry(E: Tensor, x: Tensor) -> Tensor:
    """Return sums over the other chunks [B, H, N, 2 K, V]: of the past above, the future below."""
    past, future = x.transpose(2, 3).chunk(2, 2)
    return torch.cat([E.mT @ past, E @ future], 2).transpose(2, 3)


def _carry_adjoint(E: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of each chunk's whole sum of w [B, H, N, 1, 1, K]."""
    (past, future), (grad_p, grad_f) = (y.transpose(2, 3).chunk(2, 2) for y in (x, grad))
    grad_E = E * (past @ grad_p.mT + grad_f @ future.mT)
    # a chunk between m and n: m before it and n after it
    later = F.pad(grad_E, (-1, 1)).flip(-1).cumsum(-1).flip(-1)
    return (later.triu(1)).sum(-2).mT[..., None, None, :]
