"""The vocabulary of the Pile models: GPT-NeoX's byte-level BPE of 50,277 ids, called 20B.

The package ``tokenizers`` encodes; decoding to bytes is done here, because a token may hold part of
a character.
"""

from rwkv_core.errors import DataError, RWKVError
from rwkv_text.tokenizer import BOUNDARY, TableTokenizer, utf8

__all__ = ["PileTokenizer", "letters"]


class PileTokenizer(TableTokenizer):
    """Byte-level BPE with added tokens, read from a ``tokenizer.json``.

    The file may ask for Unicode normalisation (20B: NFC), so text comes back normalised.

    Args:
        content: the file's.
        source: what error messages call it.

    Raises:
        RWKVError: the package ``tokenizers`` is missing.
        DataError: not a byte-level BPE, or one whose id 0 is not a special token.
    """

    def __init__(self, content: bytes, source: str = "the vocabulary") -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise RWKVError(
                f"{source} needs the package tokenizers: pip install 'rwkv-toolkit[pile]'"
            ) from error
        try:
            self._bpe = tokenizers.Tokenizer.from_str(content.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the package panics with one that is no Exception
            raise DataError(
                f"{source} is damaged or no tokenizer.json: {error}; get it again"
            ) from error
        self._bpe.no_truncation()
        self._bpe.no_padding()
        added = {i: t.content for i, t in self._bpe.get_added_tokens_decoder().items()}
        if BOUNDARY not in added:
            raise DataError(
                f"{source}: id {BOUNDARY} is {self._bpe.id_to_token(BOUNDARY)!r}; expected a "
                "special token, because 0 is the document boundary of every RWKV model; give the "
                "tokenizer.json that belongs to the model"
            )
        byte_of = letters()
        tokens = {}
        for token, i in self._bpe.get_vocab(with_added_tokens=True).items():
            try:
                tokens[i] = added[i].encode() if i in added else bytes(byte_of[c] for c in token)
            except KeyError as error:
                raise DataError(
                    f"{source}: token {i} is {token!r}, and {error} stands for no byte; expected a "
                    "byte-level BPE such as 20B_tokenizer.json"
                ) from error
        self._boundary = added[BOUNDARY]
        del tokens[BOUNDARY]
        super().__init__(tokens, 1 + max(tokens, default=BOUNDARY))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without boundaries.

        Raises:
            DataError: the text holds the boundary's own name, or a lone surrogate.
        """
        utf8(text)
        ids = self._bpe.encode(text, add_special_tokens=False).ids
        if BOUNDARY in ids:
            raise DataError(
                f"the text holds {self._boundary} at character {text.find(self._boundary)}; that "
                "is the document boundary: remove it, or make two documents of the text"
            )
        return ids


def letters() -> dict[str, int]:
    """Return letter → byte: what prints in Latin-1 is itself, the rest counts up from U+0100."""
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in prints]
    return {chr(b): b for b in prints} | {chr(256 + n): b for n, b in enumerate(rest)}
