"""One layer of the trunk: spatial mix and channel mix of a generation, norms, residuals."""

from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_vision.mixers import NORM_EPS, ChannelMix, SpatialMix
from rwkv_vision.mixers2d import SpatialMix2d
from rwkv_vision.mixers6 import SpatialMix6
from rwkv_vision.mixers7 import ImageChannelMix7, SpatialMix7

__all__ = ["Block", "ValueBlock", "make_block"]


class Block(nn.Module):
    """Spatial mix and channel mix, each with a LayerNorm, a residual and stochastic depth.

    The first block also normalises its input, and that norm replaces the trunk.

    Args:
        att: spatial mix.
        ffn: channel mix.
        dim: width C.
        first: whether this is the first block.
        post_norm: normalise what the mixers return in place of what they get.
        init_values: start of a factor per channel on what the mixers return; None is no factor.
        drop_path: chance that a sample skips a mixer.
    """

    gamma1: Tensor | None
    gamma2: Tensor | None

    def __init__(
        self,
        att: nn.Module,
        ffn: nn.Module,
        dim: int,
        *,
        first: bool,
        post_norm: bool,
        init_values: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.ln0 = nn.LayerNorm(dim, NORM_EPS) if first else nn.Identity()
        self.ln1 = nn.LayerNorm(dim, NORM_EPS)
        self.ln2 = nn.LayerNorm(dim, NORM_EPS)
        self.att, self.ffn = att, ffn
        for name in ("gamma1", "gamma2"):
            scale = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))
            self.register_parameter(name, scale)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map an image of features [B, H, W, C]."""
        x_BHWC = self.ln0(x_BHWC)
        y_BHWC = self.att(x_BHWC if self.post_norm else self.ln1(x_BHWC))
        return self.mix_channels(self.add(x_BHWC, y_BHWC))

    def add(self, x_BHWC: Tensor, y_BHWC: Tensor) -> Tensor:
        """Add to the trunk what the spatial mix returned."""
        if self.post_norm:
            y_BHWC = self.ln1(y_BHWC)
        gamma = self.gamma1
        return x_BHWC + self.drop_path(y_BHWC if gamma is None else y_BHWC * gamma)

    def mix_channels(self, x_BHWC: Tensor) -> Tensor:
        """Run the second half of the block."""
        return self.add_channels(x_BHWC, self.ffn(x_BHWC if self.post_norm else self.ln2(x_BHWC)))

    def add_channels(self, x_BHWC: Tensor, y_BHWC: Tensor) -> Tensor:
        """Add to the trunk what the channel mix returned."""
        if self.post_norm:
            y_BHWC = self.ln2(y_BHWC)
        gamma = self.gamma2
        return x_BHWC + self.drop_path(y_BHWC if gamma is None else y_BHWC * gamma)


class ValueBlock(Block):
    """A block of generation 7, whose layers share the first one's value.

    It maps ``(x_BHWC, v_first_BTC)`` to the same, so that blocks follow one another as any others
    do; the first one gets the image of features alone.
    """

    def forward(  # type: ignore[override]
        self, x: Tensor | tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Map an image of features [B, H, W, C], and the first value [B, T, C]."""
        x_BHWC, v_first = x if isinstance(x, tuple) else (x, None)
        x_BHWC = self.ln0(x_BHWC)
        y_BHWC, v_first = self.att(x_BHWC if self.post_norm else self.ln1(x_BHWC), v_first)
        return self.mix_channels(self.add(x_BHWC, y_BHWC)), v_first


def make_block(
    mixer: str,
    dim: int,
    *,
    layer: int,
    depth: int,
    head_dim: int,
    hidden_rate: int,
    key_norm: bool,
    weight_std: float | None,
    impl: str,
    **options: Any,
) -> Block:
    """Return one block of a generation; arguments as in :class:`rwkv_vision.encoder.VRWKV`.

    Raises:
        ConfigError: an unknown ``mixer``, an option that its generation does not have, or heads
            that do not fill the width.
    """
    at: dict[str, Any] = {"layer": layer, "depth": depth}
    options["first"] = layer == 0
    if mixer == "vrwkv7":
        if key_norm:
            raise ConfigError("mixer 'vrwkv7' has no key_norm; its keys are of unit length")
        att7 = SpatialMix7(dim, head_dim=head_dim, impl=impl, **at)
        ffn7 = ImageChannelMix7(dim, head_dim=head_dim, hidden_rate=hidden_rate, **at)
        return ValueBlock(att7, ffn7, dim, **options)
    norms: dict[str, Any] = {"key_norm": key_norm, "weight_std": weight_std}
    if mixer == "vrwkv6":
        att: nn.Module = SpatialMix6(dim, head_dim=head_dim, impl=impl, **at, **norms)
    elif mixer == "vrwkv":
        att = SpatialMix(dim, impl=impl, **at, **norms)
    elif mixer == "vrwkv_2d":
        att = SpatialMix2d(dim, impl=impl, **at, **norms)
    else:
        known = ("vrwkv", "vrwkv6", "vrwkv7", "vrwkv_2d")
        raise ConfigError(f"unknown mixer {mixer!r}; {did_you_mean(mixer, known)}")
    heads = dim // head_dim if mixer == "vrwkv6" else 1
    ffn = ChannelMix(dim, hidden_rate=hidden_rate, heads=heads, **at, **norms)
    return Block(att, ffn, dim, **options)
