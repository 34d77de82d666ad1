"""Official weights: recognised, mapped, refused with a sentence, written back bit for bit."""

import json
import random
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkv_text
from rwkv_core import checkpoint, formats
from rwkv_core.cli import main
from rwkv_core.errors import CheckpointError
from rwkv_core.formats import pth
from rwkv_core.formats.convert import convert
from rwkv_core.formats.report import state_bytes
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

VERSIONS = ["4", "5.0", "5.0 raw", "5.1", "5.2", "6", "7"]
FLAGS5 = {  # version → gate, decay per channel, exponentiated bonus
    "5.0": (False, False, True),
    "5.0 raw": (False, False, False),
    "5.1": (True, False, False),
    "5.2": (True, True, False),
}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert tensor.shape == b[name].shape, name
        assert torch.equal(tensor, b[name]), name


def ours(name: str) -> str:
    """Return our name of an official one, written down on its own."""
    if name.startswith("blocks.0.ln0."):
        return "backbone.ln_in." + name[13:]
    if name.startswith("blocks."):
        name = name.replace(".att.", ".time_mix.").replace(".ffn.", ".channel_mix.")
    return name if name.startswith(("emb.", "head.")) else "backbone." + name


@pytest.fixture
def write(tmp_path):
    """Return ``write(tensors) -> path`` of a .pth file by torch.save alone."""

    def write(tensors, name="model.pth"):
        torch.save(tensors, tmp_path / name)
        return tmp_path / name

    return write


# detection and names


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("version", VERSIONS)
def test_version_and_sizes_are_told_by_tensors_in_any_order(official, write, version, depth):
    tensors = official(version, depth=depth, hidden=112)
    names = list(tensors)
    random.Random(depth).shuffle(names)
    weights = formats.read(write({name: tensors[name] for name in names}))
    a = weights.architecture
    assert (a.mixer, a.version) == (f"rwkv{version[0]}", version.removesuffix(" raw"))
    assert (a.dim, a.depth, a.vocab_size) == (64, depth, 10)
    expected: dict = {"hidden_dim": 112}
    if version != "4":
        expected |= {"head_dim": 16, "norm_eps": 64e-5}
    if version in FLAGS5:
        expected |= dict(zip(("gate", "per_channel", "exp_bonus"), FLAGS5[version], strict=True))
    if version == "6":
        expected |= {"mix_rank": 32, "decay_rank": 64}
    if version == "7":
        expected |= {"decay_rank": 32, "iclr_rank": 32, "gate_rank": 64}
        expected |= {"value_rank": 32} if depth > 1 else {}
    assert a.options == expected
    assert_same(weights.tensors, tensors)
    assert bool(weights.assumed) == (version != "4")


@pytest.mark.parametrize("heads", [1, 64])
@pytest.mark.parametrize("version", ["5.2", "6", "7"])
def test_one_head_and_one_channel_per_head(official, write, version, heads):
    options = formats.read(write(official(version, heads=heads))).architecture.options
    assert options["head_dim"] == 64 // heads


@pytest.mark.parametrize("version", VERSIONS)
def test_every_tensor_arrives_at_its_parameter(official, write, version):
    tensors = official(version, dtype=torch.bfloat16)
    model = rwkv_text.load(write(tensors))
    assert not model.training
    state = model.state_dict()
    assert state.keys() == {ours(name) for name in tensors}
    for name, tensor in tensors.items():
        got = state[ours(name)]
        assert got.dtype == torch.float32
        assert torch.equal(got.flatten(), tensor.float().flatten()), name
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.tokenizer == "bytes"


@pytest.mark.parametrize("version", ["6", "7"])
def test_a_tuned_state_is_turned_into_keys_by_values(official, write, tmp_path, version):
    path = write(official(version, tuned=True))
    tensors = torch.load(path, weights_only=True)
    model = rwkv_text.load(path)
    state = model.backbone.blocks[1].time_mix.time_state
    assert torch.equal(state, tensors["blocks.1.att.time_state"].permute(0, 2, 1))
    convert(path, tmp_path / "own", "safetensors")
    convert(tmp_path / "own", tmp_path / "back.pth", "official")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True), tensors)
    with pytest.raises(CheckpointError, match="tuned_state, which the Hugging Face layouts"):
        convert(path, tmp_path / "hf", "hf")


