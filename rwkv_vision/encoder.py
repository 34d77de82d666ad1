"""Vision-RWKV as a timm model: patches, a trunk of RWKV blocks over [B, H, W, C], a head.

Tokens stay an image throughout, so a block works for any image size, and timm's features,
intermediates, checkpointing and tracing work as for a convolutional network. The models that bear
names are in :mod:`rwkv_vision.models`.
"""

from typing import Any

import torch
from timm.layers import (
    ClassifierHead,
    PatchEmbed,
    calculate_drop_path_rates,
    resample_abs_pos_embed,
    trunc_normal_,
)
from timm.models import checkpoint_seq
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_core.errors import CheckpointError, RWKVError
from rwkv_core.train.optim import param_groups
from rwkv_vision.blocks import make_block
from rwkv_vision.head import HiddenHead
from rwkv_vision.mixers import NORM_EPS, SpatialMix
from rwkv_vision.official import load_pre_hook
from rwkv_vision.positions import resampled_by_axes

__all__ = ["VRWKV"]


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
        mixer: generation of the blocks: ``"vrwkv"`` (after RWKV-4), ``"vrwkv6"`` or ``"vrwkv7"``;
            ``"vrwkv_2d"`` is the first with distances in the plane, not along the rows.
        head_dim: head size of generations 6 and 7, a divisor of C.
        hidden_rate: inner width of the channel mix, as a multiple of C.
        key_norm: further norms within the mixers, which the authors' largest model has; not for 7.
        post_norm: normalise what mixers return, not what they get.
        init_values: start of a factor per channel on what mixers return; None is no factor.
        head_hidden: width of a hidden layer in the head; 0 is none.
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the position embedding.
        drop_path_rate: stochastic depth of the last block, falling linearly to 0 at the first.
        weight_std: of the linear maps at the start. The authors' 0.02 is made for C = 192 and
            more; narrow models learn sooner from 1/√(inputs), which is None. The mixers of
            generation 7 keep their own law.
        impl: implementation of the generation's op, as in :func:`rwkv_core.ops.bi_wkv`.

    Raises:
        ConfigError: sizes or options that do not fit; what would is named.
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
        mixer: str = "vrwkv",
        head_dim: int = 64,
        hidden_rate: int = 4,
        key_norm: bool = False,
        post_norm: bool = False,
        init_values: float | None = None,
        head_hidden: int = 0,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_std: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features = self.embed_dim = embed_dim
        self.head_hidden_size = head_hidden or embed_dim
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
                make_block(
                    mixer,
                    embed_dim,
                    layer=i,
                    depth=depth,
                    head_dim=head_dim,
                    hidden_rate=hidden_rate,
                    key_norm=key_norm,
                    post_norm=post_norm,
                    init_values=init_values,
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
        self.head: ClassifierHead
        if head_hidden:
            self.head = HiddenHead(
                embed_dim, head_hidden, num_classes, pool_type=global_pool, drop_rate=drop_rate
            )
        else:
            self.head = ClassifierHead(
                embed_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, input_fmt="NHWC"
            )
        self._reset_linear(self.head)
        self.register_load_state_dict_pre_hook(load_pre_hook)  # the authors' names, too
        self.register_load_state_dict_pre_hook(_check_classes)

    def _reset_linear(self, module: nn.Module) -> None:
        """Initialise linear maps of the head: weight normal of σ = weight_std or 1/√C, bias 0."""
        for linear in module.modules():
            if isinstance(linear, nn.Linear):
                std = self.weight_std or linear.in_features**-0.5
                trunc_normal_(linear.weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(linear.bias)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return what timm's optimisers must not decay: all but the weights of linear maps.

        timm takes a list of names and no learning-rate factors: of the layers' own recipe it drops
        the factor 2 on ``time_decay`` (generation 6) and ``w0`` (7). ``rwkv train`` keeps both.
        """
        return {n for names, _, decays in param_groups(self) if not decays for n in names}

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
        """Replace the last linear map; 0 classes leave it out."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self._reset_linear(self.head.fc)

    @torch.jit.ignore
    def check_decay(self, error: type[RWKVError]) -> None:
        """Raise ``error`` naming the layer whose decay left the range of prefix sums."""
        for module in self.modules():
            if isinstance(module, SpatialMix):
                module.check_decay(error)

    def _resampled(self, rows: int, columns: int) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 - TorchScript reads no further
            if torch.compiler.is_exporting():
                return resampled_by_axes(self.pos_embed, self.grid, rows, columns)
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
                y = x[0] if isinstance(x, tuple) else x
                y = self.norm(y) if norm else y
                found.append(y.permute(0, 3, 1, 2).contiguous() if output_fmt == "NCHW" else y)
        if isinstance(x, tuple):
            x = x[0]
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
            self.head = ClassifierHead(self.embed_dim, 0, pool_type="", input_fmt="NHWC")
            self.num_classes, self.head_hidden_size = 0, self.embed_dim
        return take

    def forward_features(self, x_BCHW: Tensor) -> Tensor:
        """Map images [B, C, H, W] to normalised features [B, H, W, C]."""
        x_BHWC = self.embed(x_BCHW)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x_BHWC = checkpoint_seq(self.blocks, x_BHWC, use_reentrant=False)
        else:
            x_BHWC = self.blocks(x_BHWC)
        if isinstance(x_BHWC, tuple):  # generation 7 hands the first value on
            x_BHWC = x_BHWC[0]
        return self.norm(x_BHWC)

    def forward_head(self, x_BHWC: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool features and classify them."""
        return self.head(x_BHWC, pre_logits=pre_logits)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images [B, C, H, W] to logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x_BCHW))


def _check_classes(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a head for another number of classes with what to do, which torch does not know."""
    ours, name = model.get_submodule("head.fc"), f"{prefix}head.fc.weight"
    theirs = state_dict.get(name)
    if not isinstance(ours, nn.Linear) or not isinstance(theirs, Tensor) or theirs.ndim != 2:
        return
    if len(theirs) == ours.out_features:
        return
    raise CheckpointError(
        f"{name} tells {len(theirs)} classes apart, the model {ours.out_features}. To fine-tune, "
        f"load into a model with num_classes={len(theirs)} and call its "
        f"reset_classifier({ours.out_features}), or create the model with pretrained=True and "
        "pretrained_cfg_overlay=dict(file=…), which leaves the head out"
    )
