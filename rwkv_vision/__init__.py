"""Image models from the RWKV core; importing this package enters them in timm's registry.

Where torch or timm is not installed nothing is entered, and the host of exported models works from
numpy and Pillow alone.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_vision.config import ClassifyConfig
    from rwkv_vision.encoder import VRWKV
    from rwkv_vision.host import Prediction

__all__ = ["VRWKV", "ClassifyConfig", "Prediction"]

_HOMES = {"ClassifyConfig": "config", "Prediction": "host", "VRWKV": "encoder"}

try:
    importlib.import_module("rwkv_vision.models")
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("torch", "timm", "torchvision", "safetensors"):
        raise


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"rwkv_vision.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rwkv_vision' has no attribute {name!r}")
