"""Checkpoints: whole or absent, refused when damaged, never unpickled."""

import json
import pickle

import pytest
import torch

import rwkv_text
from rwkv_core import checkpoint
from rwkv_core._files import atomic_file, atomic_folder
from rwkv_core.errors import CheckpointError, RWKVError
from rwkv_text import TextConfig

CONFIG = TextConfig(dim=32, depth=2, vocab_size=20, mixer_options={"head_dim": 16})


@pytest.fixture
def saved(tmp_path):
    return checkpoint.save(checkpoint.build("text", CONFIG), tmp_path / "model")


def test_round_trip_is_exact(tmp_path):
    model = checkpoint.build("text", CONFIG)
    loaded = rwkv_text.load(checkpoint.save(model, tmp_path / "model"))
    assert loaded.config == CONFIG
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_run_folder_gives_its_latest_checkpoint(tmp_path):
    model = checkpoint.build("text", CONFIG)
    for step in (9, 10, 200):
        checkpoint.save(model, tmp_path / "run" / f"step-{step:07d}")
    (tmp_path / "run" / "step-0000300").mkdir()
    assert checkpoint.find(tmp_path / "run").name == "step-0000200"


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, keep):
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model.safetensors is damaged or not safetensors"):
        rwkv_text.load(saved)


def test_another_architecture_is_refused_by_its_tensors(saved):
    description = json.loads((saved / "config.json").read_text())
    description["config"]["depth"] = 3
    (saved / "config.json").write_text(json.dumps(description))
    with pytest.raises(
        CheckpointError, match=r"another architecture: .* missing backbone.blocks.2"
    ):
        rwkv_text.load(saved)
    description["config"] |= {"depth": 2, "dim": 64}
    (saved / "config.json").write_text(json.dumps(description))
    with pytest.raises(
        CheckpointError, match=r"emb.weight has shape \[20, 32\], expected \[20, 64\]"
    ):
        rwkv_text.load(saved)


@pytest.mark.parametrize(
    "claim", [{"depth": 10**7}, {"vocab_size": 10**6}, {"vocab_size": 10**13}, {"dim": 16 * 10**6}]
)
def test_a_description_larger_than_its_tensors_is_not_built(saved, claim):
    description = json.loads((saved / "config.json").read_text())
    description["config"] |= claim
    (saved / "config.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"describes a larger model than the \d+ tensors"):
        rwkv_text.load(saved)


def test_a_pickle_with_code_is_refused_and_not_run(saved, tmp_path):
    class Attack:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    for content in (pickle.dumps(Attack()), None):
        if content is None:
            torch.save({"x": torch.zeros(1)}, saved / "model.safetensors")
        else:
            (saved / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="is a pickle"):
            rwkv_text.load(saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("{", "config.json does not describe a model"),
        ("[]", "config.json does not describe a model"),
        ('{"adapter": "text"}', "config.json does not describe a model: KeyError: 'config'"),
        ('{"adapter": "txet", "config": {}}', "unknown domain 'txet'; did you mean 'text'"),
        ('{"adapter": "text", "config": {"dime": 3}}', "unknown field 'dime'; did you mean 'dim'"),
        ('{"adapter": "text", "config": {"dim": "x"}}', "field 'dim' expects int, got 'x'"),
    ],
)
def test_a_damaged_description_is_refused(saved, content, error):
    (saved / "config.json").write_text(content)
    with pytest.raises(RWKVError, match=error):
        rwkv_text.load(saved)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint folder"):
        rwkv_text.load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        rwkv_text.load(tmp_path)


def test_an_existing_folder_is_not_overwritten(saved):
    before = (saved / "config.json").read_text()
    with pytest.raises(FileExistsError, match="exists already"):
        checkpoint.save(checkpoint.build("text", CONFIG), saved)
    assert (saved / "config.json").read_text() == before


def test_nothing_is_left_of_a_write_that_fails(tmp_path):
    def folder_that_fills_the_disk():
        with atomic_folder(tmp_path / "new") as folder:
            (folder / "half").write_text("half")
            raise OSError(28, "No space left on device")

    def interrupted_file():
        with atomic_file(target) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(OSError, match="No space left"):
        folder_that_fills_the_disk()
    with pytest.raises(KeyboardInterrupt):
        interrupted_file()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert target.read_text() == "old"
