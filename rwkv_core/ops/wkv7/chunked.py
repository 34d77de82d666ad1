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

The adjoint is the same sweep over the chunks, backward in time, with what is read and what is
written exchanged and A transposed: from ∂Y and ∂S_L it finds ∂V, ∂Z and ∂S₀. What is left are
products inside each chunk. With R = (r, a), W = (k, b), U = (V, Z) and E = (∂Y, ∂Z), rows of one
below those of the other, all decays taken from the middle of the chunk:

    ∂A = E Uᵀ where A is not 0,   ∂R = ∂A W + E S₀ᵀ,   ∂W = ∂Aᵀ R + U ∂S_Lᵀ
    ∂g = r∂r - k∂k - b∂b, plus Σ_v S_L∂S_L at the last token,   ∂e = a∂a
    ∂w_t = Σ_{s≥t} (∂g + ∂e)_s - ∂e_t

Nothing is divided by a decay. Kept for it: the inputs, Z and the state at every chunk. Both passes
take some chunks at a time, so that what they need in between stays in the processor's cache.

Range: decays are split around the middle of the chunk, so that exponents stay below
``CHUNK / 2 · max|w|``. RWKV-7 bounds |w| by exp(-1/2) = 0.6065; there outputs and gradients are
within 2e-6 of the largest value in fp32. Any |w| ≤ 5 is safe from overflow, but the gradient of w,
which fades with e^w there while the terms that it is a difference of do not, is only within 5e-5.
The reference has no such limit.

Shapes: B batch, T time, H heads, K key dim, V value dim; G = B·H, N chunks of L tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rwkv_core.ops._chunks import chunks, segments, tokens
from rwkv_core.ops._common import differentiable_again

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
    """Return ``(y_BTHV, state_BHKV)`` in plain operations that trace, export and differentiate.

    Every argument is already in the state's dtype.
    """
    if v_BTHV.shape[1] == 0:
        return v_BTHV, state_BHKV
    y_BTHV, _, states = _forward(r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV)
    return y_BTHV, states[-1].view_as(state_BHKV)


