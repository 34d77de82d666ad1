"""What a classifier does to test pictures, to look at.

A confusion matrix, a grid of answers, and what :mod:`rwkv_vision.receptive` found.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rwkv_core._files import atomic_file
from rwkv_core.adapter import Run
from rwkv_core.errors import DataError, RWKVError
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.host import Prediction, predict
from rwkv_vision.sources import open_split

__all__ = ["confusion", "draw_confusion", "draw_fields", "draw_grid", "report"]


def report(run: Run, config: ClassifyConfig, folder: str | Path, split: str = "test") -> float:
    """Classify a part of the data and write ``confusion.png`` and ``predictions.png``.

    Args:
        run: the model, in torch or exported.
        config: names the data; its labels are the run's.
        folder: where; made if it does not exist.
        split: ``"test"`` or ``"eval"``.

    Returns:
        The share of correct labels. Pictures that cannot be read are left out.

    Raises:
        DataError: the data is unusable.
        RWKVError: matplotlib is missing.
    """
    pictures, names = open_split(config, split), list(run.metadata["labels"])
    seen: list[Image.Image] = []
    targets: list[int] = []
    for i, target in enumerate(pictures.targets):
        try:
            seen.append(pictures.load(i))
        except DataError:
            continue
        targets.append(int(target))
    predictions = predict(run, seen)
    answers = [names.index(p.label) for p in predictions]
    matrix = confusion(targets, answers, len(names))
    draw_confusion(matrix, names, Path(folder) / "confusion.png")
    draw_grid(seen, predictions, [names[t] for t in targets], Path(folder) / "predictions.png")
    return float(np.trace(matrix) / matrix.sum())


def confusion(targets: Sequence[int], answers: Sequence[int], n_classes: int) -> np.ndarray:
    """Return how often class i was called class j [K, K]."""
    matrix = np.zeros((n_classes, n_classes), np.int64)
    np.add.at(matrix, (np.asarray(targets, int), np.asarray(answers, int)), 1)
    return matrix


def draw_confusion(matrix: np.ndarray, labels: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix [K, K] as PNG; counts are written in up to 20 classes."""
    n = len(labels)
    figure = _figure((max(4.0, 0.4 * n), max(4.0, 0.4 * n)))
    axes = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    accuracy = np.trace(matrix) / max(matrix.sum(), 1)
    axes.set(xlabel="predicted", ylabel="true", title=f"{accuracy:.1%} of {matrix.sum()} pictures")
    axes.set_xticks(range(n), labels, rotation=0 if n <= 10 else 90)
    axes.set_yticks(range(n), labels)
    for i, j in np.argwhere(matrix) if n <= 20 else ():
        color = "white" if shares[i, j] > 0.5 else "black"
        axes.text(j, i, matrix[i, j], ha="center", va="center", color=color, fontsize=8)
    _save(figure, path)


def draw_grid(
    pictures: Sequence[Image.Image],
    predictions: Sequence[Prediction],
    truth: Sequence[str],
    path: Path,
    *,
    columns: int = 8,
    rows: int = 5,
) -> None:
    """Draw pictures with their predictions as PNG: mistakes first and in red, then the others."""
    wrong = [p.label != t for p, t in zip(predictions, truth, strict=True)]
    order = np.argsort(np.logical_not(wrong), kind="stable")[: rows * columns]
    rows = -(-len(order) // columns)
    figure = _figure((1.2 * columns, 1.4 * max(rows, 1)))
    grid = figure.subplots(max(rows, 1), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, i in zip(grid.flat, order, strict=False):
        axes.imshow(np.asarray(pictures[i]), cmap="gray", interpolation="nearest")
        text = f"{predictions[i].label} {predictions[i].confidence:.0%}"
        text += f"\nis {truth[i]}" if wrong[i] else ""
        axes.set_title(text, fontsize=8, color="red" if wrong[i] else "black")
    _save(figure, path)


def draw_fields(fields: Mapping[str, np.ndarray], path: Path) -> None:
    """Draw receptive fields [H, W], at most 1, as PNG, six in a row, each under its name."""
    rows, columns = -(-len(fields) // 6), min(len(fields), 6)
    figure = _figure((3.2 * columns, 3.4 * rows))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (name, field) in zip(grid.flat, fields.items(), strict=False):
        # a fourth root: what is far away moves the middle by thousandths, and still counts
        axes.imshow(field**0.25, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{name}: {(field > 0.01).mean():.0%} above 1/100", fontsize=9)
    _save(figure, path)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RWKVError("drawing needs matplotlib: pip install 'rwkv-toolkit[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
