"""The norm behind a recurrence: each head on its own."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["head_norm"]


def head_norm(y_H1V: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """Normalise rows [..., H, 1, V], then scale and shift each channel (GroupNorm over heads)."""
    rows = (-1, 1, y_H1V.shape[-1])
    y_H1V = F.layer_norm(y_H1V, rows[-1:], eps=eps)
    return y_H1V * weight_D.view(rows) + bias_D.view(rows)
