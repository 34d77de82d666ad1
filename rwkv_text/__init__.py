"""Language models from the RWKV core.

Submodules and torch load when they are first used; the tokenizer, the sampler and the host of
exported models never need torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rwkv_text.config import TextConfig
    from rwkv_text.model import CausalLM, load
    from rwkv_text.pile import PileTokenizer
    from rwkv_text.tokenizer import ByteTokenizer
    from rwkv_text.world import WorldTokenizer

__all__ = ["ByteTokenizer", "CausalLM", "PileTokenizer", "TextConfig", "WorldTokenizer", "load"]

_HOMES = {
    "ByteTokenizer": "tokenizer", "CausalLM": "model", "PileTokenizer": "pile",
    "TextConfig": "config", "WorldTokenizer": "world", "load": "model",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"rwkv_text.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'rwkv_text' has no attribute {name!r}")
