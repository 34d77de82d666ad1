"""Folders that other people's generators run as they are: the same tokens as ours.

Both are looked for where environment variables say; without them their tests skip:

    python -m venv genai && genai/bin/pip install onnxruntime-genai==0.18.0
    RWKV_GENAI=genai
    npm install --prefix js --ignore-scripts @huggingface/transformers@4.3.1
    RWKV_TRANSFORMERS_JS=js
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import rwkv_export
import torch
from rwkv_export.manifest import present
from rwkv_export.profiles import profiled
from rwkv_export.tokenizer_json import tokenizer_json

from rwkv_core import checkpoint
from rwkv_core.checkpoint import adapter_of, portable
from rwkv_core.cli import main
from rwkv_core.errors import ExportError
from rwkv_core.testing import perturb
from rwkv_text import TextConfig
from rwkv_text.host import read

PROMPTS = [[0], [0, 82, 87, 75, 86], list(range(40, 93))]  # one token; a few; several chunks
TEXT = "größer  ,状 . don't\t"
TOKENS = 64

GENAI = """
import json, sys
import numpy as np, onnxruntime_genai as og
folder, prompts, text, n = sys.argv[1], *map(json.loads, sys.argv[2:])
model, written = og.Model(folder), []
tokenizer = og.Tokenizer(model)
for prompt in [*prompts, [0, *tokenizer.encode(text)]]:
    params = og.GeneratorParams(model)
    # the boundary is no end before that many
    params.set_search_options(min_length=len(prompt) + n, max_length=len(prompt) + n)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([prompt], np.int32))
    for _ in range(n):
        generator.generate_next_token()
    written.append([int(t) for t in generator.get_sequence(0)][len(prompt):])
