r"""WKV-4, the truth: the recurrence of RWKV-4 as a loop over time, one number per channel.

    y_t = (Σ_{j<t} e^((t-1-j) w + k_j) v_j + e^(u + k_t) v_t) / (the same sum without v)

``w`` is the log-decay (≤ 0) and ``u`` the bonus of the current token. The sums are carried scaled:
``num`` and ``den`` stand for num·e^max and den·e^max, so that no exponential exceeds 1. The scale
is bookkeeping without a gradient of its own; the gradient of what it stands for is exact.

Source: arXiv 2305.13048, appendix on numerical stability; BlinkDL/ChatRWKV, att_one.

Shapes: B batch, T time, D channels.
"""

import torch
from torch import Tensor

State4 = tuple[Tensor, Tensor, Tensor]


def wkv4_reference(
    w_D: Tensor, u_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state: State4
) -> tuple[Tensor, State4]:
    """Return ``(y_BTD, state)``; every argument already in the state's dtype."""
    outputs = []
    for t in range(k_BTD.shape[1]):
        y_BD, state = wkv4_step(w_D, u_D, k_BTD[:, t], v_BTD[:, t], state)
        outputs.append(y_BD)
    return (torch.stack(outputs, 1) if outputs else v_BTD), state


def wkv4_step(
    w_D: Tensor, u_D: Tensor, k_BD: Tensor, v_BD: Tensor, state: State4
) -> tuple[Tensor, State4]:
    """Advance the state by one token and return ``(y_BD, state)``: the body of the loop.

    Any number of leading axes. Plain operations only: this is what exports.
    """
    num, den, top = state
    now = u_D + k_BD
    best = torch.maximum(top, now).detach()
    past, new = (top - best).exp(), (now - best).exp()
    y_BD = (past * num + new * v_BD) / (past * den + new)

    faded = top + w_D
    best = torch.maximum(faded, k_BD).detach()
    past, new = (faded - best).exp(), (k_BD - best).exp()
    return y_BD, (past * num + new * v_BD, past * den + new, best)
