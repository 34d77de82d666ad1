"""The ggmf files of rwkv.cpp: a header, then tensor after tensor to the end of the file.

    header   6 × int32: "ggmf", version (100 or 101), vocabulary, width, layers, type
    tensor   3 × int32: axes, bytes of the name, type; then the axes, fastest first; name; data

All little-endian, nothing aligned. rwkv.cpp's converter changes some tensors on the way; here they
are changed back. Every number is checked before it is used: what is allocated before the whole file
has been walked does not depend on what it claims, and afterwards it is the tensors' own size, which
for quantised ones is 4 bytes per weight. Source of the format: RWKV/rwkv.cpp, docs/FILE_FORMAT.md
and python/convert_pytorch_to_ggml.py.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rwkv_core.errors import CheckpointError
from rwkv_core.formats.blocks import BLOCK, TYPES, dequantise
from rwkv_core.formats.weights import MAX_TENSORS

__all__ = ["GGMF", "MAGIC", "NORM_EPS_5", "describe", "read"]

MAGIC = struct.pack("<I", 0x67676D66)
HEADER, RECORD = struct.Struct("<6i"), struct.Struct("<3i")
PLAIN: dict[int, tuple[str, np.dtype[Any]]] = {
    0: ("FP32", np.dtype("<f4")),
    1: ("FP16", np.dtype("<f2")),
}
REMOVED = {4: "Q4_1_O", 5: "Q4_2", 6: "Q4_3"}  # by rwkv.cpp itself
MAX_AXES, MAX_NAME = 4, 1024
NORM_EPS_5 = 1e-5
"""Eps of the norm over heads that rwkv.cpp uses for generation 5, and its models were made with."""

MIXES = "rwkvag"  # the order in which RWKV-7's six token shifts are stacked


class GGMF(NamedTuple):
    """A ggmf file: its tensors under official names, its type, its generation."""

    tensors: dict[str, Tensor]
    type: str
    generation: int


class Record(NamedTuple):
    """One tensor of a file: type number, shape (slowest axis first), and where its data lies."""

    kind: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read(path: Path) -> GGMF:
    """Return a file's tensors: FP32 and FP16 as they are, quantised ones as float32.

    Raises:
        CheckpointError: not such a file, cut short, or describing tensors that it cannot hold; the
            message names the byte.
    """
    data = _mapped(path)
    return _official(path, data, lambda record: _tensor(data, record))


def describe(path: Path) -> GGMF:
    """Return tensors without data, of the shapes in a file and the dtypes :func:`read` gives.

    Raises:
        CheckpointError: as :func:`read`.
    """
    data = _mapped(path)
    return _official(path, data, _without_data)


def _mapped(path: Path) -> np.ndarray:
    if path.stat().st_size < HEADER.size:
        raise CheckpointError(
            f"{path} is cut short: a ggmf file begins with {HEADER.size} bytes, got "
            f"{path.stat().st_size}"
        )
    return np.memmap(path, np.uint8, "r")


def _official(path: Path, data: np.ndarray, tensor: Callable[[Record], Tensor]) -> GGMF:
    type_name, sizes = _header(data, path)
    records = _records(data, path)
    generation = _generation(records)
    tensors: dict[str, Tensor] = {}
    for name, record in records.items():
        for official, value in _restored(name, tensor(record), generation, path).items():
            if official in tensors:
                raise CheckpointError(f"{path} holds {official} twice, once within {name}")
            tensors[official] = value
    emb = tuple(tensors["emb.weight"].shape) if "emb.weight" in tensors else None
    layers = {m[1] for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))}
    if emb is not None and (*emb, len(layers)) != sizes:
        raise CheckpointError(
            f"{path}: its header says vocabulary, width and layers {list(sizes)}, its tensors "
            f"{[*emb, len(layers)]}"
        )
    return GGMF(tensors, type_name, generation)


def _header(data: np.ndarray, path: Path) -> tuple[str, tuple[int, int, int]]:
    magic, version, n_vocab, n_embed, n_layer, kind = HEADER.unpack(data[: HEADER.size].tobytes())
    if magic != struct.unpack("<i", MAGIC)[0]:
        raise CheckpointError(f"{path} is no ggmf file: it begins with {bytes(data[:4])!r}")
    if version not in (100, 101):
        raise CheckpointError(f"{path} is of ggmf version {version}, expected 100 or 101")
    name = _type_name(kind, f"{path}: its header")
    if kind in TYPES and version == 100:
        raise CheckpointError(
            f"{path} is of ggmf version 100 and quantised ({name}): the blocks of that time are "
            "another format; quantise the FP16 file again with a present rwkv.cpp"
        )
    if min(n_vocab, n_embed, n_layer) < 1:
        raise CheckpointError(
            f"{path}: its header says vocabulary {n_vocab}, width {n_embed}, layers {n_layer}; "
            "expected positive numbers"
        )
    return name, (n_vocab, n_embed, n_layer)


def _type_name(kind: int, where: str) -> str:
    if kind in PLAIN:
        return PLAIN[kind][0]
    if kind in TYPES:
        return TYPES[kind].name
    known = ", ".join([*(name for name, _ in PLAIN.values()), *(t.name for t in TYPES.values())])
    shown = REMOVED.get(kind, f"number {kind}")
    raise CheckpointError(f"{where} is of type {shown}, expected one of {known}")


def _records(data: np.ndarray, path: Path) -> dict[str, Record]:
    """Return name → record of every tensor; data is not touched."""
    records: dict[str, Record] = {}
    at, size = HEADER.size, len(data)

    def fail(what: str) -> CheckpointError:
        return CheckpointError(f"{path}, at byte {at} of {size}: {what}")

    while at < size:
        if size - at < RECORD.size:
            raise fail(f"{size - at} bytes are left, expected a tensor or the end: cut short")
        n_axes, n_name, kind = RECORD.unpack(data[at : at + RECORD.size].tobytes())
        if not 1 <= n_axes <= MAX_AXES:
            raise fail(f"a tensor has {n_axes} axes, expected 1 to {MAX_AXES}")
        if not 1 <= n_name <= MAX_NAME:
            raise fail(f"a name has {n_name} bytes, expected 1 to {MAX_NAME}")
        start = at + RECORD.size + 4 * n_axes + n_name
        if start > size:
            raise fail(f"the axes and name of a tensor end at byte {start}: the file is cut short")
        raw = data[at + RECORD.size : start].tobytes()
        axes, raw = struct.unpack_from(f"<{n_axes}i", raw), raw[4 * n_axes :]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise fail(f"the name {raw[:40]!r} is not UTF-8") from None
        if name in records:
            raise fail(f"{name} comes a second time")
        if min(axes) < 1:
            raise fail(f"{name} has axes {list(axes)}, expected positive numbers")
        type_name = _type_name(kind, f"{path}, at byte {at}: {name}")
        count = math.prod(axes)  # Python's integers do not overflow
        if kind in TYPES:
            if axes[0] % BLOCK:
                raise fail(
                    f"{name} has rows of {axes[0]} weights; {type_name} takes multiples of {BLOCK}"
                )
            nbytes = count // BLOCK * TYPES[kind].nbytes
        else:
            nbytes = count * PLAIN[kind][1].itemsize
        if nbytes > size - start:
            raise fail(
                f"{name} with axes {list(axes)} as {type_name} needs {nbytes} bytes, "
                f"{size - start} are left: the file is cut short or damaged"
            )
        if len(records) == MAX_TENSORS:
            raise fail(f"more than {MAX_TENSORS} tensors")
        records[name] = Record(kind, tuple(reversed(axes)), start, nbytes)
        at = start + nbytes
    return records


def _tensor(data: np.ndarray, record: Record) -> Tensor:
    raw = data[record.start : record.start + record.nbytes]
    if record.kind in TYPES:
        values = dequantise(TYPES[record.kind], raw)
    else:
        # a copy: names of any length come before the data, so that it lies at odd addresses
        values = np.array(raw.view(PLAIN[record.kind][1]))
    return torch.from_numpy(values.reshape(record.shape))


def _without_data(record: Record) -> Tensor:
    dtype = torch.float16 if record.kind == 1 else torch.float32
    return torch.empty(record.shape, dtype=dtype, device="meta")


def _generation(names: Mapping[str, Record]) -> int:
    """Return the generation whose changes are undone: names that other readers see are checked."""
    for part, generation in ((".att.x_rwkvag", 7), (".att.time_maa_x", 6), (".att.ln_x.", 5)):
        if any(part in name for name in names):
            return generation
    return 4


def _restored(name: str, tensor: Tensor, generation: int, path: Path) -> dict[str, Tensor]:
    """Return official name → value of one tensor of a file; most are what they are."""
    part = name.rpartition(".att.")[2] if ".att." in name else ""
    if generation == 7 and part == "x_rwkvag":
        return _unstacked(name, tensor, path)
    if generation == 7 and re.fullmatch(r"[wavg][12]", part):
        tensor = tensor.transpose(0, -1) if tensor.ndim == 2 else tensor
    if generation == 6:
        tensor = _restored6(part, tensor)
    if generation == 5:
        tensor = _restored5(name, part, tensor, path)
    if generation == 4 and part == "time_decay":
        _check_range(tensor, -math.inf, 0.0, f"{path}: {name}")
        tensor = _log_of(-tensor.double())
    return {name: tensor}


def _unstacked(name: str, tensor: Tensor, path: Path) -> dict[str, Tensor]:
    """Return the six token shifts that RWKV-7's files stack [6, 1, D]."""
    if len(tensor) != len(MIXES):
        raise CheckpointError(
            f"{path}: {name} has shape {list(tensor.shape)}, expected six rows: {', '.join(MIXES)}"
        )
    stem = name.removesuffix("rwkvag")
    return {f"{stem}{letter}": row for letter, row in zip(MIXES, tensor, strict=True)}


