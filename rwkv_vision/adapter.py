"""The image classification domain: what the toolkit needs to train, evaluate and export it.

Torch is imported where it is used, because exported models are predicted with where it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rwkv_core.adapter import ExportSpec, Run
from rwkv_core.errors import ExportError, TrainingError
from rwkv_vision import host
from rwkv_vision.config import ClassifyConfig

if TYPE_CHECKING:
    import torch
    from torch.optim import Optimizer

    from rwkv_core.train.config import TrainSettings
    from rwkv_vision.data import ImageBatch
    from rwkv_vision.model import Classifier

__all__ = ["ClassifyAdapter", "adapter"]


class ClassifyAdapter:
    """One label per picture; implements :class:`rwkv_core.adapter.Adapter`."""

    Config = ClassifyConfig

    def build(self, config: ClassifyConfig) -> Classifier:
        """Return a new classifier; where no classes are given, the data is asked for them.

        Raises:
            ConfigError: no such model in timm's registry, or an option it does not take.
            DataError: the classes are not given and the data cannot say them.
        """
        from rwkv_vision.model import Classifier

        if not config.labels:
            from rwkv_vision.sources import labels_of

            config = dataclasses.replace(config, labels=labels_of(config))
        return Classifier(config)

    def data(
        self, config: ClassifyConfig, split: str, *, start: int = 0, seed: int = 0
    ) -> Iterator[ImageBatch]:
        """Yield augmented pictures without end, or each of ``"eval"`` or ``"test"`` once."""
        from rwkv_vision.data import batches

        return batches(config, split, start=start, seed=seed)

    def loss(
        self, model: Classifier, batch: ImageBatch, rng: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return timm's cross entropy, smoothed or of mixed labels while training.

        Raises:
            TrainingError: a layer's decay left the range its implementation is exact in.
        """
        import torch.nn.functional as F
        from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

        if model.training:
            # the mean takes in a step's weights when the next one begins
            model.update_average()
            model.check_decay(TrainingError)
        logits = model(batch.images_BCHW)
        targets = batch.targets
        if targets.ndim == 2:
            loss = SoftTargetCrossEntropy()(logits, targets)
            targets = targets.argmax(1)
        elif model.training and model.config.smoothing:
            loss = LabelSmoothingCrossEntropy(model.config.smoothing)(logits, targets)
        else:
            loss = F.cross_entropy(logits, targets)
        n = float(len(targets))
        correct = (logits.argmax(1) == targets).sum()
        return loss, {"correct": correct, "nats": loss.detach() * n, "pictures": n}

    def optimizer(self, model: Classifier, settings: TrainSettings) -> Optimizer:
        """Return the optimiser that the task names."""
        from rwkv_vision.optim import image_optimizer

        return image_optimizer(model, settings)

    def schedule(
        self, model: Classifier, optim: Optimizer, settings: TrainSettings
    ) -> Callable[[int], float]:
        """Return the function that sets a step's learning rates."""
        from rwkv_vision.optim import image_schedule

        return image_schedule(model, optim, settings)

    def metrics(self, config: ClassifyConfig, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the share of correct labels and the mean loss."""
        n = sums["pictures"]
        return {"accuracy": sums["correct"] / n, "loss": sums["nats"] / n}

    def draw(
        self, model: Classifier, config: ClassifyConfig, split: str, folder: str | Path
    ) -> list[Path]:
        """Write a confusion matrix, a grid of answers and the receptive field; return the paths."""
        from rwkv_core.run import TorchRun
        from rwkv_vision.pictures import draw_fields, report
        from rwkv_vision.receptive import fields_of

        report(TorchRun(model, self.exports(model), self.metadata(model)), config, folder, split)
        drawn = [Path(folder) / "confusion.png", Path(folder) / "predictions.png"]
        if fields := fields_of(model, config, split):
            drawn.append(Path(folder) / "receptive.png")
            draw_fields(fields, drawn[-1])
        return drawn

    def predict(self, run: Run, inputs: Iterable[host.Picture]) -> list[host.Prediction]:
        """Return label, confidence and logits of pictures: paths, Pillow images or arrays."""
        return host.predict(run, inputs)

    def exports(self, model: Classifier) -> list[ExportSpec]:
        """Return the whole-picture graph, its batch free, and for VRWKV height and width too.

        Raises:
            ExportError: a layer's decay is outside the range its implementation is exact in.
        """
        model.check_decay(ExportError)
        return model.specs()

    def metadata(self, model: Classifier) -> dict[str, Any]:
        """Return classes, size and normalisation."""
        return model.metadata()


adapter = ClassifyAdapter()
