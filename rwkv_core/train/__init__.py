"""Training: one loop for every domain, the optimiser's groups from the layers themselves.

What describes a run (``TrainConfig``, ``TrainSettings``) needs no torch; what runs it loads when it
is first used.
"""

from typing import TYPE_CHECKING, Any

from rwkv_core.train.config import TrainConfig, TrainSettings

if TYPE_CHECKING:
    from rwkv_core.train.loop import TrainResult, evaluate, train

__all__ = ["TrainConfig", "TrainResult", "TrainSettings", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rwkv_core.train import loop

        return getattr(loop, name)
    raise AttributeError(f"module 'rwkv_core.train' has no attribute {name!r}")
