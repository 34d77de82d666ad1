"""The yardstick beside every classifier on small pictures: nearest neighbours in pixel space."""

import numpy as np

from rwkv_core.errors import DataError
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.host import preprocess
from rwkv_vision.sources import open_split

__all__ = ["nearest_neighbours"]

NEIGHBOURS = (1, 3, 5, 7)
ROWS = 1000  # compared at once


def nearest_neighbours(config: ClassifyConfig, split: str = "test") -> tuple[float, int]:
    """Return the accuracy of k nearest neighbours on ``split``, and k, chosen on ``"eval"``.

    Distances are Euclidean between the normalised pixels that the classifier gets; ties of the vote
    go to the lower class.
    """
    pixels, targets = _pixels(config, "train")
    eval_pixels, eval_targets = _pixels(config, "eval")
    scores = {k: _accuracy(pixels, targets, eval_pixels, eval_targets, k) for k in NEIGHBOURS}
    best = max(scores, key=lambda k: scores[k])
    return _accuracy(pixels, targets, *_pixels(config, split), best), best


def _pixels(config: ClassifyConfig, split: str) -> tuple[np.ndarray, np.ndarray]:
    pictures = open_split(config, split)
    metadata = {
        "image_size": config.image_size,
        "interpolation": config.interpolation,
        "mean": config.mean,
        "std": config.std,
    }
    rows, targets = [], []
    for i, target in enumerate(pictures.targets):
        try:
            rows.append(preprocess(pictures.load(i), metadata).ravel())
        except DataError:
            continue
        targets.append(target)
    return np.stack(rows), np.array(targets)


def _accuracy(
    known: np.ndarray, labels: np.ndarray, asked: np.ndarray, truth: np.ndarray, k: int
) -> float:
    n_classes = int(labels.max()) + 1
    correct = 0
    for start in range(0, len(asked), ROWS):
        part = asked[start : start + ROWS]
        # |a - b|² without the term that is the same for all neighbours
        distance = (known**2).sum(1) - 2 * part @ known.T
        nearest = labels[np.argpartition(distance, k - 1, axis=1)[:, :k]]
        votes = (nearest[:, :, None] == np.arange(n_classes)).sum(1)
        correct += int((votes.argmax(1) == truth[start : start + ROWS]).sum())
    return correct / len(asked)
