"""The classifier: a timm model with the names of its classes, and its graphs for export."""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from rwkv_core import checkpoint
from rwkv_core.adapter import ExportSpec
from rwkv_core.errors import ConfigError, RWKVError, did_you_mean
from rwkv_core.run import TorchRun
from rwkv_vision import host
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.encoder import VRWKV

__all__ = ["Classifier", "load"]

logger = logging.getLogger(__name__)
TOLERANCE = 1e-5


class Classifier(nn.Module):
    """A model of timm's registry that knows its classes and how pictures become its input.

    Args:
        config: model and classes; ``labels`` must be filled in.

    Raises:
        ConfigError: no such model, or an option it does not take.
    """

    adapter = "classify"

    def __init__(self, config: ClassifyConfig) -> None:
        super().__init__()
        self.config = dataclasses.replace(config, init_from="")
        self.net = _create(config)
        if config.init_from:
            self._start_from(config.init_from)
        self.averaged = None
        if config.ema:
            self.averaged = ModelEmaV3(self.net, decay=config.ema).requires_grad_(False)

    @property
    def deployed(self) -> nn.Module:
        """The network that answers outside of training: the running mean where there is one."""
        return self.net if self.averaged is None else self.averaged.module

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Map normalised pictures [B, C, H, W] to logits [B, K]."""
        net = self.net if self.training else self.deployed
        return net(images_BCHW)

    def update_average(self) -> None:
        """Take the present weights into the running mean, if there is one."""
        if self.averaged is not None:
            self.averaged.update(self.net)

    def predict(self, pictures: Iterable[host.Picture]) -> list[host.Prediction]:
        """Return a prediction for each picture: a path, a Pillow image or an array.

        Raises:
            DataError: a file that is no picture, or an array that is none.
        """
        return host.predict(TorchRun(self, self.specs(), self.metadata()), pictures)

    def check_decay(self, error: type[RWKVError]) -> None:
        """Raise ``error`` naming the layer whose decay left the range of prefix sums."""
        if isinstance(self.net, VRWKV):
            self.net.check_decay(error)

    def metadata(self) -> dict[str, Any]:
        """Return what a host needs: classes, size, normalisation, in the order they are used."""
        c = self.config
        return {
            "task": "image-classification",
            "architecture": c.model,
            "labels": list(c.labels),
            "channels": c.channels,
            "image_size": list(c.image_size),
            "interpolation": c.interpolation,
            "mean": list(c.mean),
            "std": list(c.std),
            "image": "float32 [batch, channels, height, width]: (pixel / 255 - mean) / std",
            **({"pixels": "uint8 [batch, height, width, channels]"} if c.uint8_graph else {}),
        }

    def specs(self) -> list[ExportSpec]:
        """Return the graph of normalised pictures and, where asked, that of bytes."""
        specs = [self._image_spec()]
        return [*specs, self._pixels_spec()] if self.config.uint8_graph else specs

    def _image_spec(self) -> ExportSpec:
        channels, (height, width) = self.config.channels, self.config.image_size
        free = {0: "batch"}
        example = (2, height, width)
        sizes = [(1, height, width), (3, height, width)]
        if isinstance(self.net, VRWKV):
            # traced where no dimension is special; proven where it was not traced
            patch = max(self.net.patch_embed.patch_size)
            free |= {2: "height", 3: "width"}
            example = (2, height + 2 * patch, width + 3 * patch)
            sizes += [(2, 2 * height + 1, width), (1, height, 3 * width + 2)]

        def sample(rng: np.random.Generator, size: Mapping[str, int]) -> dict[str, np.ndarray]:
            shape = size["batch"], channels, size.get("height", height), size.get("width", width)
            return {"image": rng.standard_normal(shape, np.float32)}

        return ExportSpec(
            name="image",
            module=self,
            inputs={"image": np.zeros((example[0], channels, *example[1:]), np.float32)},
            outputs=("logits",),
            dynamic={"image": free},
            sample=sample,
            sizes=_named(sizes, free),
            tolerance=TOLERANCE,
        )

    def _pixels_spec(self) -> ExportSpec:
        channels, (height, width) = self.config.channels, self.config.image_size
        free = {0: "batch", 1: "height", 2: "width"}

        def sample(rng: np.random.Generator, size: Mapping[str, int]) -> dict[str, np.ndarray]:
            shape = size["batch"], size["height"], size["width"], channels
            return {"pixels": rng.integers(0, 256, shape, np.uint8)}

        sizes = ((1, height, width), (3, 2 * height + 1, width), (2, height + 3, 3 * width + 2))
        return ExportSpec(
            name="pixels",
            module=PixelsGraph(self),
            inputs={"pixels": np.zeros((2, height + 5, width + 7, channels), np.uint8)},
            outputs=("logits",),
            dynamic={"pixels": free},
            sample=sample,
            sizes=_named(sizes, free),
            tolerance=TOLERANCE,
        )

    def _start_from(self, path: str) -> None:
        """Take over the weights of a checkpoint, but for a head that tells other classes apart."""
        origin = load(path)
        tensors, own = origin.deployed.state_dict(), self.net.state_dict()
        if origin.config.labels != self.config.labels:
            names: Any = self.net.default_cfg
            head = f"{names['classifier']}."
            logger.info(
                "%s tells %d classes apart, these are %d: its head starts anew",
                path, len(origin.config.labels), len(self.config.labels),
            )  # fmt: skip
            tensors = {n: own[n] if n.startswith(head) else t for n, t in tensors.items()}
        checkpoint.load_tensors(self.net, tensors, path)


class PixelsGraph(nn.Module):
    """The classifier behind its preprocessing: bytes of pictures of any size, channels last."""

    def __init__(self, model: Classifier) -> None:
        super().__init__()
        self.model = model
        config = model.config
        self.size, self.mode = list(config.image_size), config.interpolation
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)

    def forward(self, pixels_BHWC: Tensor) -> Tensor:
        """Stretch, normalise and classify pictures [B, H, W, C] of bytes."""
        x_BCHW = pixels_BHWC.permute(0, 3, 1, 2).float() / 255
        x_BCHW = F.interpolate(x_BCHW, self.size, mode=self.mode, antialias=True)
        return self.model((x_BCHW - self.mean) / self.std)


def load(path: str | Path) -> Classifier:
    """Return the classifier saved at ``path``: a checkpoint's folder or a run's.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another domain.
    """
    return cast(Classifier, checkpoint.load(path, "classify"))


def _create(config: ClassifyConfig) -> nn.Module:
    if not timm.is_model(config.model):
        raise ConfigError(
            f"timm has no model {config.model!r}; {did_you_mean(config.model, timm.list_models())}"
        )
    options, known = dict(config.model_options), timm.get_pretrained_cfg(config.model)
    # timm's models that are made for one size, and ours, whose positions are made for one
    if config.model in timm.list_models(module="models") or (known and known.fixed_input_size):
        options.setdefault("img_size", tuple(config.image_size))
    try:
        return timm.create_model(
            config.model, in_chans=config.channels, num_classes=len(config.labels), **options
        )
    except TypeError as error:
        raise ConfigError(f"task.model_options of {config.model}: {error}") from error


def _named(sizes: Iterable[tuple[int, ...]], free: Mapping[int, str]) -> tuple[dict[str, int], ...]:
    return tuple(dict(zip(free.values(), size, strict=False)) for size in sizes)
