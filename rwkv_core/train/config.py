"""What a training run is: a domain, its task, and the settings of the loop."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rwkv_core.config import from_dict, to_dict
from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.registry import ADAPTERS

__all__ = ["TrainConfig", "TrainSettings"]


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The loop's settings; defaults follow the official RWKV-7 trainer.

    Attributes:
        steps: optimiser steps.
        lr, lr_final: learning rate after warm-up and at the end of the cosine.
        warmup_steps: steps of linear warm-up.
        weight_decay: decoupled, on the matrices of linear maps alone.
        beta1, beta2, eps: AdamW.
        grad_clip: largest norm of the gradient.
        seed: of initialisation, data order and dropout.
        log_every, eval_every, checkpoint_every: in steps; 0 is never (the end always counts).
        threads: of torch; 0 keeps torch's own choice.
        max_seconds: stop after this long, with a checkpoint, wherever the run is; 0 is never.
    """

    steps: int = 1000
    lr: float = 6e-4
    lr_final: float = 6e-5
    warmup_steps: int = 10
    weight_decay: float = 0.001
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-18
    grad_clip: float = 1.0
    seed: int = 0
    log_every: int = 10
    eval_every: int = 0
    checkpoint_every: int = 200
    threads: int = 0
    max_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "grad_clip", "log_every"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"train.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run: ``adapter`` names the domain, ``task`` is that domain's own configuration."""

    adapter: str
    task: Any
    train: TrainSettings = field(default_factory=TrainSettings)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form that every run's folder holds."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Rebuild a run from its JSON form.

        Raises:
            ConfigError: an unknown field anywhere; the nearest is named.
        """
        known = ("adapter", "task", "train")
        for name in values:
            if name not in known:
                raise ConfigError(f"unknown field '{name}'; {did_you_mean(name, known)}")
        if missing := [name for name in known if name not in values]:
            raise ConfigError(f"a run needs the fields {', '.join(known)}; missing: {missing}")
        adapter = values["adapter"]
        return cls(
            adapter=adapter,
            task=from_dict(ADAPTERS[adapter].Config, values["task"], "task."),
            train=from_dict(TrainSettings, values["train"], "train."),
        )
