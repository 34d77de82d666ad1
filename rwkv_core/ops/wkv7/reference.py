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
        y_BHV, state_BHKV = wkv7_step(
            r_BTHK[:, t], w_BTHK[:, t], k_BTHK[:, t], v_BTHV[:, t], a_BTHK[:, t], b_BTHK[:, t],
            state_BHKV,
        )  # fmt: skip
        outputs.append(y_BHV)
    return (torch.stack(outputs, 1) if outputs else v_BTHV), state_BHKV


def wkv7_step(
    r_BHK: Tensor,
    w_BHK: Tensor,
    k_BHK: Tensor,
    v_BHV: Tensor,
    a_BHK: Tensor,
    b_BHK: Tensor,
    state_BHKV: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance the state by one token and return ``(y_BHV, state_BHKV)``: the body of the loop."""
    removed_BH1V = a_BHK[..., None, :] @ state_BHKV
    state_BHKV = (
        w_BHK.exp()[..., None] * state_BHKV
        + b_BHK[..., None] * removed_BH1V
        + k_BHK[..., None] * v_BHV[..., None, :]
    )
    y_BH1V = r_BHK[..., None, :] @ state_BHKV
    return y_BH1V[..., 0, :], state_BHKV
