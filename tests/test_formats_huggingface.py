"""Hugging Face folders, named here by hand: read, checked against their config, written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import rwkv_text
from rwkv_core import formats
from rwkv_core.errors import CheckpointError
from rwkv_core.formats.convert import convert

CONFIGS = {
    "4": {"model_type": "rwkv", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10},
    "6": {"model_type": "rwkv6", "hidden_size": 64, "norm_eps": 1e-5, "num_heads": 4},
    "7": {"model_type": "rwkv7", "hidden_size": 64, "head_dim": 16, "norm_eps": 1e-5},
}


def transformers4(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {
        "rwkv.embeddings.weight": t["emb.weight"],
        "rwkv.ln_out.weight": t["ln_out.weight"],
        "rwkv.ln_out.bias": t["ln_out.bias"],
        "head.weight": t["head.weight"],
        "rwkv.blocks.0.pre_ln.weight": t["blocks.0.ln0.weight"],
        "rwkv.blocks.0.pre_ln.bias": t["blocks.0.ln0.bias"],
    }
    for i in range(2):
        a, b = f"blocks.{i}.", f"rwkv.blocks.{i}."
        for ln in ("ln1.weight", "ln1.bias", "ln2.weight", "ln2.bias"):
            out[b + ln] = t[a + ln]
        for part in ("key.weight", "value.weight", "receptance.weight"):
            out[f"{b}attention.{part}"] = t[f"{a}att.{part}"]
            out[f"{b}feed_forward.{part}"] = t[f"{a}ffn.{part}"]
        for part in ("output.weight", "time_decay", "time_first"):
            out[f"{b}attention.{part}"] = t[f"{a}att.{part}"]
        for long in ("key", "value", "receptance"):
            out[f"{b}attention.time_mix_{long}"] = t[f"{a}att.time_mix_{long[0]}"]
        for long in ("key", "receptance"):
            out[f"{b}feed_forward.time_mix_{long}"] = t[f"{a}ffn.time_mix_{long[0]}"]
    return out


def ends(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = {
        "model.embeddings.weight": t["emb.weight"],
        "model.norm.weight": t["ln_out.weight"],
        "model.norm.bias": t["ln_out.bias"],
        "lm_head.weight": t["head.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"model.layers.0.pre_norm.{kind}"] = t[f"blocks.0.ln0.{kind}"]
        for i in range(2):
            out[f"model.layers.{i}.attn_norm.{kind}"] = t[f"blocks.{i}.ln1.{kind}"]
            out[f"model.layers.{i}.ffn_norm.{kind}"] = t[f"blocks.{i}.ln2.{kind}"]
            out[f"model.layers.{i}.attn.g_norm.{kind}"] = t[f"blocks.{i}.att.ln_x.{kind}"]
    return out


def fla7(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = ends(t)
    for i in range(2):
        att, attn = f"blocks.{i}.att.", f"model.layers.{i}.attn."
        pairs = [("receptance", "r"), ("key", "k"), ("value", "v"), ("output", "o")]
        for long, short in pairs:
            out[f"{attn}{short}_proj.weight"] = t[f"{att}{long}.weight"]
        for c in "rwkvag":
            out[f"{attn}x_{c}"] = t[f"{att}x_{c}"]
        for name in ("k_k", "k_a"):
            out[attn + name] = t[att + name].reshape(64)
        out[f"{attn}r_k"] = t[f"{att}r_k"]
        for c in "wag" if i == 0 else "wavg":
            out[f"{attn}{c}_lora.lora.0.weight"] = t[f"{att}{c}1"].t()
            out[f"{attn}{c}_lora.lora.2.weight"] = t[f"{att}{c}2"].t()
            if c != "g":
                out[f"{attn}{c}_lora.lora.2.bias"] = t[f"{att}{c}0"].reshape(64)
        ffn = f"model.layers.{i}.ffn."
        out[f"{ffn}x_k"] = t[f"blocks.{i}.ffn.x_k"].reshape(64)
        for part in ("key.weight", "value.weight"):
            out[ffn + part] = t[f"blocks.{i}.ffn.{part}"]
    return out


def fla6(t: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    out = ends(t)
    for i in range(2):
        att, attn = f"blocks.{i}.att.", f"model.layers.{i}.attn."
        for long in ("receptance", "key", "value", "gate"):
            out[f"{attn}{long[0]}_proj.linear.weight"] = t[f"{att}{long}.weight"]
        out[f"{attn}o_proj.weight"] = t[f"{att}output.weight"]
        out[f"{attn}bonus"] = t[f"{att}time_faaaa"]
        out[f"{attn}w_proj.linear.lora.0.weight"] = t[f"{att}time_decay_w1"].t()
        out[f"{attn}w_proj.linear.lora.2.weight"] = t[f"{att}time_decay_w2"].t()
        out[f"{attn}w_proj.linear.lora.2.bias"] = t[f"{att}time_decay"].reshape(64)
        out[f"{attn}x_proj.0.mu"] = t[f"{att}time_maa_x"].reshape(64)
        w, k, v, r, g = t[f"{att}time_maa_w1"].split(32, dim=1)  # five times [C, 32]
        out[f"{attn}x_proj.0.linear.weight"] = torch.cat([r, w, k, v, g], dim=1).t()
        w, k, v, r, g = t[f"{att}time_maa_w2"]  # five times [32, C]
        out[f"{attn}x_proj.2.weight"] = torch.cat([r, w, k, v, g]).t()
        out[f"{attn}x_bias"] = torch.cat([t[f"{att}time_maa_{c}"][0] for c in "rwkvg"])
        ffn = f"model.layers.{i}.ffn."
        out[f"{ffn}key.linear.weight"] = t[f"blocks.{i}.ffn.key.weight"]
        out[f"{ffn}key.mu"] = t[f"blocks.{i}.ffn.time_maa_k"].reshape(64)
        out[f"{ffn}receptance.linear.weight"] = t[f"blocks.{i}.ffn.receptance.weight"]
        out[f"{ffn}receptance.mu"] = t[f"blocks.{i}.ffn.time_maa_r"].reshape(64)
        out[f"{ffn}value.weight"] = t[f"blocks.{i}.ffn.value.weight"]
    return out


NAMED = {"4": transformers4, "6": fla6, "7": fla7}


@pytest.fixture
def folder(tmp_path, official):
    """Return ``folder(version, config, tensors) -> path`` of a Hugging Face folder."""

    def make(version="7", config=None, tensors=None):
        path = tmp_path / "hf"
        path.mkdir(exist_ok=True)
        tensors = NAMED[version](official(version)) if tensors is None else tensors
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps(CONFIGS[version] | (config or {})))
        return path

    return make


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("version", NAMED)
def test_every_layout_is_read(official, folder, version):
    weights = formats.read(folder(version))
    assert_same(weights.tensors, official(version))
    assert weights.architecture.version == version
    assert weights.format == ("transformers" if version == "4" else "fla")


@pytest.mark.parametrize("version", NAMED)
def test_every_layout_is_written_as_its_library_names_it(official, tmp_path, version):
    tensors = official(version, dtype=torch.bfloat16)
    torch.save(tensors, tmp_path / "model.pth")
    convert(tmp_path / "model.pth", tmp_path / "hf", "hf")
    assert_same(load_file(tmp_path / "hf" / "model.safetensors"), NAMED[version](tensors))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["model_type"] == {"4": "rwkv", "6": "rwkv6", "7": "rwkv7"}[version]
    expected = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 10}
    expected |= {"intermediate_size": 96, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    if version == "4":
        expected |= {"attention_hidden_size": 64, "layer_norm_epsilon": 1e-5}
    if version == "6":
        expected |= {"proj_low_rank_dim": 32, "gate_low_rank_dim": 64, "num_heads": 4}
        expected |= {"expand_k": 1.0, "expand_v": 1.0, "norm_eps": 1e-5}
    if version == "7":
        expected |= {"head_dim": 16, "decay_low_rank_dim": 32, "a_low_rank_dim": 32}
        expected |= {"v_low_rank_dim": 32, "gate_low_rank_dim": 64, "norm_eps": 1e-5}
        expected |= {"fuse_norm": False, "hidden_act": "sqrelu", "norm_first": True}
    assert expected.items() <= config.items()


def test_the_stacked_shifts_of_early_fla(official, folder):
    tensors = fla7(official("7"))
    for i in range(2):
        stem = f"model.layers.{i}.attn."
        rows = [tensors.pop(f"{stem}x_{c}").reshape(64) for c in "rwkvag"]
        tensors[f"{stem}x_x"] = torch.stack(rows)
    assert_same(formats.read(folder("7", None, tensors)).tensors, official("7"))


@pytest.mark.parametrize("version", ["5.2", "6"])
def test_remote_code_in_the_style_of_transformers(official, folder, version):
    tensors = {}
    for name, tensor in official(version).items():
        name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
        for c, long in zip("kvrg", ("key", "value", "receptance", "gate"), strict=True):
            name = name.replace(f"time_mix_{c}", f"time_mix_{long}")
        name = name.replace("blocks.0.ln0", "blocks.0.pre_ln").replace("emb.", "embeddings.")
        tensors[name if name.startswith("head") else f"rwkv.{name}"] = tensor
    path = folder("4", {"model_type": f"rwkv{version[0]}"}, tensors)
    weights = formats.read(path)
    assert_same(weights.tensors, official(version))
    assert weights.architecture.options["norm_eps"] == 64e-5


@pytest.mark.parametrize(
    ("version", "config", "eps"),
    [
        ("7", {}, 16 * 1e-5),
        ("7", {"model_type": "rwkv7_native"}, 16 * 1e-5),
        ("7", {"model_type": "rwkv7_hf_adapter"}, 16 * 1e-5),
        ("7", {"group_norm_eps": 3e-4}, 3e-4),
        ("6", {}, 1e-5),
    ],
)
def test_eps_of_the_norm_over_heads_is_the_librarys(folder, version, config, eps):
    weights = formats.read(folder(version, config))
    assert weights.architecture.options["norm_eps"] == pytest.approx(eps)
    assert not weights.assumed


def test_without_a_word_on_eps_it_is_assumed_and_said(folder):
    path = folder("7")
    (path / "config.json").unlink()
    weights = formats.read(path / "model.safetensors")
    assert weights.architecture.options["norm_eps"] == 64e-5
    assert weights.assumed[0].startswith("eps 0.00064")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint|does not describe"):
        rwkv_text.load(path)


def test_fused_norms_are_taken_as_official_and_said(folder):
    assert "fla's fuse_norm adds 1e-6" in formats.read(folder("7", {"fuse_norm": True})).assumed[0]


@pytest.mark.parametrize(
    ("version", "config", "error"),
    [
        ("7", {"model_type": "llama"}, "of model_type 'llama', which is no RWKV"),
        ("7", {"model_type": 7}, "of model_type '7'"),
        ("7", {"tie_word_embeddings": True}, "tie_word_embeddings = True; supported is False"),
        ("7", {"attn": {"layers": [1]}}, "config.json says attn = "),
        ("7", {"norm_first": False}, "norm_first = False; supported is True"),
        ("7", {"norm_bias": False}, "norm_bias = False"),
        ("7", {"hidden_act": "relu"}, "hidden_act = relu; supported is sqrelu"),
        ("7", {"value_dim": [64, 128]}, "value_dim = 128 beside hidden_size = 64"),
        ("7", {"attention_hidden_size": 128}, "attention_hidden_size = 128 beside hidden_size"),
        ("7", {"norm_eps": 1e-6}, "LayerNorm eps 1e-06; supported is 1e-05"),
        ("7", {"norm_eps": "x"}, "LayerNorm eps x"),
        ("7", {"norm_eps": 10**400}, "LayerNorm eps 1000"),
        ("7", {"norm_eps": None}, "LayerNorm eps None"),
        ("7", {"group_norm_eps": -1}, "group_norm_eps = -1"),
        ("4", {"layer_norm_epsilon": 1e-6}, "LayerNorm eps 1e-06"),
        ("7", {"hidden_size": 128}, "says hidden_size = 128, the tensors 64"),
        ("7", {"num_hidden_layers": 3}, "says num_hidden_layers = 3, the tensors 2"),
        ("7", {"vocab_size": 65536}, "says vocab_size = 65536, the tensors 10"),
        ("7", {"intermediate_size": 10**12}, "says intermediate_size = 1000000000000, the"),
        ("7", {"head_dim": 64}, "says head_dim = 64, the tensors 16"),
    ],
)
def test_what_the_config_says_otherwise_is_refused(folder, version, config, error):
    path = folder(version, config)
    for function in (formats.read, formats.describe, rwkv_text.load):
        with pytest.raises(CheckpointError, match=error):
            function(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda t: {n: x for n, x in t.items() if "r_k" not in n}, "RWKV-5|lacks"),
        (lambda t: t | {"model.layers.1.attn.rkv.weight": torch.ones(2)}, r"attn\.rkv\.weight"),
        (lambda t: t | {"model.layers.1.attn.q_proj.weight": torch.ones(2)}, r"attn\.q_proj"),
        (lambda t: t | {"model.layers.0.attn.x_x": torch.ones(6, 64)}, "which such a model has"),
        (lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"}, "lacks head.weight"),
        (lambda t: {"transformer.wte.weight": torch.ones(2)}, "none of the names of fla"),
        (lambda t: {"model.layers.0.self_attn.q_proj.weight": torch.ones(2)}, "is no RWKV"),
    ],
)
def test_other_tensors_are_named(official, folder, change, error):
    tensors = change(fla7(official("7")))
    if "model.layers.0.attn.x_x" in tensors:
        tensors["model.layers.0.attn.x_y"] = tensors.pop("model.layers.0.attn.x_x")
    with pytest.raises(CheckpointError, match=error):
        formats.read(folder("7", None, tensors))


# shards and pytorch_model.bin


@pytest.fixture
def sharded(folder):
    """Return the path of a folder in two shards with an index."""
    path = folder()
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {}
    for i, part in enumerate((names[:20], names[20:])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, path / shard)
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def test_shards_are_put_together(official, sharded):
    assert_same(formats.read(sharded).tensors, official("7"))


@pytest.mark.parametrize(
    ("shard", "error"),
    [
        ("../hf/model-00001-of-00002.safetensors", "expected a file of the folder"),
        ("/etc/passwd", "expected a file of the folder"),
        ("..", "expected a file of the folder"),
        (".hidden.safetensors", "expected a file of the folder"),
        ("model-00003-of-00002.safetensors", "lacks the shard model-00003"),
        ("model-00002-of-00002.safetensors", "does not hold what"),
        (3, "holds no weight_map"),
    ],
)
def test_an_index_that_lies(sharded, shard, error):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = shard
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=error):
        formats.read(sharded)


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"weight_map": []}', "[" * 10**5])
def test_an_index_that_is_none(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json"):
        formats.read(sharded)


def test_a_missing_or_cut_shard(sharded):
    shard = sharded / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="cut short"):
        formats.read(sharded)
    shard.unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002"):
        formats.read(sharded)


@pytest.mark.parametrize("parts", [1, 2])
def test_older_folders_hold_pickles(official, folder, parts):
    path = folder("4")
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if parts == 1:
        torch.save(tensors, path / "pytorch_model.bin")
    else:
        names = list(tensors)
        places = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for place in set(places.values()):
            torch.save({n: tensors[n] for n in names if places[n] == place}, path / place)
        index = path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    assert_same(formats.read(path).tensors, official("4"))


def test_a_folder_without_weights(folder):
    path = folder()
    (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds a config.json but no weights"):
        rwkv_text.load(path)
    (path / "config.json").write_text(json.dumps({"model_type": "x" * 2**20}))
    with pytest.raises(CheckpointError, match="at most 1048576"):
        formats.read(path)
