r"""WKV-6, the truth: the recurrence of RWKV-5 and RWKV-6 as a loop over time.

    y_t = r_tᵀ (S_{t-1} + diag(u) k_t v_tᵀ)                            [V]
    S_t = diag(exp w_t) S_{t-1} + k_t v_tᵀ                             [K, V] per head

``w`` is the log-decay, ``u`` the bonus of the current token. The output reads the state *before*
the update. RWKV-5 is the case of a decay that is the same for every token.

Source: arXiv 2404.05892, section 4; official code BlinkDL/RWKV-LM, RWKV-v5 and RWKV-v6.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

import torch
from torch import Tensor


def wkv6_reference(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    u_HK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHV, state_BHKV)``; every argument already in the state's dtype."""
    outputs = []
    for t in range(v_BTHV.shape[1]):
        r, w, k, v = (x[:, t, :, None] for x in (r_BTHK, w_BTHK, k_BTHK, v_BTHV))
        y_BH1V, state_BHKV = wkv6_step(r, w, k, v, u_HK[:, None], state_BHKV)
        outputs.append(y_BH1V.squeeze(-2))
    return (torch.stack(outputs, 1) if outputs else v_BTHV), state_BHKV


def wkv6_step(
    r_BH1K: Tensor,
    w_BH1K: Tensor,
    k_BH1K: Tensor,
    v_BH1V: Tensor,
    u_H1K: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token and return ``(y_BH1V, state_BHKV)``: the body of the loop.

    Vectors are rows, in the state's dtype (``w`` may be in fp64); any number of leading axes. Plain
    operations only: this is what exports.
    """
    new_BHKV = k_BH1K.mT @ v_BH1V
    y_BH1V = r_BH1K @ (state_BHKV + u_H1K.mT * new_BHKV)
    decay_BH1K = w_BH1K.exp().to(state_BHKV.dtype)
    return y_BH1V, decay_BH1K.mT * state_BHKV + new_BHKV
