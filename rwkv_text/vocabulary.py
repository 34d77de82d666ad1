"""Which vocabulary file a tokenizer reads: named by path, beside the model, or in a package.

A tokenizer is named ``"bytes"``, ``"world"`` or ``"20B"``, or by the path of a vocabulary file:
``.txt`` is World, ``.json`` is 20B. The name is what a checkpoint stores; the file lies beside it.
"""

import importlib.util
import logging
from pathlib import Path

from rwkv_core.errors import DataError, UnknownNameError, did_you_mean

__all__ = ["carried_files", "find", "kind_of", "locate", "package_file"]

logger = logging.getLogger(__name__)
FILES = {
    "world": ("rwkv_vocab_v20230424.txt", "rwkv_vocab.txt"),
    "20B": ("20B_tokenizer.json", "tokenizer.json"),
}
SUFFIXES = {".txt": "world", ".json": "20B"}
SOURCES = {"world": "RWKV-v5/tokenizer", "20B": "RWKV-v4"}


def kind_of(name: str) -> str:
    """Return ``"bytes"``, ``"world"`` or ``"20B"`` of a tokenizer's name or its file's path.

    Raises:
        UnknownNameError: neither a name nor the path of a ``.txt`` or ``.json`` file.
    """
    if name == "bytes" or name in FILES:
        return name
    if kind := SUFFIXES.get(Path(name).suffix):
        return kind
    raise UnknownNameError(
        f"unknown tokenizer {name!r}; {did_you_mean(name, ['bytes', *FILES])} "
        "Or give the path of a vocabulary: a .txt file is World, a .json file 20B"
    )


def locate(name: str, beside: str | Path | None) -> str:
    """Return the path of a named tokenizer's vocabulary in a folder, or else the name as it is.

    Args:
        name: of the tokenizer; a path stays what it is.
        beside: a folder, or a file in it, such as the model's.
    """
    if beside is not None and name in FILES:
        folder = Path(beside) if Path(beside).is_dir() else Path(beside).parent
        for file in FILES[name]:
            if (folder / file).is_file():
                return str((folder / file).absolute())
    return name


def find(name: str, beside: str | Path | None = None) -> Path:
    """Return the vocabulary file of a tokenizer other than ``"bytes"``.

    A path is that file. A name is looked for in the folder of the model, then in the package
    ``pyrwkv-tokenizer``.

    Raises:
        DataError: there is none; the message says how to get it.
    """
    kind, where = kind_of(name), locate(name, beside)
    if where != kind:
        if Path(where).is_file():
            return Path(where)
        raise DataError(f"the vocabulary {where} is not a file; {_how_to_get(kind)}")
    if kind == "world" and (packaged := package_file()):
        return packaged
    sought = f"beside {beside}" if beside is not None else "with the model"
    raise DataError(f"no vocabulary {FILES[kind][0]} found {sought}; {_how_to_get(kind)}")


def package_file() -> Path | None:
    """Return the World vocabulary inside ``pyrwkv-tokenizer``, if that is installed."""
    spec = importlib.util.find_spec("pyrwkv_tokenizer")
    file = Path(spec.origin).parent / FILES["world"][0] if spec and spec.origin else None
    return file if file and file.is_file() else None


def carried_files(name: str) -> dict[str, bytes]:
    """Return the vocabulary that a checkpoint or an exported folder carries, by file name.

    A vocabulary that is not at hand is left out with a warning: weights must not be lost over it.
    """
    kind = kind_of(name)
    if kind == "bytes":
        return {}
    try:
        path = find(name)
        return {path.name if path.name in FILES[kind] else FILES[kind][1]: path.read_bytes()}
    except (DataError, OSError) as error:
        logger.warning("the model is saved without its vocabulary: %s", error)
        return {}


def _how_to_get(kind: str) -> str:
    get = "pip install 'rwkv-toolkit[world]', or " if kind == "world" else ""
    return (
        f"{get}download {FILES[kind][0]} ({SOURCES[kind]} in BlinkDL/RWKV-LM on GitHub), put it "
        "beside the model or give its path as the tokenizer"
    )
