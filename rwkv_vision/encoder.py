"""Vision-RWKV as a timm model: patches, a trunk of VRWKV blocks over [B, H, W, C], a head.

Importing this module registers the models below with timm. Tokens stay an image throughout, so a
block is ``block(x)`` for any image size, and timm's features, intermediates, checkpointing and
tracing work as for a convolutional network.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    DropPath,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_core.errors import RWKVError
from rwkv_vision.mixers import ChannelMix, SpatialMix

__all__ = ["VRWKV"]

NORM_EPS = 1e-5  # the authors'; timm's own models use 1e-6


class Block(nn.Module):
    """Spatial mix and channel mix, each behind a LayerNorm, a residual and stochastic depth.

    The first block also normalises its input, and that norm replaces the trunk.
    """

    def __init__(
        self,
        dim: int,
        *,
        layer: int,
        depth: int,
        hidden_rate: int,
        drop_path: float,
        weight_std: float | None,
        impl: str,
    ) -> None:
        super().__init__()
        self.ln0 = nn.LayerNorm(dim, NORM_EPS) if layer == 0 else nn.Identity()
        self.ln1 = nn.LayerNorm(dim, NORM_EPS)
        self.ln2 = nn.LayerNorm(dim, NORM_EPS)
        self.att = SpatialMix(dim, layer=layer, depth=depth, weight_std=weight_std, impl=impl)
        self.ffn = ChannelMix(
            dim, layer=layer, depth=depth, hidden_rate=hidden_rate, weight_std=weight_std
        )
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map an image of features [B, H, W, C]."""
        x_BHWC = self.ln0(x_BHWC)
        x_BHWC = x_BHWC + self.drop_path(self.att(self.ln1(x_BHWC)))
        return x_BHWC + self.drop_path(self.ffn(self.ln2(x_BHWC)))


