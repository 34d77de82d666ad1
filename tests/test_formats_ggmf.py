"""ggmf files of every generation and storage type, written here from the format's description."""

import struct
import zipfile

import numpy as np
import pytest
import torch

import rwkv_text
from rwkv_core import formats
from rwkv_core.errors import CheckpointError
from rwkv_core.formats.blocks import TYPES, dequantise
from rwkv_core.formats.convert import convert

VERSIONS = ["4", "5.0", "5.0 raw", "5.1", "5.2", "6", "7"]
NUMBERS = {"FP32": 0, "FP16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 7, "Q5_1": 8, "Q8_0": 9}
MAGIC = 0x67676D66


def forward(tensors: dict[str, torch.Tensor], version: str) -> dict[str, np.ndarray]:
    """Change official tensors as rwkv.cpp's converter does, one rule after the other."""
    found = {}
    stacked = {}
    for name, tensor in tensors.items():
        x = tensor.float()
        part = name.split(".")[-1]
        if "time_" in part and "time_state" not in part:
            x = x.squeeze()
        if version == "4" and part == "time_decay":
            x = -torch.exp(x)
        if version[0] == "5":
            if part == "time_decay":
                x = torch.exp(-torch.exp(x))
                x = x.unsqueeze(-1) if version == "5.2" else x.reshape(-1, 1, 1)
            if part == "time_first":
                x = torch.exp(x).reshape(-1, 1, 1)
            if part == "time_faaaa":
                x = x.unsqueeze(-1)
        if version == "6":
            if part == "time_faaaa":
                x = x.unsqueeze(-1)
            if part in ("time_maa_w1", "time_decay_w1", "time_decay_w2"):
                x = x.t()
            if part == "time_maa_w2":
                x = x.permute(0, 2, 1)
            if part == "time_decay":
                x = x.reshape(4, -1, 1)
        if version == "7":
            if part in ("w1", "w2", "a1", "a2", "v1", "v2", "g1", "g2"):
                x = x.t()
            if ".att.x_" in name:
                stacked.setdefault(name[: name.index("x_")], {})[part] = x.reshape(1, -1)
                continue
        found[name] = x.contiguous().numpy()
    for stem, six in stacked.items():
        order = ["x_r", "x_w", "x_k", "x_v", "x_a", "x_g"]
        found[f"{stem}x_rwkvag"] = np.stack([six[key].numpy() for key in order])
    return found


def quantise(row: np.ndarray, kind: str) -> bytes:
    """Return 32 weights as a block, the nearest levels of their range."""
    if kind == "Q8_0":
        d = np.float16(np.abs(row).max() / 127)
        return d.tobytes() + np.clip(np.round(row / d), -127, 127).astype(np.int8).tobytes()
    bits = int(kind[1])
    if kind.endswith("_0"):
        d = np.float16(np.abs(row).max() / (2 ** (bits - 1) - 1))
        q, head = np.round(row / d) + 2 ** (bits - 1), d.tobytes()
    else:
        m = np.float16(row.min())
        d = np.float16((row.max() - row.min()) / (2**bits - 1))
        q, head = np.round((row - m) / d), d.tobytes() + m.tobytes()
    q = np.clip(q, 0, 2**bits - 1).astype(int).tolist()
    if bits == 5:
        head += struct.pack("<I", sum((v >> 4) << j for j, v in enumerate(q)))
    return head + bytes((q[j] & 15) | (q[j + 16] & 15) << 4 for j in range(16))


def restored(block: bytes, kind: str) -> list[float]:
    """Return the 32 weights of a block, element by element, in the arithmetic of float32."""
    f = np.float32
    d = f(np.frombuffer(block, "<f2", 1)[0])
    if kind == "Q8_0":
        return [f(q) * d for q in struct.unpack("<32b", block[2:])]
    m = f(np.frombuffer(block, "<f2", 1, 2)[0]) if kind.endswith("_1") else f(0)
    at = 4 if kind.endswith("_1") else 2
    high = 0
    if kind[1] == "5":
        (high,) = struct.unpack_from("<I", block, at)
        at += 4
    out = []
    for j in range(32):
        byte = block[at + j % 16]
        q = (byte & 15 if j < 16 else byte >> 4) | (high >> j & 1) << 4
        zero = {"Q4_0": 8, "Q5_0": 16}.get(kind, 0)
        out.append(f(q - zero) * d + m)
    return out


def is_quantised(name: str, shape: tuple[int, ...]) -> bool:
    """Tell whether rwkv.cpp quantises a tensor: matrices of whole blocks, but for the ends."""
    return len(shape) == 2 and shape[1] % 32 == 0 and name not in ("emb.weight", "head.weight")


def ggmf(
    arrays: dict[str, np.ndarray], kind: str = "FP32", version: int = 101
) -> tuple[bytes, dict[str, np.ndarray]]:
    """Return a file, and name → array as the file holds it, dequantised by hand."""
    layers = {name.split(".")[1] for name in arrays if name.startswith("blocks.")}
    vocab, width = arrays["emb.weight"].shape
    out = [struct.pack("<6i", MAGIC, version, vocab, width, len(layers), NUMBERS[kind])]
    held = {}
    for name, array in arrays.items():
        number, data = 0, array.astype("<f4").tobytes()
        held[name] = array
        if kind == "FP16" and array.ndim > 1 and ".time_" not in name:
            number, data = 1, array.astype("<f2").tobytes()
            held[name] = array.astype("<f2")
        elif kind[0] == "Q" and is_quantised(name, array.shape):
            blocks = [quantise(row, kind) for row in array.reshape(-1, 32)]
            number, data = NUMBERS[kind], b"".join(blocks)
            values = [restored(block, kind) for block in blocks]
            held[name] = np.array(values, np.float32).reshape(array.shape)
        key = name.encode()
        out.append(struct.pack("<3i", array.ndim, len(key), number))
        out.append(struct.pack(f"<{array.ndim}i", *reversed(array.shape)) + key + data)
    return b"".join(out), held


@pytest.mark.parametrize("kind", list(NUMBERS))
@pytest.mark.parametrize("version", VERSIONS)
def test_every_generation_in_every_type_comes_back(official, tmp_path, version, kind):
    tensors = official(version)
    arrays = forward(tensors, version)
    content, held = ggmf(arrays, kind)
    (tmp_path / "model.bin").write_bytes(content)
    weights = formats.read(tmp_path / "model.bin")
    assert weights.format == f"ggmf {kind}"
    assert weights.architecture.version == version.removesuffix(" raw")
    assert weights.architecture.options.get("norm_eps") == (
        None if version == "4" else 1e-5 if version[0] == "5" else 64e-5
    )
    found = weights.tensors
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in tensors.items()}
    # what was read, changed once more, is what the file holds
    again = forward(found, version)
    assert again.keys() == held.keys()
    for name, array in held.items():
        if name.endswith(("time_decay", "time_first")):
            np.testing.assert_allclose(again[name], array, rtol=1e-6, err_msg=name)
        else:
            np.testing.assert_array_equal(again[name], array.astype(np.float32), err_msg=name)
    if kind == "FP32":  # and without a loss on the way it is the original
        for name, tensor in tensors.items():
            inverted = name.endswith(("time_decay", "time_first")) and version[0] in "45"
            bound = 1e-5 if inverted else 0
            assert (found[name] - tensor).abs().max() <= bound, name
    dtypes = {t.dtype for t in found.values()}
    assert dtypes == ({torch.float32, torch.float16} if kind == "FP16" else {torch.float32})
    described = formats.describe(tmp_path / "model.bin")
    assert described.architecture == weights.architecture
    same = {n: (t.shape, t.dtype) for n, t in described.tensors.items()}
    assert same == {n: (t.shape, t.dtype) for n, t in found.items()}


