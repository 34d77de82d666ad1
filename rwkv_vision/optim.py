"""timm's optimisers and schedules in place of the official recipe, where a task asks for them."""

from collections.abc import Callable
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import Optimizer

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.train.config import TrainSettings
from rwkv_core.train.optim import optimizer, optimizer_groups
from rwkv_core.train.schedule import official_schedule

__all__ = ["image_optimizer", "image_schedule"]

SCHEDULES = ("cosine", "step", "poly", "tanh")


def image_optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    """Return the optimiser that ``task.optimizer`` names, over the layers' own groups.

    Raises:
        ConfigError: timm has no optimiser of that name; the nearest are named.
    """
    config: Any = model.config
    if not config.optimizer:
        return optimizer(model, settings)
    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise ConfigError(
            f"unknown optimiser {config.optimizer!r}; {did_you_mean(config.optimizer, known)}"
        )
    groups = optimizer_groups(model, settings)
    return create_optimizer_v2(groups, opt=config.optimizer, lr=settings.lr)


def image_schedule(
    model: nn.Module, optim: Optimizer, settings: TrainSettings
) -> Callable[[int], float]:
    """Return a function that sets the rates of a step as ``task.schedule`` names, and returns one.

    Raises:
        ConfigError: no schedule of that name; the nearest are named.
    """
    config: Any = model.config
    if not config.schedule:
        return official_schedule(model, optim, settings)
    if config.schedule not in SCHEDULES:
        raise ConfigError(
            f"unknown schedule {config.schedule!r}; {did_you_mean(config.schedule, SCHEDULES)}"
        )
    scheduler, _ = create_scheduler_v2(
        optim,
        sched=config.schedule,
        num_epochs=settings.steps,
        decay_epochs=max(settings.steps // 3, 1),
        warmup_epochs=settings.warmup_steps,
        warmup_lr=0.01 * settings.lr,
        min_lr=settings.lr_final,
        step_on_epochs=False,
        updates_per_epoch=1,
    )

    def set_rate(step: int) -> float:
        scheduler.step_update(step)
        group = optim.param_groups[0]
        return group["lr"] / group["lr_scale"]

    return set_rate
