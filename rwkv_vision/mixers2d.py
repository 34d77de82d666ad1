"""VRWKV with a decay over rows and columns: the mean over patches by their distance in the plane.

Q-Shift, projections, gate and channel mix are those of :mod:`rwkv_vision.mixers`, whose glossary
and parameter names hold here too. What differs is the recurrence: in place of the distance along
the sequence of rows, where the patch below is as far as the image is wide, columns and rows apart
count, each with a decay of its own.

    symbol   meaning                                      shape   computed as
    w_x w_y  decay over the whole width and height        [C]     spatial_decay_x, spatial_decay_y
    y        mean of all values, weighted by key and      [B, H, W, C]    ops/bi_wkv_2d
             distance

Any ``vrwkv_*`` model takes it by ``mixer="vrwkv_2d"``; the authors have no weights of it.
"""

from typing import ClassVar

import torch
from torch import Tensor

from rwkv_core.errors import RWKVError
from rwkv_core.ops.bi_wkv import check_decay
from rwkv_core.ops.bi_wkv_2d import bi_wkv_2d
from rwkv_core.ops.bi_wkv_2d.prefix import bi_wkv_2d_prefix
from rwkv_vision.mixers import SpatialMix

__all__ = ["SpatialMix2d"]


def _bi_wkv_2d(
    w_x_C: Tensor, w_y_C: Tensor, u_C: Tensor, k_BHWC: Tensor, v_BHWC: Tensor, impl: str
) -> Tensor:
    """Run the op; TorchScript, which takes no keyword-only arguments, gets its plain operations."""
    if torch.jit.is_scripting():
        dtype = torch.float64 if v_BHWC.dtype == torch.float64 else torch.float32
        w_x_C, w_y_C, u_C = w_x_C.to(dtype), w_y_C.to(dtype), u_C.to(dtype)
        y_BHWC = bi_wkv_2d_prefix(w_x_C, w_y_C, u_C, k_BHWC.to(dtype), v_BHWC.to(dtype))
        return y_BHWC.to(v_BHWC.dtype)
    else:
        return bi_wkv_2d(w_x_C, w_y_C, u_C, k_BHWC, v_BHWC, impl=impl)


# one node of a traced graph: feature extraction by torch.fx must not look inside
torch.fx.wrap("_bi_wkv_2d")


class SpatialMix2d(SpatialMix):
    """Spatial mixing by the distance in the plane; arguments and use as of :class:`SpatialMix`.

    Both decays start as the one of VRWKV does: like it they are scaled by the size they run over.
    """

    full_precision = frozenset(("spatial_decay_x", "spatial_decay_y", "spatial_first"))
    decays: ClassVar[tuple[str, ...]] = ("spatial_decay_x", "spatial_decay_y")
    spatial_decay_x: Tensor
    spatial_decay_y: Tensor

    def recur(self, k_BHWC: Tensor, v_BHWC: Tensor) -> Tensor:
        """Return the mean of all values for each patch [B, H, W, C]."""
        w_x, w_y, u = self.spatial_decay_x, self.spatial_decay_y, self.spatial_first
        return _bi_wkv_2d(w_x, w_y, u, k_BHWC, v_BHWC, self.impl)

    @torch.jit.ignore
    def check_decay(self, error: type[RWKVError]) -> None:
        """Raise ``error`` if the decays together, or the bonus, left the range of prefix sums."""
        if self.impl != "reference":
            where = f"spatial mix of layer {self.layer}, decays of rows and columns together"
            both_C = self.spatial_decay_x.abs() + self.spatial_decay_y.abs()
            check_decay(both_C, self.spatial_first, layer=where, error=error)