@pytest.mark.parametrize("version", VERSIONS)
def test_large_models_are_built_without_initialising(
    official, write, tmp_path, monkeypatch, version
):
    path = write(official(version))
    plain = rwkv_text.load(path)
    convert(path, tmp_path / "own", "safetensors")
    monkeypatch.setattr(checkpoint, "LARGE", 0)
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda x, **_: x if x.is_meta else fail())
    for source in (path, tmp_path / "own"):
        model = rwkv_text.load(source)
        assert_same(model.state_dict(), plain.state_dict())
        assert [p.requires_grad for p in model.parameters()] == [True] * len(model.state_dict())
        path.write_bytes(bytes(path.stat().st_size))  # its memory is not the file's
        assert_same(model.state_dict(), plain.state_dict())
        assert model(torch.tensor([[1, 2]])).logits_BTV.isfinite().all()


def fail():
    raise AssertionError("a large model was initialised")


@pytest.mark.parametrize("rows", [256, 50277, 50304, 65536, 300])
def test_the_vocabulary_is_told_by_the_rows(official, write, rows):
    tensors = official("7", dim=32, heads=2, depth=1, vocab=rows)
    name = {50277: "20B", 50304: "20B", 65536: "world"}.get(rows, "bytes")
    assert rwkv_text.load(write(tensors)).config.tokenizer == name


def test_layer_0_value_mix_is_dropped_and_named(official, write, capsys, tmp_path):
    tensors = official("7")
    unused = {f"blocks.0.att.v{i}": torch.full((1, 1, 64), 9.0) for i in range(3)}
    weights = formats.read(write(tensors | unused))
    assert weights.dropped == tuple(unused)
    assert_same(weights.tensors, tensors)
    argv = ["convert", str(tmp_path / "model.pth"), str(tmp_path / "out.pth"), "--to", "official"]
    assert main(argv) == 0
    assert "left out, since no model uses them: blocks.0.att.v0" in capsys.readouterr().out


@pytest.mark.parametrize("names", ["official", "deepspeed"])
def test_safetensors_with_official_names(official, tmp_path, names):
    tensors = official("5.2", dtype=torch.float16)
    prefix = "_forward_module." if names == "deepspeed" else ""
    save_file({prefix + n: t for n, t in tensors.items()}, tmp_path / "x.safetensors")
    weights = formats.read(tmp_path / "x.safetensors")
    assert weights.format == "safetensors"
    assert_same(weights.tensors, tensors)


# what is refused, and how


def without(name):
    return lambda t: {n: x for n, x in t.items() if n != name}


def plus(name, shape=(2, 2)):
    return lambda t: t | {name: torch.zeros(shape)}


@pytest.mark.parametrize(
    ("version", "change", "error"),
    [
        ("7", plus("blocks.0.ffn.s_emb.weight"), "holds RWKV-7a"),
        ("7", lambda t: plus("blocks.0.ffn.s_emb.weight")(plus("blocks.0.qkv.q")(t)), "RWKV-7b"),
        ("7", plus("blocks.1.ffn.enn.weight"), "holds RWKV-8"),
        ("7", plus("blocks.1.rosa.q"), "holds RWKV-8 ROSA"),
        ("6", plus("blocks.0.att.gate_w1"), "holds RWKV-6a"),
        ("6", plus("blocks.0.att.time_maa_rkvw_w1"), "holds RWKV-6b or 6c"),
        ("4", plus("blocks.1.tiny_q.weight"), "holds RWKV-4a"),
        ("4", plus("head_q.weight"), "copy head"),
        ("4", plus("pos_emb_x"), "position embeddings"),
        ("4", plus("blocks.0.ffnPre.key.weight"), "begins with channel mixing"),
        ("4", plus("blocks.0.att.qq.weight"), "extra attention"),
        ("7", plus("blocks.1.att.extra"), r"holds blocks.1.att.extra, which such a model has not"),
        ("7", plus("optimizer"), "holds optimizer, which such a model has not"),
        ("7", without("blocks.1.att.w2"), r"lacks blocks.1.att.w2"),
        ("7", without("blocks.0.att.w1"), r"lacks blocks.0.att.w1"),
        ("5.2", without("blocks.0.att.time_decay"), r"lacks blocks.0.att.time_decay"),
        ("4", without("head.weight"), "lacks head.weight"),
        ("4", without("emb.weight"), "is no RWKV language model: expected emb.weight"),
        ("4", plus("blocks.3.ln1.weight", (64,)), "holds layer 3 but no tensor of layer 2"),
        ("4", plus("blocks.99999.ln1.weight", (64,)), "holds layer 99999 but no tensor of layer 2"),
        ("4", plus("blocks.01.ln1.weight", (64,)), "holds blocks.01.ln1.weight, which"),
        ("4", plus("blocks.999999999999.ln1.weight", (64,)), "which such a model has not"),
        ("7", plus("_forward_module.emb.weight", (10, 64)), "holds emb.weight twice"),
        ("4", lambda t: t | {"ln_out.bias": torch.zeros(64, dtype=torch.int64)}, "of torch.int64"),
        ("4", lambda t: t | {"ln_out.bias": torch.zeros(0)}, "ln_out.bias is empty"),
        ("4", lambda t: t | {"ln_out.bias": torch.zeros(63)}, r"has shape \[63\], expected \[64\]"),
        ("4", lambda t: t | {"emb.weight": torch.zeros(640)}, r"expected two axes"),
        ("7", lambda t: t | {"blocks.0.att.r_k": torch.zeros(4, 8)}, "product is the width 64"),
        ("6", lambda t: t | {"blocks.0.att.time_maa_w1": torch.zeros(64, 13)}, "13 columns"),
        ("5.1", lambda t: t | {"blocks.0.att.time_decay": torch.zeros(5)}, "5 values, expected"),
        (
            "7",
            lambda t: t | {"blocks.0.att.key.weight": torch.zeros(128, 64)},
            "attention is 128 wide and the embedding 64",
        ),
        (
            "7",
            lambda t: t | {"head.weight": torch.full((10, 64), torch.nan)},
            "1 of .* tensors hold values that are not finite: head.weight",
        ),
    ],
)
def test_what_is_no_supported_model_is_refused_with_a_sentence(
    official, write, version, change, error
):
    path = write(change(official(version)))
    with pytest.raises(CheckpointError, match=error):
        rwkv_text.load(path)


