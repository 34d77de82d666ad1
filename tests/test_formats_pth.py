"""Official .pth files: whatever trainers wrap around them is read, whatever lies is refused."""

import collections
import io
import pickle
import shutil
import zipfile

import pytest
import torch

import rwkv_text
from rwkv_core import formats
from rwkv_core.errors import CheckpointError
from rwkv_core.formats import pth
from rwkv_text import CausalLM, TextConfig


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert torch.equal(tensor, b[name]), name


@pytest.fixture
def write(tmp_path):
    """Return ``write(tensors) -> path`` of a .pth file by torch.save alone."""

    def write(tensors, name="model.pth"):
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return write


# containers of .pth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(official, write, dtype):
    tensors = official("7", dtype=dtype)
    assert_same(formats.read(write(tensors)).tensors, tensors)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {f"_forward_module.{n}": x for n, x in t.items()},
        lambda t: {f"module._orig_mod.{n}": x for n, x in t.items()},
        lambda t: {"model": t, "step": 3, "loss": 2.5, "name": "run", "flags": [True, None]},
        lambda t: {"state_dict": {f"model.{n}": x for n, x in t.items()}, "epoch": 1},
        lambda t: {"module": {"module": t}},
        lambda t: {n: torch.nn.Parameter(x) for n, x in t.items()},
        lambda t: {n: x.T.contiguous().T if x.ndim == 2 else x for n, x in t.items()},
        lambda t: collections.OrderedDict(t),
    ],
    ids=["deepspeed", "ddp", "nested", "lightning", "twice", "parameters", "strided", "ordered"],
)
def test_what_trainers_wrap_around_the_weights(official, write, wrap):
    tensors = official("7")
    assert_same(formats.read(write(wrap(tensors))).tensors, tensors)


def test_a_module_state_with_its_metadata(official, tmp_path):
    model = CausalLM(TextConfig(dim=32, depth=1, vocab_size=10, mixer_options={"head_dim": 16}))
    torch.save(model.state_dict(), tmp_path / "model.pth")
    assert_same(pth.read(tmp_path / "model.pth"), dict(model.state_dict()))


def test_weights_saved_on_a_gpu_are_read_without_one(official, write, monkeypatch):
    tensors = official("7")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
    path = write(tensors)
    assert b"cuda:0" in path.read_bytes()
    assert_same(formats.read(path).tensors, tensors)


def test_describing_reads_no_values(official, write, monkeypatch):
    tensors = official("6", dtype=torch.bfloat16)
    path = write(tensors)
    monkeypatch.setattr(torch, "load", None)
    weights = formats.describe(path)
    assert all(t.is_meta for t in weights.tensors.values())
    shapes = {n: (t.shape, t.dtype) for n, t in weights.tensors.items()}
    assert shapes == {n: (t.shape, t.dtype) for n, t in tensors.items()}


# .pth files that lie


class _Storage:
    def __init__(self, key, numel, kind=torch.FloatStorage, location="cpu"):
        self.pid = ("storage", kind, key, location, numel)


class _Tensor:
    """Pickles as torch pickles a tensor, with any numbers."""

    def __init__(self, storage, size, stride, offset=0):
        empty = collections.OrderedDict()
        self.args = (storage, offset, size, stride, False, empty)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.args


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, _Storage) else None


def archive(path, content, storages, *, raw=None, **options):
    """Write a .pth file by hand: ``content`` pickled (or ``raw``), storages of so many bytes."""
    if raw is None:
        buffer = io.BytesIO()
        _Pickler(buffer, protocol=2).dump(content)
        raw = buffer.getvalue()
    with zipfile.ZipFile(path, "w", **options) as file:
        file.writestr("model/data.pkl", raw)
        for key, nbytes in storages.items():
            file.writestr(f"model/data/{key}", bytes(nbytes))
        file.writestr("model/version", "3\n")
    return path


def test_the_hand_made_archive_is_read(tmp_path):
    path = archive(tmp_path / "x.pth", {"a": _Tensor(_Storage("0", 4), (2, 2), (2, 1))}, {"0": 16})
    assert_same(pth.read(path), {"a": torch.zeros(2, 2)})


GOOD = _Storage("0", 4)
LIES = {
    "larger than its storage": (_Tensor(GOOD, (2**30, 2**10), (2**10, 1)), "reaches value"),
    "one value too long": (_Tensor(GOOD, (5,), (1,)), "reaches value 4 of a storage of 4"),
    "overflow": (_Tensor(GOOD, (2**40, 2**40), (2**40, 1)), "reaches value"),
    "more than 64 bits": (_Tensor(GOOD, (2**70,), (1,)), "a size of a tensor is 11805916207"),
    "negative size": (_Tensor(GOOD, (-1,), (1,)), "a size of a tensor is -1"),
    "negative stride": (_Tensor(GOOD, (2,), (-1,)), "a stride of a tensor is -1"),
    "negative offset": (_Tensor(GOOD, (2,), (1,), -1), "the offset of a tensor is -1"),
    "offset": (_Tensor(GOOD, (2,), (1,), 3), "reaches value 4"),
    "offset of nothing": (_Tensor(GOOD, (0,), (1,), 2**40), "begins at value"),
    "stride": (_Tensor(GOOD, (2,), (2**40,)), "reaches value"),
    "half a shape": (_Tensor(GOOD, (2, 2), (1,)), "has no shape"),
    "true as a size": (_Tensor(GOOD, (True,), (1,)), "a size of a tensor is bool"),
    "axes": (_Tensor(GOOD, (1,) * 60, (1,) * 60), "60 axes"),
    "expanded": (_Tensor(GOOD, (10**6,), (0,)), "tensors take 4000000 bytes"),
    "storage size": (_Tensor(_Storage("0", 2**40), (2,), (1,)), "storage of 4398046511104 bytes"),
    "storage sign": (_Tensor(_Storage("0", -4), (2,), (1,)), "the length of a storage is -4"),
    "absent storage": (_Tensor(_Storage("1", 4), (2,), (1,)), "got nothing"),
    "storage outside": (_Tensor(_Storage("../../x", 4), (2,), (1,)), "got nothing"),
    "meta": (_Tensor(_Storage("0", 4, location="meta"), (2,), (1,)), "no place in the file"),
    "two storages": (
        [_Tensor(GOOD, (2,), (1,)), _Tensor(_Storage("0", 8, torch.HalfStorage), (2,), (1,))],
        "described in two ways",
    ),
    "number": (3, "'a' is no tensor"),
    "list": ([_Tensor(GOOD, (2,), (1,))], "'a' is no tensor"),
}


