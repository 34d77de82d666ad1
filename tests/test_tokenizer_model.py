"""A model and its vocabulary: trained, saved, exported and run together, on any machine."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rwkv_export
import torch

import rwkv_text
from rwkv_core import checkpoint
from rwkv_core.cli import main
from rwkv_core.errors import ConfigError, ExportError
from rwkv_core.formats.convert import convert
from rwkv_core.run import TorchRun
from rwkv_core.testing import perturb
from rwkv_core.train import TrainConfig, TrainSettings, train
from rwkv_text import TextConfig, host
from rwkv_text.adapter import adapter
from rwkv_text.data import batches
from rwkv_text.tokenizer import BOUNDARY
from rwkv_text.vocabulary import carried_files, locate, package_file
from rwkv_text.world import WorldTokenizer

FILE = "rwkv_vocab_v20230424.txt"
TOKENS = [
    *(bytes([b]) for b in range(256)),
    b" the",
    b" the end",
    "今天".encode(),
    "今".encode()[:2],
]
CONTENT = "".join(f"{i} {t!r} {len(t)}\n" for i, t in enumerate(TOKENS, 1)).encode()
SMALL = WorldTokenizer(CONTENT)
TINY = {"dim": 16, "depth": 1, "mixer_options": {"head_dim": 16}, "vocab_size": 65536}
GREEDY = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "somewhere" / FILE
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    return path


@pytest.fixture
def no_package(monkeypatch):
    """Hide pyrwkv-tokenizer."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "pyrwkv_tokenizer" else find_spec(n)
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcde the end 今天 🦆 the end é\n\n" * 30, encoding="utf-8")
    return str(path)


@pytest.fixture
def model(vocabulary):
    model = checkpoint.build("text", TextConfig(tokenizer=str(vocabulary), **TINY))
    perturb(model)
    return model


def test_batches_are_in_tokens_and_counted_in_bytes(vocabulary, text):
    config = TextConfig(tokenizer=str(vocabulary), data=text, context=8, batch_size=3, **TINY)
    batch = next(batches(config, "train"))
    targets = batch.tokens_BT[:, 1:].flatten().tolist()
    assert max(targets) > 256
    assert batch.n_bytes == len(SMALL.decode_bytes(targets))
    (document,) = batches(config, "eval")
    held_out = Path(text).read_text(encoding="utf-8")[-90:]
    assert document.tokens_BT[0].tolist() == [0, *SMALL.encode(held_out), 0]
    assert document.n_bytes == len(held_out.encode())


def test_a_model_with_fewer_rows_than_ids_is_refused(vocabulary, text):
    config = TextConfig(tokenizer=str(vocabulary), data=text, **{**TINY, "vocab_size": 256})
    with pytest.raises(
        ConfigError, match=r"has 65536 ids and the model 256 rows .* set task.vocab"
    ):
        next(batches(config, "train"))
    with pytest.raises(ConfigError, match="has 65536 ids and the model 256 rows"):
        checkpoint.build("text", config).generate("x")


def test_generation_starts_from_the_prompts_tokens(model):
    written = model.generate("今天 the end", **GREEDY)
    tokens = [BOUNDARY, *SMALL.encode("今天 the end")]
    assert len(tokens) == 3
    unknown = [*range(len(TOKENS) + 1, 65536)]
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits_BTV[0, -1]
        logits[unknown] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == BOUNDARY:
            break
    assert written == SMALL.decode_bytes(tokens[3:]).decode(errors="replace")
    assert "".join(model.generate("今天 the end", stream=True, **GREEDY)) == written


class Scripted:
    """A run that predicts the given tokens one after the other."""

    def __init__(self, folder, tokens):
        self.folder, self.tokens, self.graphs = folder, iter(tokens), {"step": None}
        self.metadata = {"tokenizer": "world", "vocab_size": 65536}

    def __call__(self, graph, inputs):
        logits = np.zeros((1, 65536), np.float32)
        logits[0, next(self.tokens)] = 9
        return {"logits": logits}

    def initial_state(self, graph, batch):
        return {}

    def stream(self, state):
        return self


