"""The configuration of a language model and of the text it learns from."""

from dataclasses import dataclass, field
from typing import Any

from rwkv_core.errors import ConfigError
from rwkv_text.vocabulary import kind_of

__all__ = ["TextConfig"]


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A causal language model and its data.

    Attributes:
        dim, depth: width and number of layers.
        mixer: generation, a name in the mixer registry.
        mixer_options: keyword arguments of that generation's mixers.
        tokenizer: ``"bytes"``, ``"world"`` or ``"20B"``; or the path of a vocabulary file, ``.txt``
            for World and ``.json`` for 20B.
        vocab_size: rows of the embedding, at least the tokenizer's.
        data: a text file, a folder of ``*.txt`` files, or ``"pydoc"``: the language reference that
            ships inside every CPython. Each file (or topic) is a document.
        context: tokens of one training sequence.
        batch_size: sequences of one training step.
    """

    dim: int = 256
    depth: int = 6
    mixer: str = "rwkv7"
    mixer_options: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = "bytes"
    vocab_size: int = 256
    data: str = "pydoc"
    context: int = 256
    batch_size: int = 16

    def __post_init__(self) -> None:
        kind_of(self.tokenizer)  # an unknown name ends here
        for name in ("dim", "depth", "vocab_size", "context", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name} must be at least 1, got {getattr(self, name)}")
