r"""WKV-4 as an associative scan: log₂ T rounds over the whole sequence at once.

A stretch of n tokens is (max, num, den), the sums of the recurrence scaled by e^-max. A stretch of
m tokens followed by one of n is

    max = max(max₁ + n w, max₂)
    num = e^(max₁ + n w - max) num₁ + e^(max₂ - max) num₂        den likewise

Each round joins to every stretch the equally long one before it; after round i, position t holds
the last 2^i tokens up to t. The state before the sequence is a stretch of its own at position 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State4 = tuple[Tensor, Tensor, Tensor]


def wkv4_scan(
    w_D: Tensor, u_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state: State4
) -> tuple[Tensor, State4]:
    """Return ``(y_BTD, state)``; every argument already in the state's dtype."""
    # S = T + 1 positions: the state, then the tokens
    num, den, top = (x_BD[:, None] for x_BD in state)
    top = torch.cat([top, k_BTD], 1)
    sums = torch.stack([torch.cat([num, v_BTD], 1), F.pad(den, (0, 0, 0, k_BTD.shape[1]), value=1)])
    n = 1
    while n < top.shape[1]:
        faded = top[:, :-n] + n * w_D
        here = top[:, n:]
        best = torch.maximum(faded, here).detach()
        joined = (faded - best).exp() * sums[:, :, :-n] + (here - best).exp() * sums[:, :, n:]
        top = torch.cat([top[:, :n], best], 1)
        sums = torch.cat([sums[:, :, :n], joined], 2)
        n *= 2

    before, now = top[:, :-1], u_D + k_BTD
    best = torch.maximum(before, now).detach()
    past, new = (before - best).exp(), (now - best).exp()
    (num, last_num), (den, last_den) = ((x[:, :-1], x[:, -1]) for x in sums)
    y_BTD = (past * num + new * v_BTD) / (past * den + new)
    return y_BTD, (last_num, last_den, top[:, -1])
