"""Training: one loop for every domain, the optimiser's groups from the layers themselves."""

from rwkv_core.train.config import TrainConfig, TrainSettings
from rwkv_core.train.loop import TrainResult, evaluate, train

__all__ = ["TrainConfig", "TrainResult", "TrainSettings", "evaluate", "train"]
