"""The configuration of an image classifier and of the pictures it learns from."""

from dataclasses import dataclass, field
from typing import Any

from rwkv_core.errors import ConfigError

__all__ = ["ClassifyConfig"]


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """An image classifier and its data.

    Attributes:
        model: name in timm's registry, ours among them.
        model_options: keyword arguments of that model, such as ``patch_size``.
        init_from: checkpoint to start from; its head is left out where the classes differ. Empty
            once the model is built.
        data: folder of pictures with one subfolder per class, perhaps under ``train/``, ``val/``
            and ``test/``; ``"digits"``, scikit-learn's handwritten digits; or ``"torch/NAME"``, a
            data set of torchvision found in ``root``.
        root: folder of a torchvision data set.
        labels: names of the classes in the order of the outputs; empty asks the data.
        image_size: height and width pictures are stretched to.
        channels: 3 for colour, 1 for grey.
        mean, std: normalisation of pixels in [0, 1]; one number, or one per channel.
        interpolation: ``"bilinear"`` or ``"bicubic"``, of the stretching.
        batch_size: pictures of one training step.
        workers: processes that load pictures; 0 loads them in the training process.
        crop_scale: smallest and largest share of the picture's area in a random crop.
        crop_ratio: smallest and largest aspect of a random crop.
        hflip: chance of mirroring.
        color_jitter: strength of random brightness, contrast and saturation.
        auto_augment: timm's name of an augmentation policy, such as ``"rand-m9-mstd0.5-inc1"``.
        erase: chance of erasing a random rectangle.
        mixup, cutmix: strength of mixing pictures and labels; 0 is off. Both need an even batch.
        smoothing: share of the target spread over all classes.
        ema: decay of a running mean of the weights, which then answers in evaluation and exports; 0
            is off.
        optimizer: timm's name of an optimiser, such as ``"lion"``; empty is the official AdamW.
        schedule: timm's name of a schedule (``cosine``, ``step``, ``poly``, ``tanh``); empty is the
            official warm-up and cosine.
        uint8_graph: also export a graph that takes the bytes of pictures of any size.
    """

    model: str = "vrwkv_nano_patch4_28"
    model_options: dict[str, Any] = field(default_factory=dict)
    init_from: str = ""
    data: str = "digits"
    root: str = ""
    labels: tuple[str, ...] = ()
    image_size: tuple[int, ...] = (28, 28)
    channels: int = 3
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    interpolation: str = "bilinear"
    batch_size: int = 64
    workers: int = 0
    crop_scale: tuple[float, ...] = (1.0, 1.0)
    crop_ratio: tuple[float, ...] = (0.75, 1.3333)
    hflip: float = 0.0
    color_jitter: float = 0.0
    auto_augment: str = ""
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    smoothing: float = 0.0
    ema: float = 0.0
    optimizer: str = ""
    schedule: str = ""
    uint8_graph: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "channels"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name} must be at least 1, got {getattr(self, name)}")
        if self.channels not in (1, 3):
            raise ConfigError(f"task.channels must be 1 (grey) or 3 (colour), got {self.channels}")
        for name in ("image_size", "crop_scale", "crop_ratio"):
            pair = getattr(self, name)
            if len(pair) != 2 or min(pair) <= 0:
                raise ConfigError(f"task.{name} must be two positive numbers, got {pair}")
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ConfigError(
                    f"task.{name} must hold 1 number or one for each of {self.channels} channels, "
                    f"got {getattr(self, name)}"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"task.std must be positive, got {self.std}")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"task.ema must be 0 (off) or below 1, got {self.ema}")
        if self.interpolation not in ("bilinear", "bicubic"):
            raise ConfigError(
                f"task.interpolation must be 'bilinear' or 'bicubic', got {self.interpolation!r}"
            )
        if self.labels and (len(self.labels) < 2 or len(set(self.labels)) < len(self.labels)):
            raise ConfigError(f"task.labels must be two or more different names: {self.labels}")
        if (self.mixup or self.cutmix) and self.batch_size % 2:
            raise ConfigError(
                f"task.mixup and task.cutmix need an even task.batch_size, got {self.batch_size}"
            )
