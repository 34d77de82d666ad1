"""One core of RWKV mixers (generations 4 to 7), a plugin registry and a training loop.

Submodules load when they are first used: ``import rwkv_core`` itself imports nothing.
"""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "adapter", "backbone", "checkpoint", "config", "errors", "formats", "mixers", "ops", "registry",
    "state", "testing", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return importlib.import_module(f"rwkv_core.{name}")
    raise AttributeError(f"module 'rwkv_core' has no attribute {name!r}")
