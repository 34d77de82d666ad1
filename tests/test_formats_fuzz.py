"""Damaged and lying files: each of 2,000 and more ends in our error or in the model's own tensors.

A quarter each for ``.pth``, ggmf, Hugging Face folders and our own checkpoints. While they are
read, unpickling and running commands fail the test, and memory beyond twice the file (and a
constant for Python's own objects) is not to be had.
"""

import io
import json
import os
import pickle
import resource
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as from_bytes

import rwkv_text
from rwkv_core import checkpoint, formats
from rwkv_core.errors import RWKVError
from rwkv_core.formats.convert import convert
from rwkv_core.formats.official import to_ours as our_name
from rwkv_text import TextConfig

N_EACH = 510
SPARE = 64 << 20  # address space that reading a file of a few kilobytes may take
OBJECTS = 1 << 20  # bytes of Python objects, whatever the size of the file
LIES = [
    -1, 0, 1, 2, 3, 7, 8, 9, 31, 33, 64, 127, 255, 65536, 10**6, 2**24, 2**30, 2**31 - 1, -(2**31),
    2**32 - 1, 2**33, 2**40, 2**62, 2**63 - 1, -(2**63),
]  # fmt: skip
VALUES = [*LIES, 10**30, 0.5, -1.0, 1e308, None, True, "x", "", [], [1], {}, {"a": 1}]
PIECES = [
    b"cos\nsystem\n(X\x01\x00\x00\x00:tR", b"cbuiltins\nexec\n", b"\x8d" + b"\xff" * 8, b"(", b"t",
    b"h\x00", b"R", b"}", b"]", b"\x80\x04", b"Q", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"0", b".",
]  # fmt: skip

