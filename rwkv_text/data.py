"""Documents from text files, split into training and held-out parts, cut into batches."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_core.errors import DataError
from rwkv_text.config import TextConfig
from rwkv_text.tokenizer import BOUNDARY, tokenizer

__all__ = ["TextBatch", "batches", "documents", "split_documents"]

HELD_OUT = 10  # every tenth document from the first, or the last tenth of a single text


class TextBatch(NamedTuple):
    """Token ids [B, T + 1] (inputs and, one later, targets) and the bytes the targets stand for."""

    tokens_BT: Tensor
    n_bytes: int


def documents(source: str) -> dict[str, str]:
    """Return name → text of a file, of a folder's ``*.txt`` files, or of ``"pydoc"``.

    Raises:
        DataError: nothing there, an empty file, or one that is not UTF-8.
    """
    if source == "pydoc":
        from pydoc_data.topics import topics

        return dict(sorted(topics.items()))
    path = Path(source)
    if not path.exists():
        raise DataError(
            f"{path} does not exist; expected a text file, a folder of them, or 'pydoc'"
        )
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .txt file")
    texts = {}
    for file in files:
        try:
            text = file.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}; "
                "convert it, for example with iconv -t utf-8"
            ) from error
        if not text.strip():
            raise DataError(f"{file} is empty")
        texts[file.name if path.is_file() else str(file.relative_to(path))] = text
    return texts


def split_documents(source: str, split: str) -> list[str]:
    """Return the texts of ``"train"`` or ``"eval"``.

    Of ten documents or more, every tenth is held out whole; of fewer, the last tenth of each.
    """
    texts = list(documents(source).values())
    held_out = split == "eval"
    if len(texts) >= HELD_OUT:
        return [t for i, t in enumerate(texts) if (i % HELD_OUT == 0) is held_out]
    cuts = [len(t) - len(t) // HELD_OUT for t in texts]
    return [t[c:] if held_out else t[:c] for t, c in zip(texts, cuts, strict=True)]


def batches(
    config: TextConfig, split: str, *, start: int = 0, seed: int = 0
) -> Iterator[TextBatch]:
    """Yield random windows of the training stream, or each held-out document whole.

    A document is preceded and ended by a boundary.

    Raises:
        DataError: an unknown split, a training text shorter than one context, or no vocabulary.
        ConfigError: more ids than ``vocab_size``.
    """
    if split not in ("train", "eval"):
        raise DataError(f"text has the splits 'train' and 'eval', got {split!r}")
    tok = tokenizer(config.tokenizer, rows=config.vocab_size)
    lengths = tok.byte_lengths()
    encoded = [tok.encode(text) for text in split_documents(config.data, split)]
    if split == "eval":
        for ids in encoded:
            array = np.array([BOUNDARY, *ids, BOUNDARY], np.int64)
            yield TextBatch(torch.from_numpy(array)[None], int(lengths[array].sum()))
        return
    stream = np.concatenate([[BOUNDARY], *([*ids, BOUNDARY] for ids in encoded)])
    n_starts = len(stream) - config.context
    if n_starts < 1:
        raise DataError(
            f"the training text has {len(stream)} tokens, one sequence needs "
            f"{config.context + 1}: add text or lower task.context"
        )
    window = np.arange(config.context + 1)
    step = start
    while True:
        rng = np.random.default_rng([seed, step])
        starts = rng.integers(n_starts, size=config.batch_size)
        array = stream[starts[:, None] + window]
        yield TextBatch(torch.from_numpy(array), int(lengths[array[:, 1:]].sum()))
        step += 1
