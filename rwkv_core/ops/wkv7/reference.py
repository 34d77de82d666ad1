r"""WKV-7, the truth: the recurrence of RWKV-7 as a loop over time.

    S_t = diag(exp w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ        [K, V] per head
    y_t = r_tᵀ S_t                                                     [V]

``w`` is the log-decay, ``a`` the (negated, normalised) removal key, ``b`` the replacement key
scaled by the in-context learning rate. The output reads the state *after* the update.

Source: arXiv 2503.14456, section 4.1 (there S is written V×K; here K×V, as everywhere in this
package); official code BlinkDL/RWKV-LM, RWKV-v7/train_temp.

Shapes: B batch, T time, H heads, K key dim, V value dim.
"""

import torch
from torch import Tensor


def wkv7_reference(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return ``(y_BTHV, state_BHKV)``; every argument already in the state's dtype."""
    outputs = []
    for t in range(v_BTHV.shape[1]):
        r, w, k, a, b = (x[:, t, :, None] for x in (r_BTHK, w_BTHK, k_BTHK, a_BTHK, b_BTHK))
        y_BH1V, state_BHKV = wkv7_step(r, w, k, v_BTHV[:, t, :, None], a, b, state_BHKV)
        outputs.append(y_BH1V.squeeze(-2))
    return (torch.stack(outputs, 1) if outputs else v_BTHV), state_BHKV


def wkv7_step(
    r_BH1K: Tensor,
    w_BH1K: Tensor,
    k_BH1K: Tensor,
    v_BH1V: Tensor,
    a_BH1K: Tensor,
    b_BH1K: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token and return ``(y_BH1V, state_BHKV)``: the body of the loop.

    Vectors are rows, in the state's dtype; any number of leading axes. Plain operations only: this
    is what exports.
    """
    removed_BH1V = a_BH1K @ state_BHKV
    state_BHKV = w_BH1K.exp().mT * state_BHKV + b_BH1K.mT @ removed_BH1V + k_BH1K.mT @ v_BH1V
    return r_BH1K @ state_BHKV, state_BHKV