def test_generations_are_not_mixed(official, write):
    for one, other in (("4", "7"), ("7", "4"), ("6", "7"), ("5.2", "6")):
        first, second = official(one), official(other)
        mixed = {n: t for n, t in first.items() if not n.startswith("blocks.1.")}
        mixed |= {n: t for n, t in second.items() if n.startswith("blocks.1.")}
        with pytest.raises(CheckpointError, match=r"mixes generations: layer 0 is RWKV-."):
            formats.read(write(mixed))


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99, -1])
def test_truncated_safetensors_are_refused(official, tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file(official("4"), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    for function in (formats.read, formats.describe):
        with pytest.raises(CheckpointError):
            function(path)


def header(**entries):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"\xff" * 7 + b"\x7f{" + bytes(99), "its header would take"),
        ((2**40).to_bytes(8, "little") + b"{" + bytes(99), "its header would take"),
        (header(a=F32) + bytes(9), "its tensors take 8 bytes, the file has 9"),
        (header(a=F32 | {"data_offsets": [8, 16]}) + bytes(16), "begins at byte 8"),
        (header(a=F32, b=F32) + bytes(8), "begins at byte 0 of the data, not 8"),
        (header(a=F32 | {"shape": [2**62]}) + bytes(8), "not made of whole numbers"),
        (header(a=F32 | {"shape": [2**40]}) + bytes(8), "takes 4398046511104 bytes"),
        (header(a=F32 | {"shape": [-2]}) + bytes(8), "not made of whole numbers"),
        (header(a=F32 | {"shape": [True, 2]}) + bytes(8), "not made of whole numbers"),
        (header(a=F32 | {"shape": 2}) + bytes(8), "not made of whole numbers"),
        (header(a=F32 | {"dtype": "I32"}) + bytes(8), "of type I32, expected F64, F32"),
        (header(a=F32 | {"dtype": []}) + bytes(8), r"of type \[\], expected"),
        (header(a=3) + bytes(8), "something unknown"),
        (header(a=F32).replace(b'"a"', b'"b"').replace(b"[2]", b"[3") + bytes(8), "damaged"),
        ((200_000).to_bytes(8, "little") + b'{"a":' + b"[" * 199_995, "damaged"),
        (b'\x0f\0\0\0\0\0\0\0{"a":{},"a":{}}', "a key comes twice"),
    ],
)
def test_safetensors_headers_that_lie(tmp_path, content, error):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=error):
        formats.read(path)


@pytest.mark.parametrize(
    ("head", "error"),
    [
        (b"GGUF", "a GGUF file"),
        (b"lmgg", "without version"),
        (b"ggmf", "stores numbers the other way round"),
        (b"\x1f\x8b", "compressed with gzip"),
        (b"hello", "begins with b'hello.*expected a .pth file"),
        (b"", "begins with b''"),
    ],
)
def test_other_files_are_named(tmp_path, head, error):
    (tmp_path / "x").write_bytes(head + bytes(40) if head else b"")
    with pytest.raises(CheckpointError, match=error):
        rwkv_text.load(tmp_path / "x")


