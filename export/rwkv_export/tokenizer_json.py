"""Text for other people's generators: ``tokenizer.json``, and what they ask about it.

    bytes   byte-level BPE of 256 tokens and no merges: the ids are the bytes
    20B     the model's own vocabulary
    world   none: the longest token that fits, again and again over bytes, is no BPE

What is added to a vocabulary is that a text begins with token 0, where special tokens are wanted.
"""

import json
from collections.abc import Mapping
from typing import Any

from rwkv_text.pile import letters
from rwkv_text.tokenizer import BOUNDARY
from rwkv_text.vocabulary import FILES

__all__ = ["tokenizer_json"]

# transformers.js puts the boundary before a prompt, and leaves spaces before commas alone
CONFIG = {"add_bos_token": True, "clean_up_tokenization_spaces": False}


def tokenizer_json(name: str, files: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return ``tokenizer.json`` and ``tokenizer_config.json``, or nothing where none is exact.

    Args:
        name: of the model's tokenizer.
        files: that the folder carries, the vocabulary among them.
    """
    if name == "bytes":
        vocabulary = _bytes()
    elif found := [files[file] for file in FILES["20B"] if name == "20B" and file in files]:
        vocabulary = json.loads(found[0])
    else:
        return {}
    (boundary,) = (t["content"] for t in vocabulary["added_tokens"] if t["id"] == BOUNDARY)
    special = {"id": boundary, "ids": [BOUNDARY], "tokens": [boundary]}
    first, text = {"SpecialToken": {"id": boundary, "type_id": 0}}, _sequence("A")
    vocabulary["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, _sequence("B")],
        "special_tokens": {boundary: special},
    }
    contents = {"tokenizer.json": vocabulary, "tokenizer_config.json": CONFIG}
    return {file: (json.dumps(c, indent=2) + "\n").encode() for file, c in contents.items()}


def _bytes() -> dict[str, Any]:
    """Return byte-level BPE without merges; the boundary is the character NUL, whose byte is 0."""
    boundary = "\0"
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    vocab = {letter: byte for letter, byte in letters().items() if byte != BOUNDARY}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": BOUNDARY, "content": boundary, "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": {**level, "use_regex": False},
        "decoder": level,
        "model": {"type": "BPE", "vocab": {boundary: BOUNDARY, **vocab}, "merges": []},
    }  # fmt: skip


def _sequence(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}
