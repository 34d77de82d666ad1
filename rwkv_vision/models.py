"""The models this package enters in timm's registry; importing this module does it.

Sizes are those of the authors' configurations (OpenGVLab/Vision-RWKV, classification/configs), also
for generation 7, which they have no model of. Stochastic depth is not part of a size: give
``drop_path_rate`` when training (the authors': 0 tiny, 0.3 small, 0.5 base, 0.1 for fine-tuning
large).
"""

from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from rwkv_vision.encoder import VRWKV
from rwkv_vision.official import checkpoint_filter_fn


def _cfg(side: int = 224, patch: int = 16, crop_pct: float = 0.875) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "pool_size": (side // patch, side // patch),
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
        "vrwkv_tiny_patch16_224.untrained": _cfg(),
        "vrwkv_small_patch16_224.untrained": _cfg(),
        "vrwkv_base_patch16_224.untrained": _cfg(),
        "vrwkv_large_patch16_384.untrained": _cfg(384, crop_pct=1.0),
        "vrwkv6_tiny_patch16_224.untrained": _cfg(),
        "vrwkv6_small_patch16_224.untrained": _cfg(),
        "vrwkv6_base_patch16_224.untrained": _cfg(),
        "vrwkv7_tiny_patch16_224.untrained": _cfg(),
        "vrwkv7_small_patch16_224.untrained": _cfg(),
        "vrwkv7_base_patch16_224.untrained": _cfg(),
        "vrwkv_nano_patch4_28.untrained": _cfg(28, 4, crop_pct=1.0),
        "vrwkv6_nano_patch4_28.untrained": _cfg(28, 4, crop_pct=1.0),
        "vrwkv7_nano_patch4_28.untrained": _cfg(28, 4, crop_pct=1.0),
        "test_vrwkv.untrained": _cfg(64, crop_pct=1.0),
        "test_vrwkv_large.untrained": _cfg(64, crop_pct=1.0),
        "test_vrwkv_2d.untrained": _cfg(64, crop_pct=1.0),
        "test_vrwkv6.untrained": _cfg(64, crop_pct=1.0),
        "test_vrwkv7.untrained": _cfg(64, crop_pct=1.0),
    }
)

TINY: dict[str, Any] = {"embed_dim": 192, "weight_std": 0.02}
SMALL: dict[str, Any] = {"embed_dim": 384, "weight_std": 0.02, "post_norm": True}
BASE: dict[str, Any] = {**SMALL, "embed_dim": 768, "init_values": 1e-5}
NANO: dict[str, Any] = {"img_size": 28, "patch_size": 4, "embed_dim": 64, "depth": 4}
TEST: dict[str, Any] = {"img_size": 64, "embed_dim": 32, "depth": 3}


