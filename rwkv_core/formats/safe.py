"""Safetensors files and the JSON beside them, with their sizes checked before they are believed."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core.errors import CheckpointError

__all__ = ["apart", "describe", "read", "read_json", "write"]

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
MAX_JSON = 1 << 20


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, mapped from it.

    Raises:
        CheckpointError: not such a file, cut short, or with a header that does not fit it.
    """
    from safetensors import SafetensorError, safe_open

    expected = describe(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error


def describe(path: Path) -> dict[str, Tensor]:
    """Return tensors without data, of the shapes and dtypes in a file; only its header is read.

    Raises:
        CheckpointError: as :func:`read`.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if length < 2 or length > size - 8:
            raise CheckpointError(
                f"{path} is not safetensors, or cut short: its header would take {length} of "
                f"{size} bytes"
            )
        if length > max(MAX_JSON, size // 16):
            raise CheckpointError(f"{path}: its header takes {length} bytes, which no model needs")
        header = _json(file.read(length), f"the header of {path}")
    header.pop("__metadata__", None)
    tensors, ends = {}, []
    for name, entry in header.items():
        tensors[name], span = _entry(name, entry, path)
        ends.append(span)
    at = 0
    for begin, end in sorted(ends):
        if begin != at:
            raise CheckpointError(f"{path}: a tensor begins at byte {begin} of the data, not {at}")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(
            f"{path} is damaged or cut short: its tensors take {at} bytes, the file has "
            f"{size - 8 - length} for them"
        )
    return tensors


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(apart(tensors), path, {"format": "pt"})
    except SafetensorError as error:  # such as a full disk
        raise OSError(f"{path.name}: {error}") from error


def apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which each has memory of its own, whole and in order.

    A view would drag all of its storage into a file, and safetensors refuses shared memory.
    """
    found = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        own = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
        found[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a JSON file.

    Raises:
        CheckpointError: it cannot be read, is larger than 1 MiB, or holds no object, or one with a
            key twice.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"{path} takes {path.stat().st_size} bytes; at most {MAX_JSON}")
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return _json(content, str(path))


def _entry(name: str, entry: Any, path: Path) -> tuple[Tensor, tuple[int, int]]:
    """Return a tensor without data, and where its data begins and ends."""
    where = f"{path}: its header says of {name}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} something unknown")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in tuple(DTYPES):
        raise CheckpointError(
            f"{where} that it is of type {str(dtype)[:20]}, expected {', '.join(DTYPES)}"
        )
    whole = isinstance(shape, list) and isinstance(span, list) and len(span) == 2
    if not whole or any(type(n) is not int or not 0 <= n < 1 << 48 for n in (*shape, *span)):
        raise CheckpointError(f"{where} a shape or place that is not made of whole numbers")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if span[1] - span[0] != nbytes:
        raise CheckpointError(
            f"{where} shape {shape}, which takes {nbytes} bytes, and a place of "
            f"{span[1] - span[0]} bytes"
        )
    return torch.empty(shape, dtype=DTYPES[dtype], device="meta"), (span[0], span[1])


def _json(content: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is no JSON object")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key comes twice")
    return values