# writing


def layouts(version):
    return ["safetensors"] + (["hf"] if version in ("4", "6", "7") else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("version", VERSIONS)
def test_round_trips_are_equal_bit_for_bit(official, write, tmp_path, version, dtype):
    tensors = official(version, dtype=dtype)
    original = write(tensors)
    for to in layouts(version):
        convert(original, tmp_path / to, to)
        stored = load_file(tmp_path / to / "model.safetensors")
        assert {t.dtype for t in stored.values()} == {dtype}
        convert(tmp_path / to, tmp_path / f"{to}.pth", "official")
        found = torch.load(tmp_path / f"{to}.pth", weights_only=True)
        assert type(found) is dict
        assert_same(found, tensors)
        a, b = rwkv_text.load(original), rwkv_text.load(tmp_path / to)
        assert a.config == b.config
        assert_same(a.state_dict(), b.state_dict())
    if version not in ("4", "6", "7"):
        with pytest.raises(CheckpointError, match=r"there is no Hugging Face layout for RWKV-5"):
            convert(original, tmp_path / "hf", "hf")
        assert not (tmp_path / "hf").exists()


def test_a_model_of_ours_becomes_official_and_computes_the_same(tmp_path):
    config = TextConfig(dim=32, depth=2, vocab_size=20, mixer_options={"head_dim": 16})
    model = checkpoint.build("text", config)
    perturb(model)
    checkpoint.save(model, tmp_path / "step-0000001")
    tokens = torch.tensor([[1, 2, 3, 19]])
    for to in ("official", "hf"):
        convert(tmp_path, tmp_path / f"out-{to}", to)  # a run's folder gives its latest
        loaded = rwkv_text.load(tmp_path / f"out-{to}")
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits_BTV, model.eval()(tokens).logits_BTV)


def test_mixed_dtypes_survive(official, write, tmp_path):
    tensors = official("7", dtype=torch.bfloat16)
    tensors = {n: t.float() if n.endswith(".w0") else t for n, t in tensors.items()}
    for to in ("hf", "safetensors"):
        convert(write(tensors), tmp_path / to, to)
        convert(tmp_path / to, tmp_path / f"{to}.pth", "official")
        assert_same(torch.load(tmp_path / f"{to}.pth", weights_only=True), tensors)


def test_what_a_format_cannot_say_is_noted(official, tmp_path):
    options = {"head_dim": 16, "norm_eps": 1e-5}
    config = TextConfig(dim=32, depth=1, vocab_size=20, mixer_options=options)
    checkpoint.save(checkpoint.build("text", config), tmp_path / "own")
    (note,) = convert(tmp_path / "own", tmp_path / "x.pth", "official")
    assert "this model has 1e-05" in note
    (note,) = convert(tmp_path / "own", tmp_path / "hf", "hf")
    assert "eps 0.00016, this model with 1e-05" in note
    assert formats.read(tmp_path / "hf").architecture.options["norm_eps"] == 1e-5


def test_nothing_that_exists_is_overwritten(official, write, tmp_path, capsys):
    path = write(official("7"))
    for to in ("official", "hf", "safetensors"):
        (tmp_path / to).write_text("mine")
        assert main(["convert", str(path), str(tmp_path / to), "--to", to]) == 2
        assert "exists already" in capsys.readouterr().err
        assert (tmp_path / to).read_text() == "mine"


def test_only_official_generations_of_language_models_leave(tmp_path):
    options = {"head_dim": 16}
    config = TextConfig(dim=32, depth=1, vocab_size=20, mixer="none", mixer_options=options)
    checkpoint.save(checkpoint.build("text", config), tmp_path / "none")
    with pytest.raises(CheckpointError, match="of the mixer 'none'"):
        convert(tmp_path / "none", tmp_path / "x.pth", "official")
    (tmp_path / "none" / "config.json").write_text('{"adapter": "classify", "config": {}}')
    with pytest.raises(CheckpointError, match="of the domain 'classify'"):
        convert(tmp_path / "none", tmp_path / "x.pth", "official")
    assert not (tmp_path / "x.pth").exists()