def _create(variant: str, pretrained: bool, given: Any, sizes: Mapping[str, Any]) -> VRWKV:
    options = {"depth": 12, **sizes, **given}
    depth = options["depth"]
    n_features = min(depth, 4)
    evenly = tuple(depth * (i + 1) // n_features - 1 for i in range(n_features))
    return build_model_with_cfg(
        VRWKV,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": evenly, "feature_cls": "getter"},
        **options,
    )


@register_model
def vrwkv_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV-T: 6,155,176 parameters with 1000 classes."""
    return _create("vrwkv_tiny_patch16_224", pretrained, kwargs, TINY)


@register_model
def vrwkv_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV-S: 23,820,136 parameters with 1000 classes."""
    sizes = {**SMALL, "init_values": 1.0}
    return _create("vrwkv_small_patch16_224", pretrained, kwargs, sizes)


@register_model
def vrwkv_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV-B: 93,645,544 parameters with 1000 classes."""
    return _create("vrwkv_base_patch16_224", pretrained, kwargs, BASE)


@register_model
def vrwkv_large_patch16_384(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV-L: 334,881,768 parameters with 1000 classes.

    Made for pictures of 192 pixels, whose 12 × 12 positions are resampled for others, and used with
    384; a hidden layer in the head.
    """
    sizes = {**BASE, "embed_dim": 1024, "depth": 24, "key_norm": True, "head_hidden": 3072}
    sizes["img_size"] = 192
    return _create("vrwkv_large_patch16_384", pretrained, kwargs, sizes)


@register_model
def vrwkv6_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV6-T: 7,641,256 parameters with 1000 classes."""
    return _create("vrwkv6_tiny_patch16_224", pretrained, kwargs, {**TINY, "mixer": "vrwkv6"})


@register_model
def vrwkv6_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV6-S: 27,677,032 parameters with 1000 classes."""
    sizes = {**SMALL, "mixer": "vrwkv6", "init_values": 1e-5}
    return _create("vrwkv6_small_patch16_224", pretrained, kwargs, sizes)


@register_model
def vrwkv6_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """VRWKV6-B: 104,898,280 parameters with 1000 classes."""
    return _create("vrwkv6_base_patch16_224", pretrained, kwargs, {**BASE, "mixer": "vrwkv6"})


@register_model
def vrwkv7_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Generation 7 in the size of VRWKV-T: 6,456,040 parameters with 1000 classes."""
    return _create("vrwkv7_tiny_patch16_224", pretrained, kwargs, {**TINY, "mixer": "vrwkv7"})


@register_model
def vrwkv7_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Generation 7 in the size of VRWKV-S: 24,421,864 parameters with 1000 classes."""
    sizes = {**SMALL, "mixer": "vrwkv7", "init_values": 1e-5}
    return _create("vrwkv7_small_patch16_224", pretrained, kwargs, sizes)


@register_model
def vrwkv7_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Generation 7 in the size of VRWKV-B: 91,899,880 parameters with 1000 classes."""
    return _create("vrwkv7_base_patch16_224", pretrained, kwargs, {**BASE, "mixer": "vrwkv7"})


@register_model
def vrwkv_nano_patch4_28(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Four narrow layers for small images, such as handwritten digits."""
    return _create("vrwkv_nano_patch4_28", pretrained, kwargs, NANO)


@register_model
def vrwkv6_nano_patch4_28(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Four narrow layers of generation 6."""
    sizes = {**NANO, "mixer": "vrwkv6", "head_dim": 32}
    return _create("vrwkv6_nano_patch4_28", pretrained, kwargs, sizes)


@register_model
def vrwkv7_nano_patch4_28(pretrained: bool = False, **kwargs: Any) -> VRWKV:
    """Four narrow layers of generation 7."""
    sizes = {**NANO, "mixer": "vrwkv7", "head_dim": 32}
    return _create("vrwkv7_nano_patch4_28", pretrained, kwargs, sizes)


@register_model
def test_vrwkv(pretrained: bool = False, **kwargs: Any) -> VRWKV:  # noqa: PT028 - no test
    """Three layers that tests can afford."""
    return _create("test_vrwkv", pretrained, kwargs, TEST)


@register_model
def test_vrwkv_large(pretrained: bool = False, **kwargs: Any) -> VRWKV:  # noqa: PT028
    """Three layers with everything that only the large model has."""
    sizes = {**TEST, "img_size": 32, "key_norm": True, "post_norm": True}
    sizes |= {"init_values": 1.0, "head_hidden": 48}
    return _create("test_vrwkv_large", pretrained, kwargs, sizes)


@register_model
def test_vrwkv_2d(pretrained: bool = False, **kwargs: Any) -> VRWKV:  # noqa: PT028
    """Three layers whose decays run over rows and columns."""
    return _create("test_vrwkv_2d", pretrained, kwargs, {**TEST, "mixer": "vrwkv_2d"})


@register_model
def test_vrwkv6(pretrained: bool = False, **kwargs: Any) -> VRWKV:  # noqa: PT028
    """Three layers of generation 6, two heads each."""
    return _create("test_vrwkv6", pretrained, kwargs, {**TEST, "mixer": "vrwkv6", "head_dim": 16})


@register_model
def test_vrwkv7(pretrained: bool = False, **kwargs: Any) -> VRWKV:  # noqa: PT028
    """Three layers of generation 7, two heads each."""
    return _create("test_vrwkv7", pretrained, kwargs, {**TEST, "mixer": "vrwkv7", "head_dim": 16})
