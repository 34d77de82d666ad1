"""The World tokenizer: greedy longest match over UTF-8 bytes, nothing else."""

import hashlib
from functools import cached_property
from typing import Any

from rwkv_text.tokenizer import TableTokenizer, utf8
from rwkv_text.vocabulary import package_file
from rwkv_text.world_file import ROWS, read_tokens

__all__ = ["WorldTokenizer"]


class WorldTokenizer(TableTokenizer):
    """Tokens of up to 128 bytes; every byte is one as well, so anything can be encoded.

    Texts go through ``pyrwkv-tokenizer`` where that is installed and holds the same vocabulary, and
    otherwise through the trie here, several times slower; the ids are equal.

    Args:
        content: the vocabulary file's.
        source: what error messages call it.

    Raises:
        DataError: a line that is not a token, with its number.
    """

    def __init__(self, content: bytes, source: str = "the vocabulary") -> None:
        self._digest = _digest(content)
        super().__init__(read_tokens(content, source), ROWS)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without boundaries; DataError for a lone surrogate."""
        data = utf8(text)
        return self._package.encode(text) if self._package else self.encode_bytes(data)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Return the ids of any bytes: at each place the longest token that fits."""
        ids, n = [], len(data)
        first, start = self._trie, 0
        while start < n:
            best, children = first[data[start]]
            start += 1
            at = start
            while children and at < n:
                node = children.get(data[at])
                if node is None:
                    break
                at += 1
                token, children = node
                if token:
                    best, start = token, at
            ids.append(best)
        return ids

    @cached_property
    def _trie(self) -> dict[int, list[Any]]:
        """Byte → [id of the token that ends here or 0, the same for the next byte]."""
        root: list[Any] = [0, {}]
        for i, token in self._tokens.items():
            node = root
            for byte in token:
                node[1] = node[1] or {}
                node = node[1].setdefault(byte, [0, None])
            node[0] = i
        return root[1]

    @cached_property
    def _package(self) -> Any:
        """The fast tokenizer, or None where it is absent or has another vocabulary."""
        path = package_file()
        if path is None or _digest(path.read_bytes()) != self._digest:
            return None
        try:
            from pyrwkv_tokenizer import RWKVTokenizer
        except ImportError:
            return None
        return RWKVTokenizer()


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content.replace(b"\r\n", b"\n")).digest()
