"""Q-Shift: every quarter of the channels looks one pixel left, right, up or down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QShift"]


class QShift(nn.Module):
    """Give every pixel the features of its four neighbours, a group of channels from each.

    Channels [0, g) come from the left, [g, 2g) from the right, [2g, 3g) from above, [3g, 4g) from
    below, with g = ⌊gamma·C⌋; the rest stay. Beyond the border there are zeros. No parameters.

    Source: arXiv 2403.02308, section 3.3; the border is that of the authors' code.

    Args:
        dim: number of channels C.
        gamma: share of the channels taken from each side, at most 1/4.
        shift_pixel: how far to look, at least 1.

    Raises:
        ValueError: ``gamma`` or ``shift_pixel`` outside its range.
    """

    def __init__(self, dim: int, *, gamma: float = 0.25, shift_pixel: int = 1) -> None:
        super().__init__()
        if not 0 <= gamma <= 0.25:
            raise ValueError(f"gamma must be within 0 and 1/4, got {gamma}")
        if shift_pixel < 1:
            raise ValueError(f"shift_pixel must be at least 1, got {shift_pixel}")
        group = int(dim * gamma)
        self.sizes = [group, group, group, group, dim - 4 * group]
        self.pixels = shift_pixel

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shift an image of features [B, H, W, C]."""
        p = self.pixels
        left, right, up, down, rest = x_BHWC.split(self.sizes, -1)
        # a negative pad crops, so that each group moves in one operation
        moved = [
            F.pad(left, [0, 0, p, -p]),
            F.pad(right, [0, 0, -p, p]),
            F.pad(up, [0, 0, 0, 0, p, -p]),
            F.pad(down, [0, 0, 0, 0, -p, p]),
            rest,
        ]
        return torch.cat(moved, -1)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"sizes={self.sizes}, shift_pixel={self.pixels}"
