"""Q-Shift: every quarter of the channels looks one pixel left, right, up or down."""

import torch
from torch import Tensor, nn

from rwkv_core.ops.grid_mix import Groups, grid_mix, grid_mix_plain, grid_shift

__all__ = ["QShift"]


def _grid_mix(x_BHWC: Tensor, mix_NC: Tensor, groups: Groups, heads: int) -> list[Tensor]:
    """Run the op; TorchScript, which takes no keyword-only arguments, gets its plain operations."""
    if torch.jit.is_scripting():
        return grid_mix_plain(x_BHWC, mix_NC, groups, heads)
    else:
        return list(grid_mix(x_BHWC, mix_NC, groups, heads))


# one node of a traced graph: feature extraction by torch.fx must not look inside
torch.fx.wrap("_grid_mix")


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
        p, rest = shift_pixel, dim // heads - 4 * group
        looks = [(group, 0, -p), (group, 0, p), (group, -p, 0), (group, p, 0), (rest, 0, 0)]
        self.groups = [one for one in looks if one[0]]
        self.heads = heads

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shift an image of features [B, H, W, C]."""
        return grid_shift(x_BHWC, self.groups, self.heads)

    def mix(self, x_BHWC: Tensor, mix_NC: Tensor) -> list[Tensor]:
        """Return N mixtures ``s + (x - s)·μ_n`` of each patch with what it sees."""
        return _grid_mix(x_BHWC, mix_NC, self.groups, self.heads)

    def extra_repr(self) -> str:
        """Return what ``print`` shows."""
        return f"groups={self.groups}, heads={self.heads}"