def _restored6(part: str, tensor: Tensor) -> Tensor:
    """Return a tensor of RWKV-6: low-rank factors are stored transposed, the decay as it is."""
    if part in ("time_maa_w1", "time_decay_w1", "time_decay_w2") and tensor.ndim == 2:
        return tensor.transpose(0, 1)
    if part == "time_maa_w2" and tensor.ndim == 3:
        return tensor.transpose(1, 2)
    if part == "time_decay":
        return tensor.flatten()
    return _without_last_one(tensor) if part == "time_faaaa" else tensor


def _restored5(name: str, part: str, tensor: Tensor, path: Path) -> Tensor:
    """Return a tensor of RWKV-5: its decay is stored as exp(-exp(x)), 5.0's bonus as exp(x)."""
    if part == "time_decay":
        _check_range(tensor, 0.0, 1.0, f"{path}: {name}")
        # a decay that was rounded to 1 or to 0 has to come out as just that
        rate = -tensor.double().log()
        return _log_of(_without_last_one(rate.clamp(1e-30, 200.0)))
    if part == "time_first":
        _check_range(tensor, 0.0, math.inf, f"{path}: {name}")
        return _log_of(_without_last_one(tensor.double()))
    return _without_last_one(tensor) if part == "time_faaaa" else tensor


def _without_last_one(tensor: Tensor) -> Tensor:
    """Return [H, N, 1] as [H, N], and [H, 1, 1] or [H, 1] as [H]."""
    while tensor.ndim > 1 and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    return tensor


def _log_of(positive: Tensor) -> Tensor:
    """Return the logarithm as float32, finite also where the value was rounded to 0 or infinity."""
    return positive.clamp(1e-45, 3e38).log().float()


def _check_range(tensor: Tensor, low: float, high: float, where: str) -> None:
    if not tensor.is_meta and not bool(((tensor >= low) & (tensor <= high)).all()):
        raise CheckpointError(
            f"{where} holds values outside {low:g} to {high:g}, which rwkv.cpp's converter cannot "
            "have written"
        )
