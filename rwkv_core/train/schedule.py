"""The learning rate of a step: linear warm-up, then a cosine, as in the official trainer."""

import math
from collections.abc import Callable

from torch import nn
from torch.optim import Optimizer

from rwkv_core.train.config import TrainSettings

__all__ = ["learning_rate", "official_schedule"]


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Return the rate of ``step``, counted from 0.

    The cosine runs from ``lr`` to ``lr_final`` over the steps after warm-up; during warm-up it is
    multiplied by a ramp from 0.01 to 1. Source: BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/trainer.py.
    """
    warmup = settings.warmup_steps
    progress = min(max((step - warmup) / max(settings.steps - warmup, 1), 0.0), 1.0)
    final = settings.lr_final / settings.lr
    rate = settings.lr * ((1 + final) / 2 + (1 - final) / 2 * math.cos(math.pi * progress))
    if step < warmup:
        rate *= 0.01 + 0.99 * step / warmup
    return rate


def official_schedule(
    model: nn.Module, optim: Optimizer, settings: TrainSettings
) -> Callable[[int], float]:
    """Return a function that sets every group's rate for a step and returns the rate at scale 1."""

    def set_rate(step: int) -> float:
        rate = learning_rate(step, settings)
        for group in optim.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    return set_rate
