"""The training loop: any registered domain, exact resume, and nothing lost when it is stopped."""

import dataclasses
import itertools
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rwkv_core import checkpoint
from rwkv_core._files import atomic_file
from rwkv_core.errors import CheckpointError, ConfigError, RWKVError, TrainingError
from rwkv_core.registry import ADAPTERS
from rwkv_core.train.config import TrainConfig
from rwkv_core.train.memory import keep_freed_memory
from rwkv_core.train.optim import optimizer
from rwkv_core.train.schedule import official_schedule
from rwkv_core.train.sinks import Console, JsonlSink, plot_losses

__all__ = ["TrainResult", "evaluate", "train"]

logger = logging.getLogger(__name__)
RUN_CONFIG, OPTIMIZER, PROGRESS = "run.json", "optimizer.safetensors", "progress.json"
KEEP = 2  # checkpoints


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: model, figures of the last evaluation, and what stopped it, if anything."""

    model: nn.Module
    config: TrainConfig
    run_dir: Path
    step: int
    seconds: float
    metrics: dict[str, float]
    stopped_by: signal.Signals | None = None


def train(config: TrainConfig, run_dir: str | Path, *, resume: bool = False) -> TrainResult:
    """Train, evaluate and checkpoint.

    Writes to ``run_dir``: ``run.json`` (the configuration), ``log.jsonl``, ``loss.png`` and
    ``step-*/`` (checkpoints that :func:`rwkv_core.checkpoint.load` reads). SIGINT and SIGTERM end
    the run after the current step, with a checkpoint; ``resume`` goes on from there with the same
    losses, bit for bit on a CPU with the same threads.

    Raises:
        RWKVError: the folder holds a run already (and ``resume`` is not asked for).
        TrainingError: the loss or the gradient is not a number; the last good checkpoint stays.
    """
    run_dir = Path(run_dir)
    settings = config.train
    if (run_dir / RUN_CONFIG).exists() and not resume:
        raise RWKVError(
            f"{run_dir} holds a run already; resume it with --resume {run_dir}, or choose another "
            "folder"
        )
    if settings.threads:
        torch.set_num_threads(settings.threads)
    keep_freed_memory()

    adapter = ADAPTERS[config.adapter]
    if resume:
        task = checkpoint.located(config.adapter, config.task, run_dir)
        config = dataclasses.replace(config, task=task)
    torch.manual_seed(settings.seed)
    model = checkpoint.build(config.adapter, config.task).train()
    config = dataclasses.replace(config, task=model.config)
    # a domain may bring its own optimiser and schedule; the official recipe is the default
    optim = getattr(adapter, "optimizer", optimizer)(model, settings)
    set_rate = getattr(adapter, "schedule", official_schedule)(model, optim, settings)
    step = _restore(run_dir, model, optim) if resume else 0
    batches = adapter.data(config.task, "train", start=step, seed=settings.seed)
    # data that cannot be used shows here, before anything is written
    batches = itertools.chain([next(batches)], batches)
    task, files = checkpoint.portable(model)
    stored = dataclasses.replace(config, task=task).to_dict()
    for name, content in {**files, RUN_CONFIG: _json(stored)}.items():
        with atomic_file(run_dir / name) as file:
            file.write(content)
    rng = torch.Generator()
    sink, console = JsonlSink(run_dir, step), Console(settings.steps, step)
    metrics: dict[str, float] = {}
    began = time.monotonic()
    if step == 0:
        _save(run_dir, model, optim, 0)

    with _stop_signals() as stop:
        last = step >= settings.steps
        while not (last or stop):
            # every step is seeded by its number: resuming needs no generator's state
            rng.manual_seed(settings.seed + step)
            torch.manual_seed(settings.seed + step)
            loss, sums = adapter.loss(model, next(batches), rng)
            optim.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise TrainingError(
                    f"loss {loss.item()} and gradient norm {norm.item()} at step {step}: the run "
                    f"stops before it spoils the weights. The last good checkpoint is "
                    f"{checkpoint.find(run_dir)}; a lower train.lr is the usual cure"
                )
            rate = set_rate(step)
            optim.step()
            step += 1
            console.step()

            out_of_time = 0 < settings.max_seconds < time.monotonic() - began
            last = step == settings.steps or out_of_time
            row: dict[str, Any] = {}
            if step % settings.log_every == 0 or step == 1 or last:
                figures = adapter.metrics(config.task, _floats(sums))
                row |= {"loss": loss.item(), "lr": rate, "grad_norm": norm.item(), **figures}
            if last or (settings.eval_every and step % settings.eval_every == 0):
                metrics = evaluate(model, config.task)
                row |= {f"eval_{name}": value for name, value in metrics.items()}
            if row:
                row = {"step": step, **row, "seconds": round(time.monotonic() - began, 3)}
                sink.log(row)
                console.log(row)
            if settings.checkpoint_every and step % settings.checkpoint_every == 0:
                _save(run_dir, model, optim, step)
        # however the loop ended, and whenever in it a signal came
        _save(run_dir, model, optim, step)
    console.close()
    plot_losses(run_dir)
    if step < settings.steps and not stop:
        logger.info("out of time (train.max_seconds) after step %d", step)
    if stop:
        logger.info("stopped by %s after step %d; checkpoint written", stop[0].name, step)
    seconds = time.monotonic() - began
    stopped_by = stop[0] if stop else None
    return TrainResult(model.eval(), config, run_dir, step, seconds, metrics, stopped_by)


@torch.no_grad()
def evaluate(model: nn.Module, task: Any, split: str = "eval") -> dict[str, float]:
    """Return the domain's figures over one pass of a split.

    Raises:
        ConfigError: the split ``"train"``, which has no end.
    """
    if split == "train":
        raise ConfigError("the split 'train' has no end; evaluate on 'eval', or 'test' where it is")
    _, adapter = checkpoint.adapter_of(model)
    was_training = model.training
    model.eval()
    totals: dict[str, float] = {}
    rng = torch.Generator()
    for i, batch in enumerate(adapter.data(task, split)):
        rng.manual_seed(i)
        _, sums = adapter.loss(model, batch, rng)
        for name, value in _floats(sums).items():
            totals[name] = totals.get(name, 0.0) + value
    model.train(was_training)
    return adapter.metrics(task, totals)


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _floats(sums: dict[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in sums.items()}


def _save(run_dir: Path, model: nn.Module, optim: Optimizer, step: int) -> None:
    from safetensors.torch import save as to_bytes

    target = run_dir / f"step-{step:07d}"
    if target.exists():
        return
    memory = {
        f"{kind}/{name}": value.contiguous()
        for group in optim.param_groups
        for name, p in zip(group["names"], group["params"], strict=True)
        for kind, value in optim.state.get(p, {}).items()
        if isinstance(value, torch.Tensor)
    }
    progress = json.dumps({"step": step}).encode()
    checkpoint.save(model, target, {OPTIMIZER: to_bytes(memory), PROGRESS: progress})
    for old in sorted(run_dir.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)


def _restore(run_dir: Path, model: nn.Module, optim: Optimizer) -> int:
    folder = checkpoint.find(run_dir)
    source = folder / checkpoint.WEIGHTS
    checkpoint.load_tensors(model, checkpoint.read_tensors(source), str(source))
    memory = checkpoint.read_tensors(folder / OPTIMIZER)
    try:
        step = int(json.loads((folder / PROGRESS).read_text())["step"])
        parameters = {
            name: p
            for group in optim.param_groups
            for name, p in zip(group["names"], group["params"], strict=True)
        }
        for key, value in memory.items():
            kind, _, name = key.partition("/")
            optim.state[parameters[name]][kind] = value
        if step and (idle := [n for n, p in parameters.items() if not optim.state[p]]):
            raise KeyError(f"no optimiser state of {idle[0]}")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} cannot be resumed from: {type(error).__name__}: {error}; delete it to "
            "resume from the one before"
        ) from error
    return step


@contextmanager
def _stop_signals() -> Iterator[list[signal.Signals]]:
    """Turn the first SIGINT or SIGTERM into an entry of the list; a second one acts at once."""
    received: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _: Any) -> None:
        received.append(signal.Signals(number))
        for s, handler in previous.items():
            signal.signal(s, handler)

    for s in previous:
        signal.signal(s, handle)
    try:
        yield received
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
