"""Weights in anybody's format, in and out, by way of the official names.

``read`` tells the format from the content: official ``.pth``, rwkv.cpp's ggmf, safetensors, Hugging
Face folders of fla, rwkv7-hf and transformers, our own checkpoint folders. Nothing is unpickled but
by ``torch.load(weights_only=True)``, and that only after the file has been checked.
"""

from pathlib import Path

from torch import Tensor

from rwkv_core.errors import CheckpointError
from rwkv_core.formats import ggmf, huggingface, official, ours, pth, safe
from rwkv_core.formats.hf_names import layout
from rwkv_core.formats.hub import resolve
from rwkv_core.formats.weights import Architecture, Weights

__all__ = ["Architecture", "Weights", "describe", "is_foreign", "read", "resolve"]

# files that are met in the same places, by how they begin
STRANGERS = {
    b"\x80": "a pickle of before torch 1.6, which is read by no safe loader: load it with the "
    "torch that wrote it and save it again with torch 1.6 or newer",
    b"GGUF": "a GGUF file, which llama.cpp reads; rwkv.cpp's own format is ggmf",
    b"lmgg": "a ggml file without version; convert the .pth with a present rwkv.cpp",
    b"tjgg": "a ggjt file, which llama.cpp read; rwkv.cpp's own format is ggmf",
    b"ggmf": "a ggmf file of a machine that stores numbers the other way round",
    b"\x1f\x8b": "compressed with gzip; unpack it",
}


def read(path: Path) -> Weights:
    """Return the language model in a file or folder, its tensors in the dtype of the file.

    Raises:
        CheckpointError: no format that is known, a damaged file, a model that is not supported,
            or values that are not finite; the message says which and what to do.
    """
    weights = _opened(path, load=True)
    official.check_finite(weights.tensors, str(path))
    return weights


def describe(path: Path) -> Weights:
    """Return the language model in a file or folder, its tensors without data.

    Raises:
        CheckpointError: as :func:`read`, but for values.
    """
    return _opened(path, load=False)


def is_foreign(path: Path) -> bool:
    """Tell whether ``path`` is somebody else's: a file, or a folder that names its model_type."""
    if path.is_file():
        return True
    try:
        config = safe.read_json(path / huggingface.CONFIG)
    except CheckpointError:
        return False
    return "model_type" in config and "adapter" not in config


def _opened(path: Path, load: bool) -> Weights:
    if path.is_dir():
        home = ours if ours.is_ours(path) else huggingface
        return home.read(path) if load else home.describe(path)
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if head[:2] == b"PK":
        return _named(pth.read(path) if load else pth.describe(path), "pth", path)
    if head[:4] == ggmf.MAGIC:
        tensors, kind, generation = ggmf.read(path) if load else ggmf.describe(path)
        eps = ggmf.NORM_EPS_5 if generation == 5 else None
        said = f"eps {eps:g} of the norm over heads: rwkv.cpp's own for generation 5" if eps else ""
        return official.weights(
            tensors,
            source=str(path),
            format=f"ggmf {kind}",
            norm_eps=eps,
            assumed=(said,) if said else (),
        )
    for beginning, what in STRANGERS.items():
        if head.startswith(beginning):
            raise CheckpointError(f"{path} is {what}")
    if head[8:] != b"{":
        raise CheckpointError(
            f"{path} begins with {head!r}; expected a .pth file (a zip archive), ggmf, "
            "safetensors, or a folder"
        )
    return _named(safe.read(path) if load else safe.describe(path), "safetensors", path)


def _named(tensors: dict[str, Tensor], format: str, path: Path) -> Weights:
    """Return the tensors of one file, official or of a Hugging Face layout, as a model."""
    if layout(tensors) is None:
        return official.weights(tensors, source=str(path), format=format)
    beside = path.parent / huggingface.CONFIG
    config = safe.read_json(beside) if beside.is_file() else {}
    return huggingface.named(tensors, config, str(path))
