"""Labelled pictures from a folder, from torchvision or from scikit-learn, in fixed parts."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from rwkv_core.errors import DataError
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.host import decode, from_array

__all__ = ["Pictures", "labels_of", "open_split", "stratified"]

TEST_SHARE = 0.2  # of a source that has no test part of its own
EVAL_SHARE = 0.1  # of the training side, for choosing settings
SPLIT_SEED = 0
SPLITS = ("train", "eval", "test")


class Pictures(NamedTuple):
    """Labelled pictures, loaded one at a time.

    ``load(i)`` returns a Pillow image or raises DataError; ``name(i)`` says which one it is.
    """

    labels: tuple[str, ...]
    targets: np.ndarray
    load: Callable[[int], Image.Image]
    name: Callable[[int], str]

    def part(self, indices: np.ndarray) -> "Pictures":
        """Return the pictures at ``indices``, in that order."""
        return Pictures(
            self.labels,
            self.targets[indices],
            lambda i: self.load(indices[i]),
            lambda i: self.name(indices[i]),
        )


def open_split(config: ClassifyConfig, split: str) -> Pictures:
    """Return the pictures of ``"train"``, ``"eval"`` or ``"test"``.

    A folder's own ``val/`` and ``test/`` are used where it has them. Otherwise a fixed, stratified
    fifth of everything is the test part, and a tenth of what trains is kept for ``"eval"``, so that
    no setting is ever chosen by test pictures.

    Raises:
        DataError: nothing there, no or one class, or other classes than ``config.labels``.
    """
    if split not in SPLITS:
        raise DataError(f"unknown split {split!r}; expected one of {SPLITS}")
    parts = _parts(config)
    pictures = parts.get(split) or parts["train"]
    if config.labels and pictures.labels != config.labels:
        raise DataError(
            f"{config.data} has {_classes(pictures.labels)}, the model was made for "
            f"{_classes(config.labels)}; to learn other classes, start a new run with "
            "task.init_from"
        )
    if split == "test":
        return pictures if "test" in parts else pictures.part(_test_of(pictures)[1])
    if "test" not in parts and "eval" not in parts:
        pictures = pictures.part(_test_of(pictures)[0])
    if "eval" in parts:
        return pictures
    train, held_out = stratified(pictures.targets, EVAL_SHARE, seed=SPLIT_SEED + 1)
    return pictures.part(train if split == "train" else held_out)


def labels_of(config: ClassifyConfig) -> tuple[str, ...]:
    """Return the names of the classes, from the configuration or else from the data."""
    return config.labels or _parts(config)["train"].labels


def stratified(targets: np.ndarray, share: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices of the rest and of ``share`` of every class, each sorted.

    A class of two pictures or more gives at least one and keeps at least one.
    """
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(targets), bool)
    for target in np.unique(targets):
        members = rng.permutation(np.flatnonzero(targets == target))
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _test_of(pictures: Pictures) -> tuple[np.ndarray, np.ndarray]:
    return stratified(pictures.targets, TEST_SHARE, seed=SPLIT_SEED)


def _parts(config: ClassifyConfig) -> dict[str, Pictures]:
    """Return the parts a source itself has: ``"train"`` always, perhaps ``"eval"``, ``"test"``."""
    if config.data == "digits":
        parts = {"train": _digits(config.channels)}
    elif config.data.startswith("torch/"):
        parts = {s: _torchvision(config, s) for s in ("train", "test")}
    else:
        parts = _folders(Path(config.data), config.channels)
    labels = parts["train"].labels
    if len(labels) < 2:
        raise DataError(
            f"{config.data} has {_classes(labels)}; a classifier needs at least two: expected one "
            "subfolder of pictures for each class"
        )
    for name, part in parts.items():
        if part.labels != labels:
            raise DataError(
                f"{config.data}: the {name} part has {_classes(part.labels)}, the training part "
                f"{_classes(labels)}"
            )
    return parts


def _digits(channels: int) -> Pictures:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the handwritten digits come with scikit-learn: pip install 'rwkv-toolkit[demo]'"
        ) from error
    data = load_digits()
    # 16 levels of grey
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    return Pictures(
        tuple(str(name) for name in data.target_names),
        data.target,
        lambda i: from_array(pixels[i], channels),
        lambda i: f"digit {i}",
    )


def _torchvision(config: ClassifyConfig, split: str) -> Pictures:
    from timm.data import create_dataset

    try:
        data = create_dataset(
            config.data, root=config.root or None, split=split, search_split=False, download=False
        )
        labels, targets = data.classes, np.asarray(data.targets)
    except Exception as error:  # torchvision raises whatever its data sets raise
        raise DataError(
            f"{config.data} cannot be read from {config.root or '.'!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return Pictures(
        tuple(labels),
        targets,
        lambda i: from_array(np.asarray(data[i][0]), config.channels),
        lambda i: f"{config.data} {i}",
    )


def _folders(root: Path, channels: int) -> dict[str, Pictures]:
    if not root.is_dir():
        raise DataError(
            f"{root} is no folder; expected one with a subfolder of pictures for each class, "
            "'digits', or 'torch/' and the name of a torchvision data set"
        )
    if not (root / "train").is_dir():
        return {"train": _folder(root, channels)}
    parts = {"train": _folder(root / "train", channels)}
    for split, names in (("eval", ("val", "validation")), ("test", ("test",))):
        for name in names:
            if (root / name).is_dir():
                parts[split] = _folder(root / name, channels)
    if "eval" in parts and "test" not in parts:
        parts["test"] = parts["eval"]
    return parts


def _folder(root: Path, channels: int) -> Pictures:
    from timm.data import create_dataset

    try:
        reader = create_dataset("", root=str(root), search_split=False).reader
    except RuntimeError as error:
        raise DataError(f"{root} holds no pictures: {error}") from error
    paths = [path for path, _ in reader.samples]
    loose = [path for path in paths if Path(path).parent == root]
    if loose:
        raise DataError(
            f"{loose[0]} lies outside the class folders of {root}; expected one subfolder of "
            "pictures for each class"
        )
    return Pictures(
        tuple(reader.class_to_idx),
        np.array([target for _, target in reader.samples]),
        partial(_load, paths, channels),
        paths.__getitem__,
    )


def _load(paths: list[str], channels: int, i: int) -> Image.Image:
    return decode(paths[i], channels)


def _classes(labels: tuple[str, ...]) -> str:
    shown = ", ".join(repr(name) for name in labels[:4]) + (", …" if len(labels) > 4 else "")
    return f"{len(labels)} {'class' if len(labels) == 1 else 'classes'} ({shown})"
