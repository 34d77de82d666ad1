"""Batches of pictures through timm's transforms, each a pure function of (seed, step)."""

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import Mixup, create_transform
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rwkv_core.errors import DataError
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.sources import Pictures, open_split

__all__ = ["ImageBatch", "batches", "eval_transform", "train_transform"]

logger = logging.getLogger(__name__)
Key = tuple[int, int]  # position in the split, seed of its augmentation


class ImageBatch(NamedTuple):
    """Normalised pictures [B, C, H, W], and targets: classes [B], or shares [B, K] when mixed."""

    images_BCHW: Tensor
    targets: Tensor


def train_transform(config: ClassifyConfig) -> Any:
    """Return timm's training transform: from a Pillow image to normalised pixels [C, H, W]."""
    return create_transform(
        **_common(config),
        is_training=True,
        scale=(config.crop_scale[0], config.crop_scale[1]),
        ratio=(config.crop_ratio[0], config.crop_ratio[1]),
        hflip=config.hflip,
        color_jitter=config.color_jitter,
        auto_augment=config.auto_augment or None,
        re_prob=config.erase,
        re_mode="pixel",
    )


def eval_transform(config: ClassifyConfig) -> Any:
    """Return timm's evaluation transform: the whole picture, stretched to the model's size."""
    return create_transform(**_common(config), crop_pct=1.0, crop_mode="squash")


def batches(
    config: ClassifyConfig, split: str, *, start: int = 0, seed: int = 0
) -> Iterator[ImageBatch]:
    """Yield shuffled, augmented batches without end, or each picture of a held-out part once.

    A picture that cannot be read is named in the log and left out; in training the next one of the
    same part takes its place.

    Raises:
        DataError: the source is unusable, or not one of its pictures can be read.
    """
    pictures = open_split(config, split)
    training = split == "train"
    transform = (train_transform if training else eval_transform)(config)
    keys = _shuffled if training else _in_order
    loader = DataLoader(
        _Samples(pictures, transform, replace=training),
        batch_sampler=keys(len(pictures.targets), config.batch_size, start, seed),
        num_workers=config.workers,
        collate_fn=_collate,
    )
    mix = _mixup(config, len(pictures.labels)) if training else None
    n_read = 0
    with _own_randomness():
        stream = iter(loader)
    for step in range(start, 2**63):
        with _own_randomness():
            batch = next(stream, None)
            if batch is not None and mix is not None:
                np.random.seed(_seed(seed, step))
                batch = ImageBatch(*mix(*batch))
        if batch is None:
            break
        if len(batch.targets):
            n_read += len(batch.targets)
            yield batch
    if not n_read:
        raise DataError(f"not one picture of {config.data} ({split}) can be read")


class _Samples(Dataset):
    """Pictures by position, each transformed under a seed of its own, whoever loads it."""

    def __init__(self, pictures: Pictures, transform: Any, *, replace: bool) -> None:
        self.pictures, self.transform, self.replace = pictures, transform, replace
        self.unreadable: set[int] = set()

    def __getitem__(self, key: Key) -> tuple[Tensor, int] | None:
        position, seed = key
        n = len(self.pictures.targets)
        for i in range(position, position + (n if self.replace else 1)):
            picture = self._load(i % n)
            if picture is not None:
                random.seed(seed)
                np.random.seed(seed)
                # torch.manual_seed asks every kind of device, which takes longer than a picture
                torch.default_generator.manual_seed(seed)
                return self.transform(picture), int(self.pictures.targets[i % n])
        if self.replace:
            raise DataError(f"not one of {n} pictures can be read, {self.pictures.name(0)} first")
        return None

    def _load(self, i: int) -> Any:
        if i in self.unreadable:
            return None
        try:
            return self.pictures.load(i)
        except DataError as error:
            logger.warning("skipped: %s", error)
            self.unreadable.add(i)
            return None


def _shuffled(n: int, size: int, start: int, seed: int) -> Iterator[list[Key]]:
    """Yield batches of positions, one permutation after another; a batch may span two."""
    epoch, order = -1, np.empty(0, int)
    step = start
    while True:
        keys = []
        for i, at in enumerate(range(step * size, (step + 1) * size)):
            if at // n != epoch:
                epoch = at // n
                order = np.random.default_rng([seed, epoch]).permutation(n)
            keys.append((int(order[at % n]), _seed(seed, step, i)))
        yield keys
        step += 1


def _in_order(n: int, size: int, start: int, seed: int) -> Iterator[list[Key]]:
    for at in range(start * size, n, size):
        yield [(i, seed) for i in range(at, min(at + size, n))]


def _collate(items: list[tuple[Tensor, int] | None]) -> ImageBatch:
    kept = [item for item in items if item is not None]
    if not kept:
        return ImageBatch(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    images, targets = zip(*kept, strict=True)
    return ImageBatch(torch.stack(images), torch.tensor(targets))


def _mixup(config: ClassifyConfig, n_classes: int) -> Any:
    if not (config.mixup or config.cutmix):
        return None
    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        label_smoothing=config.smoothing,
        num_classes=n_classes,
    )


def _common(config: ClassifyConfig) -> dict[str, Any]:
    height, width = config.image_size
    n = config.channels
    return {
        "input_size": (n, height, width),
        "interpolation": config.interpolation,
        "mean": config.mean * (n // len(config.mean)),
        "std": config.std * (n // len(config.std)),
    }


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Keep what the transforms do to the global generators from the rest of the process."""
    python, numpy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(pytorch)