@pytest.mark.parametrize("lie", LIES)
def test_numbers_that_lie_never_reach_torch(tmp_path, monkeypatch, lie):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    content, error = LIES[lie]
    path = archive(tmp_path / "x.pth", {"a": content}, {"0": 16})
    with pytest.raises(CheckpointError, match=error):
        pth.read(path)


class Attack:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w')",)


@pytest.mark.parametrize(
    "raw",
    [
        b"\x80\x02cos\nsystem\n.",
        b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94.",
        b"\x80\x02}q\x00(X\x01\x00\x00\x00aK\x01X\x01\x00\x00\x00aK\x02u.",  # a key twice
        b"\x80\x02}q\x00K\x01K\x02K\x03ss.",
        b"\x80\x02](K\x01K\x02a.",
        b"\x80\x02(((((",
        b"\x80\x02R.",
        b"\x80\x02Nh\x09.",
        b"\x80\x02(q\x00h\x00h\x00t.",
        b"\x80\x02\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.",  # a text of 2**63 bytes
        b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
        b"\x80\x02ccollections\nOrderedDict\nq\x00)R}(X\x05\x00\x00\x00itemsK\x01ub.",
        b"\x80\x02" + b"]q\x00" + b"(" + b"h\x00" * 500 + b"t" + b"\x85" * 500 + b".",
        b"",
    ],
)
def test_pickles_that_are_no_weights_are_refused_unexecuted(tmp_path, monkeypatch, raw):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    with pytest.raises(CheckpointError):
        pth.read(archive(tmp_path / "x.pth", None, {}, raw=raw))


def test_a_key_that_is_a_tower_of_tuples_is_refused_before_it_is_hashed(tmp_path):
    tower = b")q\x00" + b"h\x00\x86q\x00" * 100  # hashing it would take 2**100 steps
    with pytest.raises(CheckpointError, match="a key is a tuple"):
        pth.read(archive(tmp_path / "x.pth", None, {}, raw=b"\x80\x02}" + tower + b"K\x01s."))


def test_code_in_a_pickle_is_not_run(official, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Attack(ran)))
    archive(tmp_path / "new.pth", {"emb.weight": Attack(ran)}, {})
    torch.save({**official("4"), "x": Attack(ran)}, tmp_path / "saved.pth")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "rwkv7"}')
    shutil.copy(tmp_path / "saved.pth", folder / "pytorch_model.bin")
    errors = {
        "old.pth": r"a pickle of before torch 1.6.*save it again",
        "new.pth": r"it asks for (__builtin__|builtins)\.exec",
        "saved.pth": r"it asks for (__builtin__|builtins)\.exec",
        "hf": r"it asks for (__builtin__|builtins)\.exec",
    }
    for name, error in errors.items():
        for function in (formats.read, formats.describe, rwkv_text.load):
            with pytest.raises(CheckpointError, match=error):
                function(tmp_path / name)
    assert not ran.exists()


def test_archives_that_torch_did_not_write(official, write, tmp_path):
    tensor = {"a": _Tensor(GOOD, (4,), (1,))}
    path = archive(tmp_path / "x.pth", tensor, {"0": 16}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"is compressed; torch\.save stores"):
        pth.read(path)
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as file:
        file.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        pth.read(tmp_path / "y.pth")
    path = archive(tmp_path / "z.pth", tensor, {"0": 16})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", "")
    with pytest.raises(CheckpointError, match=r"it holds \['model', 'other'\]"):
        pth.read(path)
    path = archive(tmp_path / "w.pth", tensor, {"0": 16})
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("model/DATA/0", bytes(16))
    with pytest.raises(CheckpointError, match="twice"):
        pth.read(path)
    with zipfile.ZipFile(path := archive(tmp_path / "v.pth", tensor, {"0": 16}), "a") as file:
        file.writestr("model/byteorder", "big")
    with pytest.raises(CheckpointError, match="byte order b'big'"):
        pth.read(path)


@pytest.mark.parametrize("keep", [0, 1, 3, 4, 30, 100, 0.1, 0.5, 0.9, 0.99, 0.9999, -1])
def test_a_truncated_pth_is_refused(official, write, keep):
    path = write(official("7"))
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    for function in (formats.read, formats.describe):
        with pytest.raises(CheckpointError):
            function(path)


def test_a_view_is_written_without_the_rest_of_its_storage(tmp_path):
    pth.write({"a": torch.arange(1000.0)[2:4], "b": torch.ones(2, 3).T}, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        sizes = [i.file_size for i in file.infolist() if "/data/" in i.filename]
    assert sizes == [8, 24]
    assert_same(
        pth.read(tmp_path / "x.pth"), {"a": torch.tensor([2.0, 3.0]), "b": torch.ones(3, 2)}
    )