def test_a_write_that_fails_leaves_nothing(official, write, tmp_path, monkeypatch):
    weights = formats.read(write(official("7")))

    def full(tensors, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        pth.write(weights.tensors, tmp_path / "new.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]


# the command, and repositories by name


def test_info_says_what_is_known_and_what_was_assumed(official, write, capsys, monkeypatch):
    tensors = official("7", depth=3, dtype=torch.bfloat16)
    path = write(tensors)
    monkeypatch.setattr(torch, "load", None)  # shapes alone
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in out.splitlines() if "rank" not in line)
    assert lines["format"] == "pth"
    assert lines["version"] == "RWKV-7"
    assert lines["layers"] == "3"
    assert lines["heads"] == "4 of 16"
    assert lines["hidden"] == "96"
    assert lines["parameters"] == f"{sum(t.numel() for t in tensors.values()):,}"
    assert lines["vocabulary"] == "10 rows, tokenizer bytes"
    assert lines["state"] == f"{4 * 3 * 64 * (16 + 2):,} bytes per sequence"
    assert lines["dtypes"] == f"bfloat16 of {len(tensors)} tensors"
    assert lines["assumed"].startswith("eps 0.00064 of the norm over heads")
    assert "gate rank   64" in out


@pytest.mark.parametrize("version", VERSIONS)
def test_the_size_of_the_state_is_that_of_a_real_one(official, write, version):
    path = write(official(version))
    state = rwkv_text.load(path).init_state(1).packed()
    told = state_bytes(formats.describe(path).architecture)
    assert told == sum(tensor.nbytes for tensor in state.values())


def test_every_verb_takes_official_weights(official, write, tmp_path, capsys):
    path = str(write(official("7", dim=32, heads=2, depth=1, vocab=256)))
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 40)
    assert main(["generate", path, "--prompt", "a", "--max-tokens", "3", "--seed", "1"]) == 0
    assert main(["eval", path, "--data", str(text)]) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert main(["export", path, str(tmp_path / "out"), "--steps", "4"]) == 0
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_file_within_our_folder_is_our_folder(tmp_path):
    config = TextConfig(dim=32, depth=1, vocab_size=20, mixer_options={"head_dim": 16})
    checkpoint.save(checkpoint.build("text", config), tmp_path / "own")
    assert rwkv_text.load(tmp_path / "own" / "model.safetensors").config == config


def test_a_repository_is_fetched_by_name_and_only_then(official, write, tmp_path, monkeypatch):
    convert(write(official("7")), tmp_path / "hf", "hf")
    asked = []

    def fetch(name, **kwargs):
        asked.append((name, kwargs["allow_patterns"]))
        return str(tmp_path / "hf")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = rwkv_text.load("someone/rwkv7-tiny")
    assert model.config.dim == 64
    ((name, patterns),) = asked
    assert name == "someone/rwkv7-tiny"
    assert not any(pattern.endswith((".py", "*")) for pattern in patterns)
    shutil.copytree(tmp_path / "hf", tmp_path / "someone" / "rwkv7-tiny")
    rwkv_text.load("someone/rwkv7-tiny")  # it exists here
    for path in ("absent", "someone/absent", "a/b/c", "../x", str(tmp_path / "a" / "b"), "a/.b"):
        with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
            rwkv_text.load(path)
    assert len(asked) == 1


def test_a_repository_that_cannot_be_fetched(tmp_path, monkeypatch):
    def fail(name, **kwargs):
        raise huggingface_hub.errors.HFValidationError("no such thing\nand more")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match=r"taken for .* cannot be fetched: no such thing$"):
        rwkv_text.load("some/one")


def test_the_hub_library_is_not_needed_before(run_python):
    run_python(
        "import rwkv_text, rwkv_core.formats\n"
        "from rwkv_core.errors import CheckpointError\n"
        "try:\n    rwkv_text.load('some/one')\n"
        "except CheckpointError as error:\n    assert 'rwkv-toolkit[hub]' in str(error)\n"
        "else:\n    raise SystemExit('loaded')",
        block=("huggingface_hub",),
    )


# models nobody here made


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "bound"), [("4v0-660K", 5e-6), ("5v2-730K", 5e-6), ("7v0-834K", 1e-6)]
)
def test_the_tiny_models_of_rwkv_cpp_give_their_published_logits(shared_data, name, bound):
    folder = shared_data / "rwkv_cpp_tiny"
    model = rwkv_text.load(folder / f"tiny-rwkv-{name}-FP32.bin")
    expected = np.fromfile(folder / f"expected-logits-{name}.bin", np.float32)
    tokens, state = torch.tensor([[34, 105, 110]]), None
    with torch.no_grad():
        whole = model(tokens).logits_BTV[0, -1].numpy()
        for token in tokens[0]:
            out = model(token.view(1, 1), state)
            state = out.state
    single = out.logits_BTV[0, -1].numpy()
    assert np.abs(whole - expected).max() <= bound
    assert np.abs(single - expected).max() <= bound
