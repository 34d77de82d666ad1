"""Q-Shift: every quarter of the channels looks one pixel left, right, up or down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["QShift"]


class QShift(nn.Module):
    """Give every pixel the features of its four neighbours, a group of channels from each.

    Channels [0, g) come from the left, [g, 2g) from the right, [2g, 3g) from above, [3g, 4g) from
    below, with g = ⌊gamma·C⌋; the rest stay. Beyond the border there are zeros. No parameters. With
    several heads the same happens within the channels of each.

    Source: arXiv 2403.02308, section 3.3; the border and the heads are those of the authors' code.

    Args:
        dim: number of channels C.
        gamma: share of the channels taken from each side, at most 1/4.
        shift_pixel: how far to look, at least 1.
        heads: number of heads, a divisor of C.

    Raises:
        ValueError: ``gamma``, ``shift_pixel`` or ``heads`` outside its range.
    """

    def __init__(
        self, dim: int, *, gamma: float = 0.25, shift_pixel: int = 1, heads: int = 1
    ) -> None:
        super().__init__()
        if not 0 <= gamma <= 0.25:
            raise ValueError(f"gamma must be within 0 and 1/4, got {gamma}")
        if shift_pixel < 1:
            raise ValueError(f"shift_pixel must be at least 1, got {shift_pixel}")
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide {dim} channels, got {heads}")
        group = int(dim // heads * gamma)
        self.sizes = [group, group, group, group, dim // heads - 4 * group]
        self.pixels, self.heads = shift_pixel, heads
        # of channels (and heads), columns, rows; a negative pad crops, so each group moves at once
        inner = [0, 0] if heads == 1 else [0, 0, 0, 0]
        moves = ((1, 0), (-1, 0), (0, 1), (0, -1))
        p = shift_pixel
        self.pads = [[*inner, p * dx, -p * dx, p * dy, -p * dy] for dx, dy in moves]

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shift an image of features [B, H, W, C]."""
        if self.heads > 1:
            x_BHWC = x_BHWC.unflatten(-1, [self.heads, -1])
        left, right, up, down, rest = x_BHWC.split(self.sizes, -1)
        moved = [
            F.pad(left, self.pads[0]),
            F.pad(right, self.pads[1]),
            F.pad(up, self.pads[2]),
            F.pad(down, self.pads[3]),
            rest,
        ]
        x_BHWC = torch.cat(moved, -1)
        return x_BHWC.flatten(-2) if self.heads > 1 else x_BHWC

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"sizes={self.sizes}, shift_pixel={self.pixels}, heads={self.heads}"
