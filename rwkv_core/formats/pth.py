"""Official ``.pth`` files: a zip archive of a pickle and raw storages, neither of them trusted.

First the archive is checked (every entry stored, whole, inside the file), then the pickle is walked
without unpickling (:mod:`rwkv_core.formats.pickle_outline`), and only a file in which all fits is
given to ``torch.load(weights_only=True)``, which maps its storages instead of copying them.
"""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from rwkv_core._files import atomic_file
from rwkv_core.errors import CheckpointError
from rwkv_core.formats.pickle_outline import TensorOutline, outline
from rwkv_core.formats.safe import apart

__all__ = ["describe", "read", "write"]

END = struct.Struct("<4s4H2LH")  # the record that closes an archive
END64 = struct.Struct("<4sQ2H2L4Q4sLQL")  # what may stand before it: 64-bit numbers, their place
LOCAL = struct.Struct("<4s5H3L2H")  # the record before an entry's data


class Entry(NamedTuple):
    """Where the data of one entry of the archive lies."""

    start: int
    size: int


def read(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a ``.pth`` file, mapped from it, on the CPU.

    Raises:
        CheckpointError: not such a file, cut short, or holding anything but tensors.
    """
    expected, nested = _checked(path)
    try:
        found = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
        for key in nested:
            found = found[key]
        tensors = {name: found[name].detach() for name in expected}
    except Exception as error:  # torch reports a damaged file by many kinds
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {first}") from error
    for name, (storage, size) in expected.items():
        tensor = tensors[name]
        plain = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or (tensor.dtype, tuple(tensor.shape)) != (storage.dtype, size):
            raise CheckpointError(f"{path}: {name} is not what the file describes")
    return tensors


def describe(path: Path) -> dict[str, Tensor]:
    """Return tensors without data, of the shapes and dtypes in a file; ``torch.load`` is not used.

    Raises:
        CheckpointError: as :func:`read`.
    """
    expected, _ = _checked(path)
    return {
        name: torch.empty(size, dtype=storage.dtype, device="meta")
        for name, (storage, size) in expected.items()
    }


def write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as official files hold them: a plain dictionary, each with its own storage.

    Raises:
        FileExistsError: something is at ``path`` already.
        OSError: it cannot be written; nothing is left behind.
    """
    if path.exists():
        raise FileExistsError(f"{path} exists already; remove it or choose another name")
    with atomic_file(path) as file:
        torch.save(apart(tensors), file)


def _checked(path: Path) -> tuple[dict[str, TensorOutline], tuple[str, ...]]:
    """Return what a file describes, once its archive and its pickle fit together."""
    with path.open("rb") as file:
        entries = _entries(file, path)
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1 or any(name.endswith("/constants.pkl") for name in entries):
            raise CheckpointError(
                f"{path} is a zip archive, but not one that torch.save wrote: expected one data.pkl"
            )
        folder = pickles[0].removesuffix("data.pkl")
        order = _content(file, entries.get(f"{folder}byteorder"), limit=16)
        if order not in (None, b"little"):
            raise CheckpointError(f"{path} is of byte order {order!r}, expected little")
        limit = max(1 << 20, _size(file) // 16)
        pickle = _content(file, entries[pickles[0]], limit)
        if pickle is None:
            raise CheckpointError(
                f"{path}: its pickle takes {entries[pickles[0]].size} bytes, which no model needs"
            )
        expected, nested = outline(pickle, str(path))
        size = _size(file)
    for name, tensor in expected.items():
        entry = entries.get(f"{folder}data/{tensor.storage.key}")
        if entry is None or entry.size != tensor.storage.nbytes:
            got = "nothing" if entry is None else f"{entry.size} bytes"
            raise CheckpointError(
                f"{path}: {name} needs a storage of {tensor.storage.nbytes} bytes, got {got}"
            )
    total = sum(tensor.nbytes for tensor in expected.values())
    if total > size:
        raise CheckpointError(
            f"{path}: its tensors take {total} bytes and the file has {size}; they share values, "
            "which no official model does"
        )
    return expected, nested


def _entries(file: BinaryIO, path: Path) -> dict[str, Entry]:
    """Return the entries of an archive in which each is stored, whole and apart from others."""
    size = _size(file)
    _check_end(file, size, path)
    try:
        with zipfile.ZipFile(file) as archive:
            infos = archive.infolist()
        spans = [(_start(file, info), info.compress_size, info) for info in infos]
    except Exception as error:  # zipfile lets struct, unicode and value errors through
        raise CheckpointError(
            f"{path} is a damaged zip archive: {type(error).__name__}: {error}"
        ) from error
    entries: dict[str, Entry] = {}
    free = 0
    for start, length, info in sorted(spans, key=lambda span: span[:2]):
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != length:
            raise CheckpointError(f"{path}: its entry {name} is compressed; torch.save stores")
        if start < free or start + length > size:
            raise CheckpointError(
                f"{path}: its entry {name} claims bytes {start} to {start + length} of {size}, "
                "which are not its own"
            )
        # torch looks names up without regard to case
        if name.lower() in entries:
            raise CheckpointError(f"{path} holds the entry {name} twice")
        free = start + length
        entries[name.lower()] = Entry(start, length)
    first = {name.partition("/")[0] for name in entries}
    if len(first) > 1:
        raise CheckpointError(f"{path} is not an archive of torch.save: it holds {sorted(first)}")
    return entries


def _check_end(file: BinaryIO, size: int, path: Path) -> None:
    """Check the record that closes the archive: its place is where every reader looks first."""
    file.seek(max(size - END.size - END64.size, 0))
    before, last = (content := file.read())[: -END.size], content[-END.size :]
    if len(last) < END.size or last[:4] != b"PK\x05\x06" or last[-2:] != b"\0\0":
        raise CheckpointError(
            f"{path} is cut short: a .pth file is a zip archive, and the end of one is missing "
            f"after {size} bytes"
        )
    directory = END.unpack(last)[5]
    if before[-20:-16] == b"PK\x06\x07" and len(before) == END64.size:
        directory = max(directory, END64.unpack(before)[8])
    if directory > max(1 << 20, size // 16):
        raise CheckpointError(
            f"{path}: the directory of its archive takes {directory} bytes, which no model needs"
        )


def _start(file: BinaryIO, info: zipfile.ZipInfo) -> int:
    """Return where the data of an entry begins, by the record that precedes it."""
    file.seek(info.header_offset)
    magic, *_, name, extra = LOCAL.unpack(file.read(LOCAL.size))
    if magic != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no entry begins at byte {info.header_offset}")
    if file.read(name) != info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437"):
        raise zipfile.BadZipFile(f"the entry {info.filename} has two names")
    return info.header_offset + LOCAL.size + name + extra


def _content(file: BinaryIO, entry: Entry | None, limit: int) -> bytes | None:
    if entry is None or entry.size > limit:
        return None
    file.seek(entry.start)
    return file.read(entry.size)


def _size(file: BinaryIO) -> int:
    return file.seek(0, 2)
