"""Token shift: every token sees the one before it."""

import torch
from torch import Tensor

__all__ = ["token_shift"]


def token_shift(x_BTD: Tensor, last_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the previous token at each position [B, T, D], and the last token [B, D] to carry.

    ``last_BD`` is what came before the sequence (zeros at a document's start). T = 0 carries it on.
    """
    x_BSD = torch.cat([last_BD[:, None].to(x_BTD.dtype), x_BTD], 1)  # S = T + 1
    return x_BSD[:, :-1], x_BSD[:, -1]