class WKV7Chunked(torch.autograd.Function):
    """The chunked form with its own adjoint, for eager code; T ≥ 1."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return what ``wkv7_chunked`` does."""
        *sequences, state_BHKV = inputs
        outputs, kept = [], []
        for segment in segments(sequences, CHUNK):
            y_BTHV, found, states = _forward(*segment, state_BHKV)
            state_BHKV = states[-1].view_as(state_BHKV)
            outputs.append(y_BTHV)
            if any(ctx.needs_input_grad):
                kept += [found, torch.stack(states)]
        ctx.save_for_backward(*inputs, *kept)
        return torch.cat(outputs, 1), state_BHKV

    @staticmethod
    @differentiable_again(wkv7_chunked)
    def backward(ctx: Any, dy_BTHV: Tensor, dstate_BHKV: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the seven inputs."""
        saved = ctx.saved_tensors  # once: checkpoints allow no more
        (*sequences, _), kept = saved[:7], saved[7:]
        parts = segments([*sequences, dy_BTHV], CHUNK)
        grads = []
        for segment, found, states in [*zip(parts, kept[::2], kept[1::2], strict=True)][::-1]:
            *grad, dstate_BHKV = _backward(segment, dstate_BHKV, found, states)
            grads.append(grad)
        return (*(torch.cat(x[::-1], 1) for x in zip(*grads, strict=True)), dstate_BHKV)


def _forward(*inputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y [B, T, H, V], Z and the states."""
    *sequences, state_BHKV = inputs
    r, w, k, v, a, b = (chunks(x, min(CHUNK, x.shape[1])) for x in sequences)
    c = _inside(r, w, k, a, b)
    read, written = c.read * c.from_start, c.written * c.to_end
    state = state_BHKV.flatten(0, 1)
    y, found, states = _sweep(v, c.A, c.inverse, read, written, c.decay, state, step=1)
    return tokens(y, sequences[0]), found, states


def _backward(
    segment: Sequence[Tensor], dstate_BHKV: Tensor, found: Tensor, states: Tensor
) -> list[Tensor]:
    """Return the gradients of r, w, k, v, a, b [B, T, H, X] and the state [B, H, K, V]."""
    r, w, k, v, a, b, dy = (chunks(x, min(CHUNK, x.shape[1])) for x in segment)
    c = _inside(r, w, k, a, b)
    read, written = c.read * c.from_start, c.written * c.to_end
    A, inverse, dstate = c.A.mT, c.inverse.mT, dstate_BHKV.flatten(0, 1)
    dv, dfound, dstates = _sweep(dy, A, inverse, written, read, c.decay, dstate, step=-1)
    before, after, dafter = states[:-1], states[1:], torch.stack(dstates[1:])
    U, E = torch.cat([v, found], -2), torch.cat([dy, dfound], -2)
    dA = (E @ U.mT).mul_(~c.above)
    dR = (dA @ c.written).addcmul_(E @ before.mT, c.from_start)
    dW = (dA.mT @ c.read).addcmul_(U @ dafter.mT, c.to_end)
    rdr, ada = (c.read * dR).chunk(2, -2)
    kdk, bdb = (c.written * dW).chunk(2, -2)
    dg = rdr + ada - kdk - bdb
    dg[..., -1, :] += (after * dafter).sum(-1)
    dw = dg.flip(-2).cumsum(-2).flip(-2) - ada
    (dr, da), (dk, db) = dR.chunk(2, -2), dW.chunk(2, -2)
    grads = (dr * c.grow, dw, dk * c.shrink, dv, da * c.grow_before, db * c.shrink)
    return [*(tokens(x, segment[0]) for x in grads), dstates[0].view_as(dstate_BHKV)]


class _Inside(NamedTuple):
    """What the tokens of a chunk are to each other, and to the states around it."""

    A: Tensor  # rows r and a, columns k and b [N, G, 2L, 2L]
    above: Tensor  # whether A is 0 there [2L, 2L]
    inverse: Tensor  # (I - A_ab)⁻¹ [N, G, L, L]
    read: Tensor  # R: r and a, decayed from the middle [N, G, 2L, K]
    written: Tensor  # W: k and b, decayed to the middle [N, G, 2L, K]
    from_start: Tensor  # decay from the state before to the middle [N, G, 1, K]
    to_end: Tensor  # decay from the middle to the state after [N, G, 1, K]
    decay: Tensor  # from state to state [N, G, K, 1]
    grow: Tensor  # the decay in R of r [N, G, L, K],
    grow_before: Tensor  # of a,
    shrink: Tensor  # and in W


def _inside(r: Tensor, w: Tensor, k: Tensor, a: Tensor, b: Tensor) -> _Inside:
    L = r.shape[-2]
    g = w.cumsum(-2)
    middle = (L - 1) // 2
    mid, end = g[..., middle : middle + 1, :], g[..., -1:, :]
    g = g - mid
    grow, shrink = g.exp(), (-g).exp()
    grow_before = torch.cat([(-mid).exp(), grow[..., :-1, :]], -2)
    read = torch.cat([r * grow, a * grow_before], -2)
    written = torch.cat([k * shrink, b * shrink], -2)
    t = torch.arange(L, device=r.device)
    above = torch.cat([t, t]) > torch.cat([t, t - 1])[:, None]
    # above the diagonal is what overflows: it must go, not be multiplied by 0
    A = (read @ written.mT).masked_fill(above, 0)
    unit = torch.eye(L, dtype=r.dtype, device=r.device)
    A_ab = A[..., L:, L:]
    inverse = torch.linalg.solve_triangular(unit - A_ab, unit, upper=False, unitriangular=True)
    return _Inside(
        A, above, inverse, read, written, mid.exp(), (end - mid).exp(), end.exp().mT,
        grow, grow_before, shrink,
    )  # fmt: skip


def _sweep(
    x: Tensor,
    A: Tensor,
    inverse: Tensor,
    read: Tensor,
    written: Tensor,
    decay: Tensor,
    state: Tensor,
    *,
    step: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Hand the state from chunk to chunk; return outputs, what was found, and all N + 1 states.

    Forward in time (step 1) from v and the first state, or backward (step -1) from the gradients of
    y and of the last state. What is returned is in the order of time.
    """
    L = x.shape[-2]
    near = A[..., L:, :L] @ x
    parts = (p.unbind()[::step] for p in (x, near, inverse, read, written, decay))
    outputs, found, states = [], [], [state]
    for x_n, near_n, inverse_n, read_n, written_n, decay_n in zip(*parts, strict=True):
        output, far = (read_n @ state).split(L, -2)
        outputs.append(output)
        found.append(inverse_n @ (near_n + far))
        both = torch.cat([x_n, found[-1]], -2)
        state = torch.baddbmm(decay_n * state, written_n.mT, both)
        states.append(state)
    z = torch.stack(found[::step])
    y = torch.stack(outputs[::step]) + A[..., :L, :] @ torch.cat([x, z], -2)
    return y, z, states[::step]