def test_text_comes_by_characters_and_ends_at_the_boundary(vocabulary):
    half, rest = 1 + TOKENS.index("今".encode()[:2]), 1 + "今".encode()[2]
    the = 1 + TOKENS.index(b" the")
    run = Scripted(vocabulary.parent, [the, half, rest, half, BOUNDARY, the])
    pieces = list(host.generate(run, max_tokens=9, temperature=0.0))
    assert pieces == [" the", "今", "\N{REPLACEMENT CHARACTER}"]


def test_an_id_without_a_token_is_never_drawn(model):
    with torch.no_grad():
        model.head.weight[len(TOKENS) + 1 :] *= 50  # nearly always the largest logit
    assert isinstance(model.generate("a", max_tokens=40, temperature=2.0, seed=0), str)


def test_a_checkpoint_carries_its_vocabulary(model, vocabulary, tmp_path, no_package):
    prompt = "今天 the"
    expected = model.generate(prompt, **GREEDY)
    checkpoint.save(model, tmp_path / "model")
    stored = json.loads((tmp_path / "model/config.json").read_text())
    assert stored["config"]["tokenizer"] == "world"
    assert (tmp_path / "model" / FILE).read_bytes() == vocabulary.read_bytes()
    vocabulary.unlink()
    elsewhere = (tmp_path / "model").rename(tmp_path / "elsewhere")
    loaded = rwkv_text.load(elsewhere)
    assert loaded.config.tokenizer == str(elsewhere / FILE)
    assert loaded.fingerprint == model.fingerprint
    assert loaded.generate(prompt, **GREEDY) == expected
    # and so does a copy of the copy
    again = checkpoint.save(loaded, tmp_path / "again")
    assert (again / FILE).read_bytes() == (elsewhere / FILE).read_bytes()


def test_a_file_of_another_name_is_carried_under_a_known_one(vocabulary, no_package):
    mine = vocabulary.rename(vocabulary.parent / "mine.txt")
    files = carried_files(str(mine))
    assert files == {"rwkv_vocab.txt": CONTENT}
    (vocabulary.parent / "rwkv_vocab.txt").write_bytes(files["rwkv_vocab.txt"])
    assert locate("world", vocabulary.parent) == str(vocabulary.parent / "rwkv_vocab.txt")
    assert carried_files("bytes") == {}


def test_weights_are_saved_even_where_the_vocabulary_is_gone(model, vocabulary, tmp_path, caplog):
    vocabulary.unlink()
    saved = checkpoint.save(model, tmp_path / "model")
    assert {p.name for p in saved.iterdir()} == {"config.json", "model.safetensors"}
    assert "saved without its vocabulary" in caplog.text


def test_a_run_carries_its_vocabulary_and_resumes_without_the_original(
    vocabulary, text, tmp_path, no_package, capsys
):
    task = TextConfig(
        tokenizer=str(vocabulary), data=text, context=8, batch_size=2,
        **TINY, mixer="none",
    )  # fmt: skip
    settings = TrainSettings(steps=2, checkpoint_every=1, threads=1)
    run = tmp_path / "run"
    train(TrainConfig(adapter="text", task=task, train=settings), run)
    vocabulary.unlink()
    run = run.rename(tmp_path / "moved")
    assert main(["train", "--resume", str(run), "--set", "train.steps=6"]) == 0
    assert (run / FILE).read_bytes() == CONTENT
    assert json.loads((run / "run.json").read_text())["task"]["tokenizer"] == "world"
    for step in (5, 6):
        assert (run / f"step-{step:07d}" / FILE).read_bytes() == CONTENT
    assert main(["eval", str(run)]) == 0
    assert main(["generate", str(run), "--prompt", "今天", "--max-tokens", "3"]) == 0
    assert "今天" in capsys.readouterr().out


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return an exported folder, whose vocabulary is nowhere else any more, and what it writes."""
    folder = tmp_path_factory.mktemp("made")
    (folder / FILE).write_bytes(CONTENT)
    torch.manual_seed(0)
    model = checkpoint.build("text", TextConfig(tokenizer=str(folder / FILE), **TINY))
    perturb(model)
    rwkv_export.export(model, folder / "onnx", steps=(1, 4))
    expected = model.generate("今天 the", **GREEDY)
    (folder / FILE).unlink()
    return folder / "onnx", expected


@pytest.fixture
def exported(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "elsewhere")


@pytest.mark.slow
def test_an_exported_folder_writes_the_same_text_elsewhere(exported, made, run_python):
    folder, (_, expected) = exported, made
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["metadata"]["tokenizer"] == "world"
    assert FILE in manifest["files"]
    code = f"""
