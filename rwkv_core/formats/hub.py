"""Hugging Face repositories by name: fetched when nothing on disk has that name, and only then."""

import re
from pathlib import Path

from rwkv_core.errors import CheckpointError

__all__ = ["resolve"]

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
FILES = [
    "config.json", "*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin",
    "pytorch_model.bin.index.json", "*.txt", "tokenizer.json",
]  # fmt: skip


def resolve(path: str | Path) -> Path:
    """Return ``path``, or the local copy of the repository that ``owner/name`` stands for.

    A path is taken for a repository if nothing has that name on disk, not even its first part.

    Raises:
        CheckpointError: the repository cannot be fetched, or the library for it is not installed.
    """
    path = Path(path)
    name = path.as_posix()
    if path.exists() or path.parent.exists() or not REPOSITORY.fullmatch(name):
        return path
    absent = f"{name} does not exist here; taken for a Hugging Face repository"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{absent}, which needs huggingface_hub: pip install rwkv-toolkit[hub]"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # its errors, its http library's and the network's share no base
        first = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{absent}, it cannot be fetched: {first}") from error