@pytest.mark.parametrize("version", VERSIONS)
def test_ggmf_gives_the_model_that_the_pth_gives(official, tmp_path, version):
    tensors = official(version)
    torch.save(tensors, tmp_path / "model.pth")
    (tmp_path / "model.bin").write_bytes(ggmf(forward(tensors, version), version=100)[0])
    a, b = (rwkv_text.load(tmp_path / f"model.{end}") for end in ("pth", "bin"))
    for name, tensor in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], tensor, atol=1e-5, rtol=0)


def test_what_was_stacked_is_written_apart(official, tmp_path):
    (tmp_path / "model.bin").write_bytes(ggmf(forward(official("7"), "7"))[0])
    convert(tmp_path / "model.bin", tmp_path / "model.pth", "official")
    with zipfile.ZipFile(tmp_path / "model.pth") as file:
        stored = sum(i.file_size for i in file.infolist() if "/data/" in i.filename)
    assert stored == sum(tensor.nbytes for tensor in official("7").values())
    for to in ("hf", "safetensors"):  # a format that holds no shared memory
        convert(tmp_path / "model.bin", tmp_path / to, to)
        found = formats.read(tmp_path / to).tensors
        assert all(torch.equal(found[name], tensor) for name, tensor in official("7").items())


def test_one_head_of_5_2_is_told_from_a_channel_each(official, tmp_path):
    arrays = forward(official("5.2", heads=1), "5.2")  # the converter's squeeze eats its axis
    assert arrays["blocks.0.att.time_decay"].shape == (64, 1)
    (tmp_path / "model.bin").write_bytes(ggmf(arrays)[0])
    a = formats.read(tmp_path / "model.bin").architecture
    assert (a.version, a.options["head_dim"]) == ("5.2", 64)