import sys, rwkv_export
text = rwkv_export.load({str(folder)!r}).generate("今天 the", **{GREEDY!r})
assert not {{"torch", "tokenizers", "pyrwkv_tokenizer"}} & set(sys.modules)
print(ascii(text))
"""
    blocked = ("torch", "timm", "torchvision", "onnx", "tokenizers", "pyrwkv_tokenizer")
    assert run_python(code, block=blocked).strip() == ascii(expected)


def test_an_edited_or_absent_vocabulary_of_an_export_is_refused(exported):
    path = exported / FILE
    path.write_bytes(CONTENT + b"300 'xy' 2\n")
    with pytest.raises(ExportError, match=rf"{FILE} is not the file that was exported"):
        rwkv_export.load(exported)
    path.unlink()
    with pytest.raises(ExportError, match=f"lacks the file '{FILE}'"):
        rwkv_export.load(exported)
    manifest = json.loads((exported / "manifest.json").read_text())
    for files, error in [({"../x.txt": ""}, "lacks the file '../x.txt'"), (3, "does not describe")]:
        (exported / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        with pytest.raises(ExportError, match=error):
            rwkv_export.load(exported)


@pytest.mark.skipif(package_file() is None, reason="pyrwkv-tokenizer is absent")
def test_a_model_named_world_carries_the_packages_vocabulary(tmp_path):
    model = checkpoint.build("text", TextConfig(tokenizer="world", **TINY))
    saved = checkpoint.save(model, tmp_path / "model")
    assert (saved / FILE).read_bytes() == package_file().read_bytes()
    assert rwkv_text.load(saved).fingerprint == model.fingerprint
    run = TorchRun(model, adapter.exports(model), adapter.metadata(model))
    assert isinstance("".join(host.generate(run, "Today", max_tokens=2)), str)


def test_converted_weights_bring_the_vocabulary_along(model, vocabulary, no_package, tmp_path):
    convert(checkpoint.save(model, tmp_path / "own"), tmp_path / "weights.pth", "official")
    shutil.copy(vocabulary, tmp_path / FILE)
    convert(tmp_path / "weights.pth", tmp_path / "moved" / "own", "safetensors")
    (tmp_path / FILE).unlink()
    again = rwkv_text.load(tmp_path / "moved" / "own")
    assert again.generate("the end", **GREEDY) == model.generate("the end", **GREEDY)


def test_a_vocabulary_elsewhere_is_named_where_text_is_wanted(
    model, vocabulary, no_package, tmp_path, capsys
):
    convert(checkpoint.save(model, tmp_path / "own"), tmp_path / "weights.pth", "official")
    arguments = ["generate", str(tmp_path / "weights.pth"), "--prompt", "the end"]
    arguments += ["--max-tokens", "12", "--temperature", "0"]
    assert main(arguments) == 2
    assert "no vocabulary rwkv_vocab_v20230424.txt found" in capsys.readouterr().err
    assert main([*arguments, "--vocabulary", str(vocabulary)]) == 0
    expected = "the end" + model.generate("the end", **GREEDY) + "\n"
    assert capsys.readouterr().out == expected