place = st.one_of(st.floats(0, 1, exclude_max=True), st.integers(0, 400), st.integers(-400, -1))
mutation = st.one_of(
    st.tuples(st.just("byte"), place, st.integers(0, 255)),
    st.tuples(st.just("bit"), place, st.integers(0, 7)),
    st.tuples(st.just("int32"), place, st.sampled_from(LIES)),
    st.tuples(st.just("int64"), place, st.sampled_from(LIES)),
    st.tuples(st.just("cut"), place, st.none()),
    st.tuples(st.just("drop"), place, st.integers(1, 40)),
    st.tuples(st.just("twice"), place, st.integers(1, 80)),
    st.tuples(st.just("piece"), place, st.sampled_from(PIECES)),
)
mutations = st.lists(mutation, min_size=1, max_size=3)
fuzz = settings(
    max_examples=N_EACH,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def mutated(content: bytes, changes) -> bytes:
    """Return the content with every change made, one after the other."""
    for kind, where, value in changes:
        at = int(where * len(content)) if isinstance(where, float) else where
        at = max(0, min(at if at >= 0 else len(content) + at, len(content) - 1))
        head, tail = content[:at], content[at:]
        if kind == "byte":
            content = head + bytes([value]) + tail[1:]
        elif kind == "bit" and tail:
            content = head + bytes([tail[0] ^ 1 << value]) + tail[1:]
        elif kind in ("int32", "int64"):
            size = int(kind[3:]) // 8
            content = head + (value % 256**size).to_bytes(size, "little") + tail[size:]
        elif kind == "cut":
            content = head
        elif kind == "drop":
            content = head + tail[value:]
        elif kind == "twice":
            content = head + tail[:value] + tail
        elif kind == "piece":
            content = head + value + tail
    return content


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Return the folder of the files to damage: a model of one layer and few values."""
    folder = tmp_path_factory.mktemp("sources")
    options = {"head_dim": 8, "hidden_dim": 8}
    ranks = ("decay_rank", "iclr_rank", "value_rank", "gate_rank")
    options |= dict.fromkeys(ranks, 2)
    config = TextConfig(dim=16, depth=1, vocab_size=4, mixer_options=options)
    checkpoint.save(checkpoint.build("text", config), folder / "own")
    convert(folder / "own", folder / "model.pth", "official")
    convert(folder / "own", folder / "hf", "hf")
    (folder / "model.bin").write_bytes(small_ggmf())
    return folder


def small_ggmf() -> bytes:
    """Return an RWKV-4 file of width 32, with a tensor of every type."""
    C, V, F = 32, 4, 32
    shapes = {"emb.weight": (V, C), "head.weight": (V, C)}
    shapes |= {f"{n}.{k}": (C,) for n in ("ln_out", "blocks.0.ln0") for k in ("weight", "bias")}
    shapes |= {f"blocks.0.ln{i}.{k}": (C,) for i in (1, 2) for k in ("weight", "bias")}
    names = ("key", "value", "receptance", "output")
    shapes |= {f"blocks.0.att.{n}.weight": (C, C) for n in names}
    shapes |= {f"blocks.0.ffn.{n}.weight": (F, C) for n in names[:3]}
    mixes = ("att.time_mix_k", "att.time_mix_v", "att.time_mix_r", "ffn.time_mix_k")
    others = ("ffn.time_mix_r", "att.time_decay", "att.time_first")
    shapes |= {f"blocks.0.{n}": (C,) for n in (*mixes, *others)}
    out = [struct.pack("<6i", 0x67676D66, 101, V, C, 1, 8)]
    types = [(2, 18), (3, 20), (7, 22), (8, 24), (9, 34)]
    for i, (name, shape) in enumerate(shapes.items()):
        kind, data = 0, np.full(shape, -1, "<f4").tobytes()
        if ".weight" in name and len(shape) == 2:
            kind, size = types[i % 5]
            data = bytes(size * shape[0])
        key = name.encode()
        out += [struct.pack("<3i", len(shape), len(key), kind)]
        out += [struct.pack(f"<{len(shape)}i", *reversed(shape)), key, data]
    return b"".join(out)


@pytest.fixture
def guarded(monkeypatch):
    """Forbid unpickling and commands, and allocations that no small file is worth."""

    def forbid(name):
        return lambda *_, **__: pytest.fail(f"{name} was called")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, forbid(f"pickle.{name}"))
    monkeypatch.setattr(os, "system", forbid("os.system"))
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SPARE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


class Tally:
    """Reads mutants, and counts how they end."""

    def __init__(self, path, expected):
        self.path, self.expected = path, expected
        self.refused = self.loaded = 0

    def read(self, size: int) -> None:
        traced = (self.refused + self.loaded) % 2 == 0  # it doubles the time
        if traced:
            tracemalloc.start()
        try:
            if self.path.name != "own":  # a cheap half, before the model is made
                found = formats.read(self.path).tensors
                assert {our_name(name) for name in found} == self.expected
                assert all(tensor.isfinite().all() for tensor in found.values())
            if self.path.name == "own" or self.loaded % 8 == 0:
                model = rwkv_text.load(self.path)
                assert model.state_dict().keys() == self.expected
            self.loaded += 1
        except RWKVError as error:
            if out_of_memory(error) or len(str(error)) > 2000:
                raise AssertionError(
                    "memory was asked for unchecked, or a message is long"
                ) from error
            self.refused += 1
        finally:
            _, peak = tracemalloc.get_traced_memory()  # 0 where it was not started
            tracemalloc.stop()
        assert peak <= 2 * size + OBJECTS, f"{peak} bytes for a file of {size}"

    def check(self) -> None:
        assert self.refused + self.loaded >= N_EACH - 10
        assert self.loaded > N_EACH // 50, "hardly a mutant was harmless: the source is damaged"
        assert self.refused > N_EACH // 3


def out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def ours() -> set[str]:
    return set(rwkv_text.CausalLM(TextConfig(depth=1, mixer_options={"head_dim": 64})).state_dict())


def test_damaged_pth_files(sources, tmp_path, guarded):
    content = (sources / "model.pth").read_bytes()
    with zipfile.ZipFile(sources / "model.pth") as file:
        entries = {info.filename: file.read(info) for info in file.infolist()}
    (inner,) = [name for name in entries if name.endswith("data.pkl")]
    path = tmp_path / "model.pth"
    tally = Tally(path, ours())

    @fuzz
    @given(st.booleans(), mutations)
    def check(within, changes):
        if within:  # a pickle that lies in an archive that does not
            new = io.BytesIO()
            with zipfile.ZipFile(new, "w") as file:
                for name, data in entries.items():
                    file.writestr(name, mutated(data, changes) if name == inner else data)
            path.write_bytes(new.getvalue())
        else:
            path.write_bytes(mutated(content, changes))
        tally.read(path.stat().st_size)

    check()
    tally.check()


def test_damaged_ggmf_files(sources, tmp_path, guarded):
    content = (sources / "model.bin").read_bytes()
    records, at = [0], 24
    while at < len(content):  # where the numbers of each tensor are
        n_axes, n_name, kind = struct.unpack_from("<3i", content, at)
        axes = struct.unpack_from(f"<{n_axes}i", content, at + 12)
        records += range(at, at + 12 + 4 * n_axes, 4)
        size = {0: 128, 2: 18, 3: 20, 7: 22, 8: 24, 9: 34}[kind]
        at += 12 + 4 * n_axes + n_name + int(np.prod(axes)) * size // 32
    path = tmp_path / "model.bin"
    tally = Tally(path, set(rwkv_text.load(sources / "model.bin").state_dict()))
    lies = st.tuples(st.just("int32"), st.sampled_from(records), st.sampled_from(LIES))

    @fuzz
    @given(st.one_of(mutations, st.lists(lies, min_size=1, max_size=2)))
    def check(changes):
        path.write_bytes(mutated(content, changes))
        # 4 bytes per weight are what a quantised tensor becomes
        tally.read(path.stat().st_size * 4)

    check()
    tally.check()


def json_lie(content: bytes, data) -> bytes:
    """Return a JSON file, or the header of safetensors, with one of its values replaced."""
    length = 0 if content[:1] == b"{" else 8 + struct.unpack("<Q", content[:8])[0]
    value = json.loads(content[8:length] if length else content)
    inner = value
    key = data.draw(st.sampled_from(sorted(inner)))
    while isinstance(inner[key], dict) and inner[key] and data.draw(st.booleans()):
        inner = inner[key]
        key = data.draw(st.sampled_from(sorted(inner)))
    target: object = inner[key]
    if isinstance(target, list) and target and data.draw(st.booleans()):
        inner[key][data.draw(st.integers(0, len(target) - 1))] = data.draw(st.sampled_from(VALUES))
    elif data.draw(st.booleans()):
        inner[key] = data.draw(st.sampled_from(VALUES))
    elif data.draw(st.booleans()):
        inner[f"{key}2"] = inner.pop(key)
    else:
        inner[key] = inner[data.draw(st.sampled_from(sorted(inner)))]
    text = json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + content[length:] if length else text


@pytest.mark.parametrize("name", ["hf", "own"])
def test_damaged_folders(sources, tmp_path, guarded, name):
    files = {file: (sources / name / file).read_bytes() for file in FOLDER}
    path = tmp_path / name
    path.mkdir()
    tally = Tally(path, ours())

    @fuzz
    @given(st.sampled_from(FOLDER), st.one_of(mutations, st.none()), st.data())
    def check(file, changes, data):
        new = mutated(files[file], changes) if changes else json_lie(files[file], data)
        for other, content in files.items():
            (path / other).write_bytes(new if other == file else content)
        tally.read(sum((path / other).stat().st_size for other in files))

    check()
    tally.check()


FOLDER = ["config.json", "model.safetensors"]


def test_a_quarter_of_two_thousand_each():
    assert 4 * N_EACH >= 2000


def test_the_guards_can_fail(guarded):
    with pytest.raises(MemoryError):
        np.ones(SPARE * 2, np.uint8)
    try:
        torch.empty(SPARE * 2, dtype=torch.uint8)
    except RuntimeError as error:
        assert out_of_memory(RWKVError().with_traceback(None)) is False
        wrapped = RWKVError("wrapped")
        wrapped.__cause__ = error
        assert out_of_memory(wrapped)
    else:
        pytest.fail("torch was given what was forbidden")
    with pytest.raises(pytest.fail.Exception, match=r"pickle\.loads was called"):
        pickle.loads(b"")


def test_the_sources_are_whole(sources):
    for name in ("model.pth", "model.bin", "hf", "own"):
        assert formats.read(sources / name).tensors
    own = from_bytes((sources / "own" / "model.safetensors").read_bytes())
    assert own.keys() == ours()