def test_decays_that_were_rounded_away_stay_what_they_were(official, tmp_path):
    for version, values in (("4", [-120.0, -50.0, 3.0, 60.0]), ("5.2", [-40.0, -17.0, 4.0, 6.0])):
        tensors = official(version)
        decay = tensors["blocks.0.att.time_decay"].flatten()
        decay[:4] = torch.tensor(values)
        tensors["blocks.0.att.time_decay"] = decay.view(tensors["blocks.0.att.time_decay"].shape)
        (tmp_path / "model.bin").write_bytes(ggmf(forward(tensors, version))[0])
        found = formats.read(tmp_path / "model.bin").tensors["blocks.0.att.time_decay"].flatten()
        assert found.isfinite().all()

        def factor(x):
            return torch.exp(-torch.exp(x))  # what is left of the state after a token

        torch.testing.assert_close(factor(found), factor(decay), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("number", TYPES)
def test_every_pattern_of_a_block_is_dequantised_as_written_down(number):
    kind = TYPES[number]
    rng = np.random.default_rng(number)
    data = rng.integers(0, 256, (300, kind.nbytes), dtype=np.uint8)
    halves = rng.normal(size=(300, 1 + kind.has_minimum)).astype("<f2")
    data[:, : 2 * halves.shape[1]] = halves.view(np.uint8)
    expected = np.array([restored(row.tobytes(), kind.name) for row in data], np.float32)
    np.testing.assert_array_equal(dequantise(kind, data.reshape(-1)).reshape(-1, 32), expected)
    assert kind.nbytes == {"Q4_0": 18, "Q4_1": 20, "Q5_0": 22, "Q5_1": 24, "Q8_0": 34}[kind.name]


def small(kind: str = "FP32") -> bytes:
    """Return a file whose first tensor is emb.weight [4, 32]: its record is at byte 24."""
    arrays = {
        "emb.weight": np.ones((4, 32), np.float32),
        "blocks.0.att.key.weight": np.ones((32, 32), np.float32),
    }
    return ggmf(arrays, kind)[0]


def at(offset: int, *numbers: int):
    """Return a change: these int32 in place of those at ``offset``."""

    def change(content: bytes) -> bytes:
        new = struct.pack(f"<{len(numbers)}i", *numbers)
        return content[:offset] + new + content[offset + len(new) :]

    return change


SECOND = 24 + 12 + 8 + 10 + 4 * 128  # the record after emb.weight


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (at(4, 102), "of ggmf version 102, expected 100 or 101"),
        (at(4, 99), "of ggmf version 99"),
        (at(8, -4), "header says vocabulary -4"),
        (at(12, 0), "header says vocabulary 4, width 0"),
        (at(16, 0), "layers 0"),
        (at(16, 2**31 - 1), r"its header says .* \[4, 32, 2147483647\], its tensors \[4, 32, 1\]"),
        (at(8, 5), r"its header says .* \[5, 32, 1\], its tensors \[4, 32, 1\]"),
        (at(20, 4), "its header is of type Q4_1_O, expected one of FP32, FP16, Q4_0"),
        (at(20, 5), "type Q4_2"),
        (at(20, 6), "type Q4_3"),
        (at(20, -1), "type number -1"),
        (at(20, 10), "type number 10"),
        (at(4, 100, 4, 32, 1, 8), r"version 100 and quantised \(Q5_1\)"),
        (at(24, 0), "at byte 24 of .*: a tensor has 0 axes"),
        (at(24, -1), "a tensor has -1 axes"),
        (at(24, 2**31 - 1), "a tensor has 2147483647 axes"),
        (at(28, 0), "a name has 0 bytes"),
        (at(28, -10), "a name has -10 bytes"),
        (at(28, 2**31 - 1), "a name has 2147483647 bytes"),
        (at(32, 4), "emb.weight is of type Q4_1_O"),
        (at(32, 77), "emb.weight is of type number 77"),
        (at(32, 2), "damaged|bytes|axes|name"),
        (at(36, -32), r"emb.weight has axes \[-32, 4\], expected positive numbers"),
        (at(36, 32, 0), r"has axes \[32, 0\]"),
        (at(36, 2**30, 2**30), "needs 4611686018427387904 bytes"),
        (at(36, 65536, 65536), "needs 17179869184 bytes"),  # 2**32 values wrap around to none
        (at(36, 33, 4), "bytes|axes|name"),
        (at(SECOND, 3), "bytes|axes|name|positive"),
        (at(SECOND + 8, 2), "bytes|axes|name|cut short"),
        (at(SECOND + 12, 31), "bytes|axes|name|cut short"),
        (lambda c: c + b"\0", "1 bytes are left, expected a tensor or the end"),
        (lambda c: c + bytes(40), "a tensor has 0 axes"),
        (lambda c: c + c[24:SECOND], "emb.weight comes a second time"),
        (lambda c: c.replace(b"emb.weight", b"emb.w\xff\xfe\xfdht"), "is not UTF-8"),
        (lambda c: c.replace(b"emb.weight", b"emb.wait.."), "is no RWKV language model"),
        (lambda c: c[:10], "is cut short: a ggmf file begins with 24 bytes, got 10"),
        (lambda c: c[:24], "is no RWKV language model"),
        (lambda c: c[:30], "6 bytes are left"),
        (lambda c: c[:40], "the axes and name of a tensor end at byte"),
        (
            lambda c: c[:-1],
            r"blocks.0.att.key.weight with axes \[32, 32\] as FP32 needs 4096 bytes",
        ),
    ],
)
def test_numbers_that_lie_are_refused_by_the_byte(tmp_path, change, error):
    path = tmp_path / "model.bin"
    path.write_bytes(change(small()))
    for function in (formats.read, formats.describe):
        with pytest.raises(CheckpointError, match=error):
            function(path)


