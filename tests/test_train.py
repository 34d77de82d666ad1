"""The loop: schedule, exact resume, interruption, NaN, and files that tell the story."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from rwkv_core import checkpoint
from rwkv_core.errors import CheckpointError, RWKVError, TrainingError
from rwkv_core.train import TrainConfig, TrainSettings, evaluate, train
from rwkv_core.train.optim import optimizer
from rwkv_core.train.schedule import learning_rate
from rwkv_core.train.sinks import read_log
from rwkv_core.train.threads import probe_threads
from rwkv_text import TextConfig
from rwkv_text.adapter import TextAdapter

TASK = TextConfig(
    dim=32, depth=2, context=16, batch_size=2, data="pydoc", mixer_options={"head_dim": 16}
)


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    settings = TrainSettings(
        steps=12, lr=1e-2, log_every=1, checkpoint_every=3, eval_every=6, threads=1
    )
    return TrainConfig(adapter="text", task=replace(TASK, data=str(text)), train=settings)


def losses(run_dir):
    return {row["step"]: row["loss"] for row in read_log(run_dir)}


def test_a_run_learns_and_writes_its_story(config, tmp_path):
    result = train(config, tmp_path / "run")
    written = {p.name for p in (tmp_path / "run").iterdir()}
    assert written == {"run.json", "log.jsonl", "loss.png", "step-0000009", "step-0000012"}
    by_step = losses(tmp_path / "run")
    assert list(by_step) == list(range(1, 13))
    assert by_step[12] < by_step[1] - 0.5
    assert TrainConfig.from_dict(json.loads((tmp_path / "run/run.json").read_text())) == config
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    # the saved model is the trained one
    assert evaluate(checkpoint.load(tmp_path / "run"), config.task) == result.metrics
    assert {row["step"] for row in read_log(tmp_path / "run") if "eval_loss" in row} == {6, 12}


def test_resume_gives_the_same_losses_bit_for_bit(config, tmp_path, monkeypatch):
    real, calls = TextAdapter.loss, []

    def noisy(self, model, batch, rng):
        """As a domain that draws noise and a model with dropout would."""
        loss, sums = real(self, model, batch, rng)
        return loss * (1 + torch.rand((), generator=rng) + torch.rand(())), sums

    def dies_at_step_8(self, model, batch, rng):
        if model.training:
            calls.append(1)
        if len(calls) == 8:
            raise MemoryError
        return noisy(self, model, batch, rng)

    monkeypatch.setattr(TextAdapter, "loss", noisy)
    train(config, tmp_path / "whole")
    monkeypatch.setattr(TextAdapter, "loss", dies_at_step_8)
    with pytest.raises(MemoryError):
        train(config, tmp_path / "cut")
    monkeypatch.setattr(TextAdapter, "loss", noisy)
    # steps 7 was logged but its checkpoint is of step 6: the log is cut back, then goes on
    assert max(losses(tmp_path / "cut")) == 7
    train(config, tmp_path / "cut", resume=True)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    a, b = (checkpoint.load(tmp_path / run).state_dict() for run in ("cut", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in b)


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_stopped_run_checkpoints_exits_and_resumes_exactly(config, tmp_path, number):
    config = replace(config, train=replace(config.train, steps=150, checkpoint_every=0))
    source = tmp_path / "config.json"
    source.write_text(json.dumps(config.to_dict()))
    code = (
        "import json, sys; from rwkv_core.train import TrainConfig, train\n"
        f"config = TrainConfig.from_dict(json.load(open({str(source)!r})))\n"
        f"result = train(config, {str(tmp_path / 'run')!r})\n"
        "sys.exit(128 + result.stopped_by if result.stopped_by else 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(read_log(tmp_path / "run")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr.decode()
    stopped_at = max(losses(tmp_path / "run"))
    assert 3 <= stopped_at < 150
    assert checkpoint.find(tmp_path / "run").name == f"step-{stopped_at:07d}"

    train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    real, calls = TextAdapter.loss, []

    def spoiled(self, model, batch, rng):
        loss, sums = real(self, model, batch, rng)
        calls.append(1)
        return loss * (float("nan") if len(calls) == 5 else 1), sums

    monkeypatch.setattr(TextAdapter, "loss", spoiled)
    with pytest.raises(TrainingError, match=r"loss nan .* at step 4: .*step-0000003"):
        train(config, tmp_path / "run")
    monkeypatch.undo()
    assert all(t.isfinite().all() for t in checkpoint.load(tmp_path / "run").state_dict().values())


def test_an_infinite_gradient_stops_the_run(config, tmp_path, monkeypatch):
    real = TextAdapter.loss

    def spoiled(self, model, batch, rng):
        loss, sums = real(self, model, batch, rng)
        return loss + 0 * (model.emb.weight[0, 0] - model.emb.weight[0, 0].detach()).sqrt(), sums

    monkeypatch.setattr(TextAdapter, "loss", spoiled)
    with pytest.raises(TrainingError, match="gradient norm nan"):
        train(config, tmp_path / "run")


def test_an_existing_run_is_not_overwritten(config, tmp_path):
    train(replace(config, train=replace(config.train, steps=1)), tmp_path / "run")
    with pytest.raises(RWKVError, match="holds a run already; resume it with --resume"):
        train(config, tmp_path / "run")


def test_a_damaged_optimiser_is_named_on_resume(config, tmp_path):
    train(replace(config, train=replace(config.train, steps=2)), tmp_path / "run")
    (checkpoint.find(tmp_path / "run") / "progress.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step-0000002 cannot be resumed from: KeyError"):
        train(config, tmp_path / "run", resume=True)


def test_learning_rate_follows_the_official_curve():
    settings = TrainSettings(steps=110, lr=1e-3, lr_final=1e-4, warmup_steps=10)
    assert learning_rate(0, settings) == pytest.approx(1e-5)
    assert learning_rate(5, settings) == pytest.approx(1e-3 * (0.01 + 0.99 * 0.5))
    assert learning_rate(10, settings) == pytest.approx(1e-3)
    assert learning_rate(60, settings) == pytest.approx(5.5e-4)
    quarter = 1e-3 * (0.55 + 0.45 * math.cos(math.pi / 4))
    assert learning_rate(35, settings) == pytest.approx(quarter)
    assert learning_rate(110, settings) == pytest.approx(1e-4)


def test_adamw_gets_the_layers_own_recipe():
    model = checkpoint.build("text", TASK)
    settings = TrainSettings(weight_decay=0.1)
    groups = optimizer(model, settings).param_groups
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name["backbone.blocks.1.time_mix.w0"]["lr_scale"] == 2.0
    assert by_name["backbone.blocks.1.time_mix.w1"]["weight_decay"] == 0.0
    assert by_name["backbone.blocks.1.time_mix.key.weight"]["weight_decay"] == 0.1
    assert by_name["backbone.blocks.1.ln1.weight"]["weight_decay"] == 0.0
    assert all(group["betas"] == (0.9, 0.99) and group["eps"] == 1e-18 for group in groups)


def test_the_probe_leaves_the_threads_alone(config):
    threads, seconds = probe_threads(config)
    assert 1 <= threads <= os.cpu_count()
    assert 0 < seconds < 10
    assert torch.get_num_threads() == 1


def test_a_run_out_of_time_ends_with_evaluation_and_checkpoint(config, tmp_path):
    settings = replace(config.train, steps=10_000, eval_every=0, max_seconds=1.0)
    result = train(replace(config, train=settings), tmp_path / "run")
    assert 1 < result.step < 10_000
    assert result.stopped_by is None
    assert result.metrics["bits_per_byte"] > 0
    assert checkpoint.find(tmp_path / "run").name == f"step-{result.step:07d}"