print(json.dumps([written[:-1], tokenizer.decode(np.array(written[-1], np.int32))]))
"""
TRANSFORMERS = """
import { createRequire } from 'node:module';
const [home, folder, ...given] = process.argv.slice(2);
const [prompts, text, n] = given.map(JSON.parse);
const { pipeline, Tensor } = createRequire(home)('@huggingface/transformers');
const write = await pipeline('text-generation', folder, { subfolder: '' });
const written = [];
for (const prompt of prompts) {
  const inputs = new Tensor('int64', BigInt64Array.from(prompt.map(BigInt)), [1, prompt.length]);
  const limits = { min_new_tokens: n, max_new_tokens: n };
  const out = await write.model.generate({ inputs, do_sample: false, ...limits });
  written.push(out.tolist()[0].slice(prompt.length).map(Number));
}
const asked = { do_sample: false, max_new_tokens: n, return_full_text: false };
console.log(JSON.stringify([written, (await write(text, asked))[0].generated_text]));
"""


def language_model(mixer="rwkv7", **options):
    torch.manual_seed(0)
    options = {} if mixer == "rwkv4" else {"head_dim": 32, **options}
    config = TextConfig(dim=64, depth=3, mixer=mixer, mixer_options=options)
    model = checkpoint.build("text", config)
    perturb(model, 0.2)
    return model.eval()


def near(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max() <= 2e-5 * max(1.0, expected.abs().max())


def added(name, model):
    _, adapter = adapter_of(model)
    return profiled(name, adapter.exports(model), adapter.metadata(model), portable(model)[1])


@pytest.mark.parametrize("mixer", ["rwkv5", "rwkv6", "rwkv7"])
@pytest.mark.parametrize("name", ["genai", "transformers"])
@torch.no_grad()
def test_a_state_per_layer_is_the_models_own(name, mixer):
    model = language_model(mixer)
    spec, files = added(name, model)
    tokens_1T = torch.randint(256, (1, 8))
    state = [torch.from_numpy(x) for x in spec.state.values()]
    lengths = []
    if name == "transformers":
        lengths = [torch.zeros(1, 1, 0, 1)]
    for begin, end in ((0, 1), (1, 8)):  # a token, then several
        logits, *after = spec.module(tokens_1T[:, begin:end], *lengths, *state)
        lengths, state = after[: len(lengths)], after[len(lengths) :]
        expected = model(tokens_1T[:, :end])
        torch.testing.assert_close(logits, expected.logits_BTV[:, -1:], rtol=0, atol=2e-5)
        assert [x.shape[2] for x in lengths] == [end] * len(lengths)
    for i, layer in enumerate(expected.state.layers):
        conv_1D2, matrices = state[2 * i : 2 * i + 2]
        shifts = torch.stack([layer.att_shift_BD, layer.ffn_shift_BD], -1)
        assert near(conv_1D2, shifts)
        assert near(matrices, layer.wkv_BHKV)
    config = json.loads(next(iter(files.values())))
    assert {"tokenizer.json", "tokenizer_config.json"} < files.keys()
    assert config.get("model", config)["vocab_size"] == 256


def test_what_a_profile_cannot_say_is_refused(tmp_path):
    with pytest.raises(ExportError, match="unknown profile 'genia'; did you mean 'genai'"):
        added("genia", language_model())
    tuned = language_model(tuned_state=True)
    with pytest.raises(ExportError, match="starts every state from zeros, 'wkv' starts from other"):
        added("genai", tuned)
    with pytest.raises(ExportError, match="starts every state from zeros"):
        added("transformers", language_model("rwkv4"))
    with pytest.raises(ExportError, match="is for language models"):
        profiled("genai", [], {"vocab_size": 256}, {})
    with pytest.raises(ExportError, match="of profiles it takes 'embeddings' alone"):
        rwkv_export.export(tuned, tmp_path / "out", lane="mobile", profiles=["genai"])
    with pytest.raises(ExportError, match="unknown lane 'triangles'; did you mean 'triangle'"):
        rwkv_export.export(tuned, tmp_path / "out", lane="triangles")


@torch.no_grad()
def test_vectors_from_the_table_are_the_tokens():
    model = language_model()
    _, adapter = adapter_of(model)
    step = adapter.exports(model)[0]
    spec, files = added("embeddings", model)
    table_VD = np.frombuffer(files["embedding.bin"], "<f4").reshape(256, 64)
    inputs = spec.sample(np.random.default_rng(0), {"batch": 3})
    tokens = step.sample(np.random.default_rng(0), {"batch": 3})["tokens"]
    np.testing.assert_array_equal(table_VD[tokens], inputs["embeddings"])
    state = [torch.from_numpy(np.repeat(x, 3, 1)) for x in spec.state.values()]
    found = spec.module(torch.from_numpy(inputs["embeddings"]), *state)
    expected = step.module(torch.from_numpy(tokens), *state)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def opened(files):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is absent")
    return tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())


def test_the_ids_of_a_tokenizer_json_of_bytes_are_the_bytes():
    made = opened(tokenizer_json("bytes", {}))
    every = "".join(map(chr, range(0x800))) + TEXT + "🙂 \uffff"  # every byte that UTF-8 has
    for text in ("", "\n", every):
        ids = list(text.encode())
        assert made.encode(text, add_special_tokens=False).ids == ids
        assert made.encode(text).ids == [0, *ids]
        assert made.decode(ids, skip_special_tokens=False) == text
    assert made.decode([0, 65, 0]) == "A"
    assert made.get_vocab_size() == 256


def test_a_tokenizer_json_of_20b_is_the_vocabulary_and_of_world_there_is_none():
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is absent")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>", "<|padding|>"], show_progress=False
    )
    bpe.train_from_iterator([TEXT, GENAI, TRANSFORMERS], trainer)
    carried = {"20B_tokenizer.json": bpe.to_str().encode()}
    made = opened(tokenizer_json("20B", carried))
    ids = bpe.encode(TEXT).ids
    assert len(ids) > 5
    assert made.encode(TEXT, add_special_tokens=False).ids == ids
    assert made.encode(TEXT).ids == [0, *ids]
    assert made.decode(made.encode(TEXT).ids) == bpe.decode(ids)
    assert tokenizer_json("20B", {}) == {}  # exported without its vocabulary
    assert tokenizer_json("world", {"rwkv_vocab_v20230424.txt": b"1 'a' 1"}) == {}


def test_outputs_are_called_as_the_others_call_them():
    names = ["wkv", "past_conv.3", "past_recurrent.0", "past_key_values.2.conv_state"]
    assert [present(n) for n in names] == [
        "wkv_out", "present_conv.3", "present_recurrent.0", "present.2.conv_state",
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["rwkv7", "rwkv6"])
def folder(request, tmp_path_factory):
    """Return a folder with both profiles, and what our runtime writes after tokens and text."""
    path = tmp_path_factory.mktemp("profiles")
    model = language_model(request.param)
    model.head.weight.data[[0, *range(128, 256)]] = 0  # so that it writes ASCII, which is text
    checkpoint.save(model, path / "model")
    flags = ["--profile", "genai", "--profile", "transformers", "--steps", "16"]
    assert main(["export", str(path / "model"), str(path / "out"), *flags]) == 0
    runtime, written = rwkv_export.load(path / "out"), []
    for prompt in PROMPTS:
        stream = runtime.stream(runtime.initial_state("step", 1))
        row, tokens = read(runtime, stream, prompt, [len(prompt) - 1])[0].copy(), []
        while len(tokens) < TOKENS:
            row[0] = -np.inf  # the boundary
            tokens.append(int(row.argmax()))
            row = stream("step", {"tokens": np.array([tokens[-1:]])})["logits"][0].copy()
        written.append(tokens)
    text = "".join(runtime.generate(TEXT, max_tokens=TOKENS, temperature=0))
    assert len(text) == TOKENS
    return path / "out", [written, text]


def told(*command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


GIVEN = [json.dumps(given) for given in (PROMPTS, TEXT, TOKENS)]


@pytest.mark.slow
def test_genai_writes_the_same_tokens_and_text(folder):
    folder, written = folder
    python = Path(os.environ.get("RWKV_GENAI", "")) / "bin" / "python"
    if not python.exists():
        pytest.skip("RWKV_GENAI names no virtual environment with onnxruntime-genai")
    assert told(python, "-c", GENAI, folder, *GIVEN) == written


@pytest.mark.slow
def test_transformers_js_writes_the_same_tokens_and_text(folder, tmp_path):
    folder, written = folder
    home = Path(os.environ.get("RWKV_TRANSFORMERS_JS", "")) / "node_modules" / ""
    if not home.is_dir() or not os.environ.get("RWKV_TRANSFORMERS_JS") or not shutil.which("node"):
        pytest.skip("RWKV_TRANSFORMERS_JS names no folder with @huggingface/transformers for Node")
    script = tmp_path / "generate.mjs"
    script.write_text(TRANSFORMERS)
    home = f"{home.resolve()}/"
    assert told("node", script, home, folder, *GIVEN) == written


@pytest.mark.slow
def test_the_folder_is_proven_and_past_and_present_may_share_memory(folder, capsys):
    folder, _ = folder
    assert main(["verify", str(folder)]) == 0
    runtime = rwkv_export.load(folder)
    assert set(runtime.graphs) == {"step", "prefill", "genai", "model"}
    session, info = runtime.session("genai"), runtime.graphs["genai"]
    tokens = np.random.default_rng(0).integers(256, size=(1, 20))
    apart = runtime.initial_state("genai", 1)
    shared = {n: onnxruntime.OrtValue.ortvalue_from_numpy(x.copy()) for n, x in apart.items()}
    for begin, end in ((0, 9), (9, 10), (10, 20)):
        piece = tokens[:, begin:end]
        out = runtime("genai", {"input_ids": piece, **apart})
        apart = {t.name: out[t.name] for t in info.state}
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", piece)
        binding.bind_output("logits")
        for name, value in shared.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(present(name), value)
        session.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), out["logits"])
        for name, value in shared.items():
            np.testing.assert_array_equal(value.numpy(), apart[name])


@pytest.mark.slow
def test_a_phone_takes_vectors_whole(tmp_path, capsys):
    checkpoint.save(language_model(), tmp_path / "model")
    flags = ["--profile", "embeddings", "--mobile", "--steps", "16"]
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "model"), str(out), *flags]) == 0
    assert main(["verify", str(out)]) == 0
    assert (out / "embedding.bin").stat().st_size == 256 * 64 * 4
    said = json.loads((out / "mobile.json").read_text())["embedded"]
    for name in ("NNAPI", "CoreML MLProgram"):  # which lacks the embedding's Gather
        assert (said[name]["usable"], said[name]["parts"], said[name]["unsupported"]) == (
            "YES", 1, [],
        )  # fmt: skip
    with pytest.raises(ExportError, match="has no graph 'step'; it has embedded"):
        rwkv_export.load(out).generate("a", max_tokens=1)