def test_rows_that_hold_no_whole_blocks(tmp_path):
    content = small("Q4_0")
    record = content.index(b"blocks.0") - 20
    (tmp_path / "model.bin").write_bytes(at(record + 12, 16, 64)(content))
    with pytest.raises(CheckpointError, match="rows of 16 weights; Q4_0 takes multiples of 32"):
        formats.read(tmp_path / "model.bin")


@pytest.mark.parametrize("kind", ["FP32", "Q5_1"])
def test_every_truncation_is_refused(tmp_path, official, kind):
    content, _ = ggmf(forward(official("7", depth=1), "7"), kind)
    path = tmp_path / "model.bin"
    rng = np.random.default_rng(0)
    for keep in {*range(24, 120), *rng.integers(120, len(content), 60).tolist()}:
        path.write_bytes(content[:keep])
        with pytest.raises(CheckpointError):
            formats.describe(path)


@pytest.mark.parametrize(
    ("version", "part", "value", "error"),
    [
        ("4", "time_decay", 0.5, "values outside -inf to 0"),
        ("5.2", "time_decay", 1.5, "values outside 0 to 1"),
        ("5.2", "time_decay", -0.5, "values outside 0 to 1"),
        ("5.0", "time_first", -0.5, "values outside 0 to inf"),
        ("5.2", "time_decay", np.nan, "values outside 0 to 1"),
        ("7", "k_k", np.nan, "values that are not finite: blocks.0.att.k_k"),
        ("7", "k_k", np.inf, "values that are not finite: blocks.0.att.k_k"),
    ],
)
def test_values_that_no_converter_wrote(official, tmp_path, version, part, value, error):
    arrays = forward(official(version), version)
    arrays[f"blocks.0.att.{part}"].reshape(-1)[3] = value
    (tmp_path / "model.bin").write_bytes(ggmf(arrays)[0])
    with pytest.raises(CheckpointError, match=error):
        formats.read(tmp_path / "model.bin")


def test_token_shifts_must_be_six(official, tmp_path):
    arrays = forward(official("7"), "7")
    arrays["blocks.1.att.x_rwkvag"] = arrays["blocks.1.att.x_rwkvag"][:5]
    (tmp_path / "model.bin").write_bytes(ggmf(arrays)[0])
    with pytest.raises(CheckpointError, match=r"shape \[5, 1, 64\], expected six rows: r, w, k"):
        formats.read(tmp_path / "model.bin")
    arrays = forward(official("7"), "7")
    arrays["blocks.1.att.x_w"] = np.zeros((1, 1, 64), np.float32)
    (tmp_path / "model.bin").write_bytes(ggmf(arrays)[0])
    with pytest.raises(CheckpointError, match=r"holds blocks.1.att.x_w twice"):
        formats.read(tmp_path / "model.bin")
