"""The main job end to end on data that every Python ships: train, export, verify, run elsewhere."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rwkv_core.config import override
from rwkv_core.errors import RWKVError
from rwkv_core.registry import RECIPES
from rwkv_core.train import train
from rwkv_core.train.threads import probe_threads
from rwkv_export._export import export
from rwkv_text.baselines import ngram_bits_per_byte, xz_bits_per_byte
from rwkv_text.data import split_documents

__all__ = ["run"]

logger = logging.getLogger(__name__)
PROMPT = 'The "with" statement'
SAMPLING: dict[str, Any] = {
    "max_tokens": 400, "temperature": 0.7, "top_p": 0.9, "seed": 0
}  # fmt: skip

# runs where torch cannot be imported
ELSEWHERE = """
import sys, json, time
sys.modules["torch"] = None
import rwkv_export
folder, prompt, sampling = json.loads(sys.argv[1])
runtime = rwkv_export.load(folder)
runtime.generate(prompt, max_tokens=8)
began = time.perf_counter()
text = runtime.generate(prompt, **sampling)
print(json.dumps({"text": text, "seconds": time.perf_counter() - began}))
"""


def run(out: Path, *, seconds: float = 85.0, mixer: str = "rwkv7") -> None:
    """Train on CPython's language reference, export, prove, generate in another process, report.

    Args:
        out: folder for everything; must not exist.
        seconds: aim of the training time; a short probe turns it into a number of steps.
        mixer: RWKV generation.

    Raises:
        RWKVError: ``out`` exists, or the exported model does not write what PyTorch writes.
    """
    if out.exists():
        raise RWKVError(f"{out} exists already; remove it or name another folder with --out")
    config = override(RECIPES["pydoc"](), f"task.mixer={mixer}")
    threads, per_step = probe_threads(config)
    steps = max(20, int(seconds / per_step))
    limit = seconds * 1.35  # a busy machine may slow down after the probe
    for assignment in (
        f"train.threads={threads}", f"train.steps={steps}", f"train.max_seconds={limit}"
    ):  # fmt: skip
        config = override(config, assignment)
    logger.info("training: %d steps of about %.2f s on %d threads", steps, per_step, threads)
    result = train(config, out / "run")
    if result.stopped_by:
        raise RWKVError(f"stopped by {result.stopped_by.name}; the run is in {result.run_dir}")
    model: Any = result.model

    logger.info("exporting and comparing with PyTorch over 4,096 steps")
    report = export(model, out / "onnx")

    logger.info("generating: PyTorch here, onnxruntime in a process without torch")
    model.generate(PROMPT, max_tokens=8)
    began = time.perf_counter()
    text = model.generate(PROMPT, **SAMPLING)
    torch_seconds = time.perf_counter() - began
    elsewhere = _elsewhere(out / "onnx")
    if elsewhere["text"] != text:
        raise RWKVError("the exported model wrote another text than PyTorch")
    (out / "sample.txt").write_text(PROMPT + text + "\n")

    learned, held_out = (split_documents(config.task.data, split) for split in ("train", "eval"))
    n_tokens = max(len(text.encode()), 1)
    table = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "training": f"{result.seconds:.0f} s, {result.step} steps, {threads} threads",
        "held-out bits/byte": f"{result.metrics['bits_per_byte']:.3f}",
        "  xz -9e": f"{xz_bits_per_byte(held_out):.3f}",
        "  5-gram": f"{ngram_bits_per_byte(learned, held_out):.3f}",
        "export": f"{report.bytes / 1e6:.1f} MB, {sum(report.nodes.values())} nodes",
        "worst disagreement": f"{report.worst:.1e} of the largest value",
        "tokens/s PyTorch": f"{n_tokens / torch_seconds:.0f}",
        "tokens/s onnxruntime": f"{n_tokens / elsewhere['seconds']:.0f}",
    }
    print(f"\n{PROMPT}{text}\n")
    for name, value in table.items():
        print(f"{name:<22} {value}")
    print("\nfiles")
    for path in _files(out):
        print(f"  {path}")


def _elsewhere(folder: Path) -> dict[str, Any]:
    """Generate in a fresh interpreter that cannot import torch."""
    arguments = json.dumps([str(folder), PROMPT, SAMPLING])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RWKVError(f"the process without torch failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def _files(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.rglob("*")) if path.is_file())
