"""The file of a World vocabulary: one token a line, ``id literal length``.

The literal is a Python string or bytes literal, the length that of its UTF-8 bytes. Id 0 is the
document boundary and has no line. Line ends may be CRLF.
"""

import ast
import re
import warnings

from rwkv_core.errors import DataError

__all__ = ["ROWS", "read_tokens"]

ROWS = 65536  # of the embedding; ids above the last token are unused
NUMBER = re.compile(r"[0-9]{1,9}")
# one whole literal and nothing after it: an expression never reaches the parser
LITERAL = re.compile(r"""b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")


def read_tokens(content: bytes, source: str) -> dict[int, bytes]:
    """Return id → token of a vocabulary file; nothing in it is evaluated.

    Raises:
        DataError: not UTF-8, no tokens, a line that is not a token or repeats one, a missing byte.
    """
    advice = "the file is damaged or no World vocabulary: get it again"
    try:
        lines = content.decode().split("\n")
    except UnicodeDecodeError as error:
        before = content.count(b"\n", 0, error.start)
        got = f"byte 0x{content[error.start]:02x}"
        raise DataError(f"{source}:{before + 1}: expected UTF-8, got {got}; {advice}") from error
    ids: dict[bytes, int] = {}
    tokens: dict[int, bytes] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an invalid escape is an error here
        for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, 1):
            try:
                i, token = _read_line(line.removesuffix("\r"))
                if i in tokens:
                    raise ValueError(f"id {i} is taken by {tokens[i]!r}, ids must differ")
                if token in ids:
                    raise ValueError(f"{token!r} has id {ids[token]} already, tokens must differ")
            except (ValueError, SyntaxError) as error:
                what = error.msg if isinstance(error, SyntaxError) else error
                raise DataError(f"{source}:{number}: {what}; {advice}") from error
            tokens[i], ids[token] = token, i
    if missing := [b for b in range(256) if bytes([b]) not in ids]:
        raise DataError(
            f"{source}: {len(tokens)} tokens, none of them the byte 0x{missing[0]:02x}; expected "
            f"each of the 256 bytes to be one; {advice}"
        )
    return tokens


def _read_line(line: str) -> tuple[int, bytes]:
    """Return id and token; ValueError or SyntaxError says what is wrong."""
    id_, _, rest = line.partition(" ")
    literal, _, length = rest.rpartition(" ")
    if not (id_ and literal and length):
        raise ValueError(f"expected 'id literal length', got {line[:60]!r}")
    if not NUMBER.fullmatch(id_) or not 0 < int(id_) < ROWS:
        raise ValueError(f"expected an id from 1 to {ROWS - 1}, got {id_[:60]!r}")
    if not LITERAL.fullmatch(literal):
        raise ValueError(f"expected a string or bytes literal, got {literal[:60]!r}")
    value = ast.literal_eval(literal)
    token = value.encode() if isinstance(value, str) else value
    if not token or not NUMBER.fullmatch(length) or int(length) != len(token):
        raise ValueError(
            f"expected the length of {literal[:60]!r} in bytes, {len(token)} and more than 0, got "
            f"{length[:60]!r}"
        )
    return int(id_), token
