r"""WKV-6 over chunks of tokens: matrix products inside a chunk, a short loop over chunks.

Inside a chunk that starts from S₀, with D(i, j) = exp of the sum of w strictly between i and j:

    y_t = r_tᵀ D(start, t) S₀ + Σ_{j≤t} A_tj v_j
    S_L = diag(exp Σ w) S₀ + Σ_j D(j, end) k_j v_jᵀ
    A_tj = Σ_c r_tc k_jc D_c(j, t) for j < t,   A_tt = Σ_c r_tc k_tc u_c

A is a matrix product only where D(j, t) splits into a factor of j and one of t. Around any place
between them it does, and both factors are ≤ 1. So a chunk is halved again and again, down to single
tokens: those of a second half meet those of the first at the middle, in one product. With R what
the tokens of a block read from before it, W what they write to after it, and total the sum of w
over it, a block is made of its two halves:

    A₂₁ = R₂ W₁ᵀ,   R = (R₁, R₂ exp total₁),   W = (W₁ exp total₂, W₂),   total = total₁ + total₂

A token has R = r, W = k and total = w; the R and W of a whole chunk read the state before it and
write the one after. The adjoint takes these lines from the last to the first, from the chunk down
to the tokens:

    ∂R₂ ← ∂R₂ exp total₁,   ∂total₁ = ∂total + Σ R₂∂R₂,   ∂R₂ ← ∂R₂ + ∂A₂₁ W₁
    ∂W₁ ← ∂W₁ exp total₂,   ∂total₂ = ∂total + Σ W₁∂W₁,   ∂W₁ ← ∂W₁ + ∂A₂₁ᵀ R₂

Kept for it: the inputs, A and the state before every chunk. Both passes take some chunks at a time,
so that what they need in between stays in the processor's cache.

Range: any w ≤ 0. Every exponent is a sum of log-decays, never a difference of sums, so that nothing
overflows and nothing cancels, whatever the decays; and the gradient of w is a sum over the pairs of
tokens that it lies between. There is no clamp and no division.

Shapes: B batch, T time, H heads, K key dim, V value dim; G = B·H, N chunks of L tokens, each of
blocks of h.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.ops._chunks import chunks, segments, tokens
from rwkv_core.ops._common import differentiable_again

CHUNK = 64  # a power of 2


def wkv6_chunked(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    u_HK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHV, state_BHKV)`` in plain operations that trace, export and differentiate.

    Every argument is already in the state's dtype.
    """
    if v_BTHV.shape[1] == 0:
        return v_BTHV, state_BHKV
    y_BTHV, state_BHKV, _, _ = _forward(r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK, state_BHKV)
    return y_BTHV, state_BHKV


