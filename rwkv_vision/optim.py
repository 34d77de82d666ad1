"""timm's optimisers and schedules in place of the official recipe, where a task asks for them."""

from collections.abc import Callable
from typing import Any

from timm.optim import create_optimizer_v2, list_optimizers, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import nn
from torch.optim import AdamW, Optimizer

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.train.config import TrainSettings
from rwkv_core.train.optim import optimizer_groups
from rwkv_core.train.schedule import official_schedule
from rwkv_vision.encoder import VRWKV

__all__ = ["image_optimizer", "image_schedule"]

SCHEDULES = ("cosine", "step", "poly", "tanh")


def image_optimizer(model: nn.Module, settings: TrainSettings) -> Optimizer:
    """Return the optimiser that ``task.optimizer`` names.

    It gets the layers' own groups; of a model that is timm's own, the groups timm makes.

    Raises:
        ConfigError: timm has no optimiser of that name; the nearest are named.
    """
    config: Any = model.config
    groups = _groups(model, settings)
    if not config.optimizer:
        betas = (settings.beta1, settings.beta2)
        return AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
    known = [str(name) for name in list_optimizers()]
    if config.optimizer not in known:
        raise ConfigError(
            f"unknown optimiser {config.optimizer!r}; {did_you_mean(config.optimizer, known)}"
        )
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


def _groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    net: Any = model.net
    if isinstance(net, VRWKV):
        return optimizer_groups(model, settings)
    kept = net.no_weight_decay() if hasattr(net, "no_weight_decay") else ()
    found = param_groups_weight_decay(net, settings.weight_decay, no_weight_decay_list=kept)
    names = {p: name for name, p in model.named_parameters()}
    return [
        {**group, "names": tuple(names[p] for p in group["params"]), "lr_scale": 1.0}
        for group in found
    ]
