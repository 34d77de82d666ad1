"""What every reader returns: tensors under their official names, and the model they are of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["MAX_TENSORS", "Architecture", "Weights"]

MAX_TENSORS = 1 << 14
"""More tensors than any model has: 61 layers of RWKV-7 are about 2,100."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A language model as its tensors tell it.

    Attributes:
        mixer: name in the mixer registry, such as ``"rwkv7"``.
        version: the generation as BlinkDL's ChatRWKV numbers it: 4, 5.0, 5.1, 5.2, 6 or 7.
        dim, depth, vocab_size: width, layers, rows of the embedding.
        options: keyword arguments of the mixers.
    """

    mixer: str
    version: str
    dim: int
    depth: int
    vocab_size: int
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A model read from somebody's file.

    Attributes:
        tensors: by official name, in official shape, in the dtype of the file (dequantised: fp32).
        architecture: the model they make.
        format: what the file was, such as ``"pth"``, ``"ggmf Q5_1"`` or ``"transformers"``.
        assumed: what no tensor tells and was taken for granted, one sentence each.
        dropped: names of tensors that the file holds and the model never uses.
    """

    tensors: dict[str, Tensor]
    architecture: Architecture
    format: str
    assumed: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
