"""AdamW whose groups come from the layers: each mixer knows its own recipe."""

from typing import Any

from torch import nn
from torch.optim import AdamW

from rwkv_core.mixers.base import Mixer
from rwkv_core.train.config import TrainSettings

__all__ = ["optimizer", "optimizer_groups", "param_groups"]


def param_groups(model: nn.Module) -> list[tuple[tuple[str, ...], float, bool]]:
    """Return ``(names, lr_scale, weight_decay)`` that cover every parameter exactly once.

    Mixers say theirs; of the rest, weight matrices (linear maps, embeddings, convolutions) decay
    and vectors do not.
    """
    groups: dict[tuple[float, bool], list[str]] = {}
    claimed: set[str] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Mixer):
            for group in module.param_groups():
                names = [f"{prefix}.{n}" if prefix else n for n in group.names]
                groups.setdefault((group.lr_scale, group.weight_decay), []).extend(names)
                claimed.update(names)
    for name, p in model.named_parameters():
        if name not in claimed:
            decays = p.ndim >= 2 and name.endswith("weight")
            groups.setdefault((1.0, decays), []).append(name)
    return [(tuple(names), *key) for key, names in groups.items()]


def optimizer_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """Return the model's groups as any torch optimiser takes them, with ``names`` and ``lr_scale``.

    Frozen parameters, which require no gradient, are left out.
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = []
    for names, lr_scale, decays in param_groups(model):
        trained = tuple(n for n in names if n in parameters)
        if trained:
            groups.append(
                {
                    "params": [parameters[n] for n in trained],
                    "names": trained,
                    "lr_scale": lr_scale,
                    "weight_decay": settings.weight_decay if decays else 0.0,
                }
            )
    return groups


def optimizer(model: nn.Module, settings: TrainSettings) -> AdamW:
    """Return the official recipe's AdamW over the model's groups."""
    betas = (settings.beta1, settings.beta2)
    groups = optimizer_groups(model, settings)
    return AdamW(groups, lr=settings.lr, betas=betas, eps=settings.eps)
