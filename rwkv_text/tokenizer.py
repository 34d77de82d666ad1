"""Text to token ids and back, without torch."""

import codecs
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from rwkv_core.errors import ConfigError, DataError
from rwkv_text.vocabulary import find, kind_of

__all__ = [
    "BOUNDARY",
    "ByteTokenizer",
    "StreamDecoder",
    "TableTokenizer",
    "Tokenizer",
    "tokenizer",
    "utf8",
]

BOUNDARY = 0
"""The id that ends every document and precedes the first, in every RWKV vocabulary."""


class Tokenizer(Protocol):
    """Encode to ids, decode to bytes: a token may hold part of a character."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without boundaries."""
        ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of the ids; the boundary has none. DataError for an unknown id."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Return how many bytes each id stands for [vocab_size]; 0 is the boundary or unused."""
        ...


def utf8(text: str) -> bytes:
    """Return the UTF-8 bytes of a text; DataError where it holds half a surrogate pair."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"character {error.start} of the text is U+{ord(text[error.start]):04X}, half a "
            "surrogate pair, which is not Unicode text: was it read in the right encoding?"
        ) from error


class ByteTokenizer:
    """UTF-8 bytes as ids 1 to 255; id 0, which no text holds, is the document boundary."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text.

        Raises:
            DataError: the text holds a NUL character, whose byte is the boundary.
        """
        data = utf8(text)
        if BOUNDARY in data:
            raise DataError(
                f"the text holds a NUL character at byte {data.index(BOUNDARY)}; byte 0 is the "
                "document boundary: remove it"
            )
        return list(data)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the ids as bytes, boundaries left out."""
        try:
            return bytes(i for i in ids if i != BOUNDARY)
        except ValueError as error:
            unknown = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise DataError(f"token id {unknown} is no byte; expected 0 to 255") from error

    def byte_lengths(self) -> np.ndarray:
        """Return 1 for every byte and 0 for the boundary."""
        return np.arange(self.vocab_size) != BOUNDARY


class TableTokenizer:
    """What vocabularies have in common that list their tokens: decoding.

    Args:
        tokens: id → bytes, without the boundary.
        vocab_size: rows of the embedding that goes with it.
    """

    def __init__(self, tokens: Mapping[int, bytes], vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._tokens = tokens

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of the ids; the boundary has none.

        Raises:
            DataError: an id without a token.
        """
        tokens = self._tokens
        try:
            return b"".join([tokens[i] for i in ids if i != BOUNDARY])
        except KeyError as error:
            raise DataError(
                f"token id {int(error.args[0])} is outside the vocabulary of {len(tokens)} tokens, "
                f"whose last id is {max(tokens)}; was the text made with another vocabulary?"
            ) from error

    def byte_lengths(self) -> np.ndarray:
        """Return how many bytes each id stands for [vocab_size]; 0 is the boundary or unused."""
        lengths = np.zeros(self.vocab_size, np.int64)
        lengths[list(self._tokens)] = [len(token) for token in self._tokens.values()]
        return lengths


class StreamDecoder:
    """Turn ids into text as they come, holding back a character until its last byte."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Return the characters that this token completes, perhaps none."""
        return self._decoder.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """Return what is left: a replacement character where one was cut short."""
        return self._decoder.decode(b"", final=True)


def tokenizer(name: str, *, beside: str | Path | None = None, rows: int | None = None) -> Tokenizer:
    """Return a tokenizer; one that reads a file reads it once.

    Args:
        name: ``"bytes"``, ``"world"``, ``"20B"``, or the path of a vocabulary (.txt is World, .json
            is 20B).
        beside: where to look for a named vocabulary first: a model's folder, or a file in it.
        rows: of the model's embedding, to check that every id has one.

    Raises:
        UnknownNameError: there is none of that name.
        DataError: the vocabulary is not found (the message says how to get it) or damaged.
        ConfigError: the vocabulary has more ids than the model has rows.
    """
    made: Tokenizer
    if kind_of(name) == "bytes":
        made = ByteTokenizer()
    else:
        path = find(name, beside).absolute()
        try:
            stat = path.stat()
            made = _read(kind_of(name), path, stat.st_mtime_ns, stat.st_size)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if rows is not None and rows < made.vocab_size:
        raise ConfigError(
            f"the tokenizer {name!r} has {made.vocab_size} ids and the model {rows} rows for them; "
            f"set task.vocab_size={made.vocab_size}, or the tokenizer that belongs to the model"
        )
    return made


@lru_cache(maxsize=4)
def _read(kind: str, path: Path, changed: int, size: int) -> Tokenizer:
    from rwkv_text.pile import PileTokenizer
    from rwkv_text.world import WorldTokenizer

    content = path.read_bytes()
    if kind == "world":
        return WorldTokenizer(content, str(path))
    return PileTokenizer(content, str(path))