class WKV6Chunked(torch.autograd.Function):
    """The chunked form with its own adjoint, for eager code; T ≥ 1."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``wkv6_chunked`` does."""
        *sequences, u_HK, state_BHKV = inputs
        outputs, kept = [], []
        for segment in segments(sequences, CHUNK):
            y_BTHV, state_BHKV, A, states = _forward(*segment, u_HK, state_BHKV)
            outputs.append(y_BTHV)
            if any(ctx.needs_input_grad):
                kept += [A, states]
        ctx.save_for_backward(*inputs, *kept)
        return torch.cat(outputs, 1), state_BHKV

    @staticmethod
    @differentiable_again(wkv6_chunked)
    def backward(ctx: Any, dy_BTHV: Tensor, dstate_BHKV: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the six inputs."""
        saved = ctx.saved_tensors  # once: checkpoints allow no more
        (*sequences, u_HK, _), kept = saved[:6], saved[6:]
        parts = segments([*sequences, dy_BTHV], CHUNK)
        du_HK, grads = torch.zeros_like(u_HK), []
        for segment, A, states in [*zip(parts, kept[::2], kept[1::2], strict=True)][::-1]:
            *grad, du, dstate_BHKV = _backward(segment, u_HK, dstate_BHKV, A, states)
            grads.append(grad)
            du_HK += du
        return (*(torch.cat(x[::-1], 1) for x in zip(*grads, strict=True)), du_HK, dstate_BHKV)


def _forward(*inputs: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y [B, T, H, V], the last state, A [N, G, L, L] and the states before [N, G, K, V]."""
    *sequences, u_HK, state_BHKV = inputs
    r, w, k, v = (chunks(x, _length(x)) for x in sequences)
    *halvings, whole = _levels(r, w, k)
    A = _pairs(halvings, (r * _per_row(u_HK, sequences[0]) * k).sum(-1))
    states, state = [], state_BHKV.flatten(0, 1)
    for decay_n, new_n in zip(whole.total.exp().mT, whole.written.mT @ v, strict=True):
        states.append(state)
        state = decay_n * state + new_n
    states_NGKV = torch.stack(states)
    y = A @ v + whole.read @ states_NGKV
    return tokens(y, sequences[3]), state.view_as(state_BHKV), A, states_NGKV


def _backward(
    segment: Sequence[Tensor], u_HK: Tensor, dstate_BHKV: Tensor, A: Tensor, states: Tensor
) -> list[Tensor]:
    """Return the gradients of r, w, k, v [B, T, H, X], u [H, K] and the state [B, H, K, V]."""
    r, w, k, v, dy = (chunks(x, _length(x)) for x in segment)
    *halvings, whole = _levels(r, w, k)

    # the state, handed on backward in time
    dstates, dstate = [], dstate_BHKV.flatten(0, 1)
    decay = whole.total.exp().mT
    for decay_n, new_n in zip(decay.flip(0), (whole.read.mT @ dy).flip(0), strict=True):
        dstates.append(dstate)
        dstate = decay_n * dstate + new_n
    dafter = torch.stack(dstates[::-1])
    dread, dwritten = dy @ states.mT, v @ dafter.mT
    dtotal = (decay * (states * dafter).sum(-1, keepdim=True)).mT

    dv = (A.mT @ dy).add_(whole.written @ dafter)
    dA = (dy @ v.mT)[:, :, None]  # what is on the diagonal of blocks of 2h [N, G, M, 2h, 2h]
    for read, written, total, h in reversed(halvings):
        (_, read_2), (written_1, _), (_, dread_2), (dwritten_1, _) = (
            _halves(x, h) for x in (read, written, dread, dwritten)
        )
        total_1, total_2 = _halves(total, 1)
        dread_2 *= total_1.exp()
        dwritten_1 *= total_2.exp()
        dtotal = dtotal[..., None, :]
        dtotal_1 = dtotal + (read_2 * dread_2).sum(-2, keepdim=True)
        dtotal_2 = dtotal + (written_1 * dwritten_1).sum(-2, keepdim=True)
        dtotal = _join(dtotal_1, dtotal_2)
        dA_11, dA_21, dA_22 = dA[..., :h, :h], dA[..., h:, :h], dA[..., h:, h:]
        dread_2 += dA_21 @ written_1
        dwritten_1 += dA_21.mT @ read_2
        dA = torch.stack([dA_11, dA_22], -3).flatten(-4, -3)

    dr, dw, dk, dbonus, u = dread, dtotal, dwritten, dA[..., 0], _per_row(u_HK, segment[0])
    dr.addcmul_(dbonus * u, k)
    dk.addcmul_(dbonus * u, r)
    du_HK = (dbonus * r * k).sum((0, 2)).unflatten(0, (segment[0].shape[0], -1)).sum(0)
    grads = [tokens(x, segment[0]) for x in (dr, dw, dk, dv)]
    return [*grads, du_HK, dstate.view_as(dstate_BHKV)]


class _Level(NamedTuple):
    """What the tokens of every block of h read from before it and write to after it."""

    read: Tensor  # R [N, G, L, K]
    written: Tensor  # W [N, G, L, K]
    total: Tensor  # sums of w [N, G, L / h, K]
    h: int


def _levels(r: Tensor, w: Tensor, k: Tensor) -> list[_Level]:
    """Return the levels of 1, 2, 4, … L tokens."""
    found = [_Level(r, k, w, 1)]
    while found[-1].h < r.shape[-2]:
        read, written, total, h = found[-1]
        (read_1, read_2), (written_1, written_2) = _halves(read, h), _halves(written, h)
        total_1, total_2 = _halves(total, 1)
        read = _join(read_1, read_2 * total_1.exp())
        written = _join(written_1 * total_2.exp(), written_2)
        found.append(_Level(read, written, (total_1 + total_2).squeeze(-2), 2 * h))
    return found


def _pairs(halvings: Sequence[_Level], bonus: Tensor) -> Tensor:
    """Return A [N, G, L, L] with the bonus [N, G, L] on its diagonal."""
    A = bonus[..., None, None]  # within blocks of h [N, G, M, h, h]
    for read, written, _, h in halvings:
        A_21 = _halves(read, h)[1] @ _halves(written, h)[0].mT
        A_11, A_22 = A.unflatten(-3, (-1, 2)).unbind(-3)
        A = torch.cat([F.pad(A_11, (0, h)), torch.cat([A_21, A_22], -1)], -2)
    return A.squeeze(-3)


def _halves(x: Tensor, h: int) -> tuple[Tensor, ...]:
    """Cut [N, G, L, X] into blocks of two halves of h; return the first and the second halves."""
    return x.unflatten(-2, (-1, 2, h)).unbind(-3)


def _join(x_1: Tensor, x_2: Tensor) -> Tensor:
    """Put first and second halves together to [N, G, L, X]."""
    return torch.cat([x_1, x_2], -2).flatten(-3, -2)


def _length(x_BTHX: Tensor) -> int:
    """Return the length of a chunk: the least power of 2 that holds all tokens, or CHUNK."""
    L = 1
    while min(x_BTHX.shape[1], CHUNK) > L:
        L *= 2
    return L


def _per_row(u_HK: Tensor, like_BTHX: Tensor) -> Tensor:
    """Return u as [G, 1, K], the same for every sequence of the batch."""
    return u_HK.expand(like_BTHX.shape[0], *u_HK.shape).flatten(0, 1)[:, None]