class VRWKV(nn.Module):
    """Vision-RWKV: linear in the number of pixels, global from the first layer, any image size.

    Args:
        img_size: height and width the position embedding is made for; others resample it.
        patch_size: side of a patch; images are padded right and below to whole patches.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 leaves it out.
        global_pool: timm's name of the pooling.
        embed_dim: width C.
        depth: number of blocks.
        hidden_rate: inner width of the channel mix, as a multiple of C.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, falling linearly to 0 at the first.
        weight_std: of the linear maps at the start. The authors' 0.02 is made for C = 192 and
            more; narrow models learn sooner from 1/√(inputs), which is None.
        impl: implementation of the op, as in :func:`rwkv_core.ops.bi_wkv`.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        hidden_rate: int = 4,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_std: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.output_fmt = "NHWC"
        self.grad_checkpointing = False
        self.weight_std = weight_std
        self.patch_embed = PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            output_fmt="NHWC",
            strict_img_size=False,
            dynamic_img_pad=True,
        )
        # whole patches after padding, where timm counts whole patches before it
        rows, columns = self.patch_embed.dynamic_feat_size(self.patch_embed.img_size)
        self.grid = [rows, columns]
        self.pos_embed = nn.Parameter(torch.zeros(1, rows * columns, embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates: list[float] = calculate_drop_path_rates(drop_path_rate, depth)  # type: ignore
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    layer=i,
                    depth=depth,
                    hidden_rate=hidden_rate,
                    drop_path=rates[i],
                    weight_std=weight_std,
                    impl=impl,
                )
                for i in range(depth)
            )
        )
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(embed_dim, NORM_EPS)
        self.head = ClassifierHead(
            embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
        )
        self._reset_head()

    def _reset_head(self) -> None:
        """Initialise the classifier: weight normal of σ = weight_std or 1/√C, bias 0."""
        if isinstance(self.head.fc, nn.Linear):
            std = self.weight_std or self.head.fc.in_features**-0.5
            trunc_normal_(self.head.fc.weight, std=std, a=-2 * std, b=2 * std)
            nn.init.zeros_(self.head.fc.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return what timm's optimisers must not decay: position embedding and interpolation."""
        return {n for n, _ in self.named_parameters() if n == "pos_embed" or "spatial_mix" in n}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's grouping of parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def set_input_size(
        self,
        img_size: int | tuple[int, int] | None = None,
        patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the size the position embedding is made for, resampling it, or the patches'."""
        self.patch_embed.set_input_size(img_size=img_size, patch_size=patch_size)
        rows, columns = self.patch_embed.dynamic_feat_size(self.patch_embed.img_size)
        with torch.no_grad():
            self.pos_embed = nn.Parameter(self._resampled(rows, columns).contiguous())
        self.grid = [rows, columns]

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Return the last linear map."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes leave it out."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self._reset_head()

    @torch.jit.ignore
    def check_decay(self, error: type[RWKVError]) -> None:
        """Raise ``error`` naming the layer whose decay left the range of prefix sums."""
        for module in self.modules():
            if isinstance(module, SpatialMix):
                module.check_decay(error)

    def _resampled(self, rows: int, columns: int) -> Tensor:
        # the authors resample without antialiasing, which is timm's default
        return resample_abs_pos_embed(
            self.pos_embed,
            new_size=[rows, columns],
            old_size=self.grid,
            num_prefix_tokens=0,
            antialias=False,
        )

    def embed(self, x_BCHW: Tensor) -> Tensor:
        """Return the patches' features with their positions [B, H, W, C]."""
        x_BHWC = self.patch_embed(x_BCHW)
        rows, columns = x_BHWC.shape[1], x_BHWC.shape[2]
        pos_BHWC = self._resampled(rows, columns).reshape(1, rows, columns, -1)
        return self.pos_drop(x_BHWC + pos_BHWC)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the final features [B, H, W, C] and those after chosen blocks.

        Args:
            x: images [B, C, H, W].
            indices: the last n blocks if int, all if None.
            norm: whether the final norm is applied to every one of them.
            stop_early: whether to skip the blocks after the last chosen one.
            output_fmt: ``"NCHW"`` or ``"NHWC"``, of the intermediates.
            intermediates_only: leave the final features out.

        Raises:
            ValueError: an unknown ``output_fmt``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NHWC', got {output_fmt!r}")
        take, last = feature_take_indices(len(self.blocks), indices)
        x = self.embed(x)
        found = []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
            if i in take:
                y = self.norm(x) if norm else x
                found.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Remove the blocks after the last chosen one, and the norm and head if asked."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Map images [B, C, H, W] to normalised features [B, H, W, C]."""
        x_BHWC = self.embed(x_BCHW)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x_BHWC = checkpoint_seq(self.blocks, x_BHWC, use_reentrant=False)
        else:
            x_BHWC = self.blocks(x_BHWC)
        return self.norm(x_BHWC)

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features and classify them."""
        return self.head(x_BHWC, pre_logits=pre_logits)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x_BCHW))


def _cfg(*, input_size: tuple[int, int, int], patch: int, crop_pct: float) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": input_size,
        "pool_size": (input_size[1] // patch, input_size[2] // patch),
        "crop_pct": crop_pct,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {
        "vrwkv_tiny_patch16_224.untrained": _cfg(
            input_size=(3, 224, 224), patch=16, crop_pct=0.875
        ),
        "vrwkv_nano_patch4_28.untrained": _cfg(input_size=(3, 28, 28), patch=4, crop_pct=1.0),
        "test_vrwkv.untrained": _cfg(input_size=(3, 64, 64), patch=16, crop_pct=1.0),
    }
)


def _create(variant: str, pretrained: bool, sizes: Mapping[str, Any], given: Any) -> VRWKV:
    options = {**sizes, **given}
    depth = options["depth"]
    n_features = min(depth, 4)
    evenly = tuple(depth * (i + 1) // n_features - 1 for i in range(n_features))
    return build_model_with_cfg(
        VRWKV,
        variant,
        pretrained,
        feature_cfg={"out_indices": evenly, "feature_cls": "getter"},
        **options,
    )


@register_model
def vrwkv_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV-T of the paper: 6,155,176 parameters with 1000 classes."""
    sizes = {"img_size": 224, "embed_dim": 192, "depth": 12, "weight_std": 0.02}
    return _create("vrwkv_tiny_patch16_224", pretrained, sizes, kwargs)


@register_model
def vrwkv_nano_patch4_28(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Four narrow layers for small images, such as handwritten digits."""
    sizes = {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4}
    return _create("vrwkv_nano_patch4_28", pretrained, sizes, kwargs)


@register_model
def test_vrwkv(pretrained: bool = False, **kwargs: Any) -> VRWKV:  # noqa: PT028 - no test
    """Three layers that tests can afford."""
    sizes = {"img_size": 64, "embed_dim": 32, "depth": 3}
    return _create("test_vrwkv", pretrained, sizes, kwargs)
