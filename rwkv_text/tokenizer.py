"""Text to token ids and back, without torch."""

import codecs
from typing import Protocol

import numpy as np

from rwkv_core.errors import DataError, UnknownNameError, did_you_mean

__all__ = ["BOUNDARY", "ByteTokenizer", "StreamDecoder", "Tokenizer", "tokenizer"]

BOUNDARY = 0
"""The id that ends every document and precedes the first, in every RWKV vocabulary."""


class Tokenizer(Protocol):
    """Encode to ids, decode to bytes: a token may hold part of a character."""

    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without boundaries."""
        ...

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Return the bytes of the ids; the boundary has none."""
        ...

    def byte_lengths(self) -> np.ndarray:
        """Return how many bytes each id stands for [vocabulary]."""
        ...


class ByteTokenizer:
    """UTF-8 bytes as ids 1 to 255; id 0, which no text holds, is the document boundary."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text.

        Raises:
            DataError: the text holds a NUL character, whose byte is the boundary.
        """
        data = text.encode()
        if BOUNDARY in data:
            raise DataError(
                f"the text holds a NUL character at byte {data.index(BOUNDARY)}; byte 0 is the "
                "document boundary: remove it"
            )
        return list(data)

    def decode_bytes(self, ids: list[int]) -> bytes:
        """Return the ids as bytes, boundaries left out."""
        return bytes(i for i in ids if i != BOUNDARY)

    def byte_lengths(self) -> np.ndarray:
        """Return 1 for every byte and 0 for the boundary."""
        return np.arange(self.vocab_size) != BOUNDARY


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


TOKENIZERS: dict[str, type[Tokenizer]] = {"bytes": ByteTokenizer}


def tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer of a name.

    Raises:
        UnknownNameError: there is none of that name.
    """
    if name not in TOKENIZERS:
        raise UnknownNameError(f"unknown tokenizer {name!r}; {did_you_mean(name, TOKENIZERS)}")
    return TOKENIZERS[name]()
