"""The main job end to end on data that needs no network: train, export, verify, run elsewhere.

Twice: a language model on the reference inside CPython, a classifier of scikit-learn's digits.
"""

import json
import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_core import checkpoint
from rwkv_core.config import override
from rwkv_core.errors import RWKVError
from rwkv_core.registry import MIXERS, RECIPES
from rwkv_core.train import TrainConfig, TrainResult, train
from rwkv_core.train.threads import probe_threads
from rwkv_export import web
from rwkv_export._export import Report, export
from rwkv_export.runtime import load
from rwkv_text.baselines import ngram_bits_per_byte, xz_bits_per_byte
from rwkv_text.data import split_documents
from rwkv_text.recipes import with_mixer

__all__ = ["run", "run_with_page"]

logger = logging.getLogger(__name__)
PROMPT = 'The "with" statement'
SAMPLING: dict[str, Any] = {
    "max_tokens": 400, "temperature": 0.7, "top_p": 0.9, "seed": 0
}  # fmt: skip
BUSY = 1.24  # how much slower than its probe a training may get on a busy machine

# both run in a fresh interpreter where torch cannot be imported
NO_TORCH = "import sys, json, time, numpy\nsys.modules['torch'] = None\nimport rwkv_export\n"
GENERATE = """
folder, prompt, sampling = json.loads(sys.argv[1])
runtime = rwkv_export.load(folder)
runtime.generate(prompt, max_tokens=8)
began = time.perf_counter()
text = runtime.generate(prompt, **sampling)
print(json.dumps([text, time.perf_counter() - began]))
"""
CLASSIFY = """
folder, pictures = json.loads(sys.argv[1])
runtime, pictures = rwkv_export.load(folder), numpy.load(pictures)
runtime.predict(pictures[:8])
began = time.perf_counter()
labels = [p.label for p in runtime.predict(pictures)]
print(json.dumps([labels, time.perf_counter() - began]))
"""


def run(out: Path, *, seconds: float = 95.0, mixer: str = "rwkv7") -> None:
    """Train, export, prove and run both models; print one table; leave the files in ``out``.

    Args:
        out: folder for everything; must not exist.
        seconds: aim of the language model's training time; a probe makes it a number of steps.
        mixer: RWKV generation of the language model.

    Raises:
        RWKVError: ``out`` exists, a part is missing, or the exported model answers otherwise.
    """
    if out.exists():
        raise RWKVError(f"{out} exists already; remove it or name another folder with --out")
    _ = MIXERS[mixer]  # an unknown name ends here
    text = _text(out / "text", seconds, mixer)
    digits = _digits(out / "digits")
    pictures = out / "pictures"
    for name in ("text", "digits"):
        shutil.copy(out / name / "run" / "loss.png", pictures / f"{name}-loss.png")
    print(f"\n{(out / 'text' / 'sample.txt').read_text()}")
    for title, table in (("language model", text), ("digits classifier", digits)):
        print(f"\n{title}")
        for name, value in table.items():
            print(f"  {name:<22} {value}")
    print("\nfiles")
    for folder in (out / "text" / "onnx", out / "digits" / "onnx", pictures):
        print(f"  {folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")
    print(f"  {out / 'text' / 'run'} and {out / 'digits' / 'run'}: checkpoints and logs")


def run_with_page(out: Path, *, seconds: float, mixer: str, port: int) -> None:
    """Do what :func:`run` does, put both models behind a page in ``out/web``, serve until Ctrl-C.

    Raises:
        RWKVError: as ``run``; no npm to build the page, or the port is taken.
    """
    web.page()  # what is missing ends here, before the training
    run(out, seconds=seconds, mixer=mixer)
    logger.info("exporting for the page")
    with web.site(out / "web") as folder:
        for name in ("text", "digits"):
            export(checkpoint.load(out / name / "run"), folder / name, steps=(1, 16), lane="web")
    web.serve(out / "web", port, pages=("?model=text", "?model=digits"))


def _text(out: Path, seconds: float, mixer: str) -> dict[str, str]:
    config = with_mixer(RECIPES["pydoc"](), mixer)
    threads, per_step = probe_threads(config)
    config = _set(config, threads=threads, steps=max(20, int(seconds / per_step)))
    result = _train(config, out / "run", per_step, seconds * BUSY)
    model: Any = result.model
    report = _export(result, out / "onnx")
    logger.info("generating: PyTorch here, onnxruntime in a process without torch")
    model.generate(PROMPT, max_tokens=8)
    began = time.perf_counter()
    text = model.generate(PROMPT, **SAMPLING)
    torch_seconds = time.perf_counter() - began
    answer, seconds = _elsewhere(GENERATE, [str(out / "onnx"), PROMPT, SAMPLING])
    if answer != text:
        raise RWKVError("the exported model wrote another text than PyTorch")
    (out / "sample.txt").write_text(PROMPT + text + "\n")
    learned, held_out = (split_documents(config.task.data, split) for split in ("train", "eval"))
    n_tokens = max(len(text.encode()), 1)
    return {
        **_rows(result, report),
        "held-out bits/byte": f"{result.metrics['bits_per_byte']:.3f}",
        "  xz -9e": f"{xz_bits_per_byte(held_out):.3f}",
        "  5-gram": f"{ngram_bits_per_byte(learned, held_out):.3f}",
        "tokens/s PyTorch": f"{n_tokens / torch_seconds:.0f}",
        "tokens/s onnxruntime": f"{n_tokens / seconds:.0f}",
    }


def _digits(out: Path) -> dict[str, str]:
    # the domain's modules are asked for here, so that text works where torchvision does not
    from rwkv_vision.baselines import nearest_neighbours
    from rwkv_vision.pictures import report as draw
    from rwkv_vision.sources import open_split

    config = RECIPES["digits"]()
    threads, per_step = probe_threads(config)
    result = _train(_set(config, threads=threads), out / "run", per_step, 90.0)
    model: Any = result.model
    report = _export(result, out / "onnx")
    accuracy = draw(load(out / "onnx"), model.config, out.parent / "pictures")
    test = open_split(model.config, "test")
    pictures = np.stack([np.asarray(test.load(i)) for i in range(len(test.targets))])
    np.save(out / "test.npy", pictures)
    began = time.perf_counter()
    labels = [p.label for p in model.predict(pictures)]
    torch_seconds = time.perf_counter() - began
    answer, seconds = _elsewhere(CLASSIFY, [str(out / "onnx"), str(out / "test.npy")])
    if answer != labels:
        raise RWKVError("the exported classifier answered otherwise than PyTorch")
    neighbours, k = nearest_neighbours(model.config)
    return {
        **_rows(result, report),
        "test accuracy": f"{100 * accuracy:.2f} % of {len(labels)}",
        f"  {k} nearest neighbours": f"{100 * neighbours:.2f} %",
        "pictures/s PyTorch": f"{len(labels) / torch_seconds:.0f}",
        "pictures/s onnxruntime": f"{len(labels) / seconds:.0f}",
    }


def _set(config: TrainConfig, **settings: Any) -> TrainConfig:
    for name, value in settings.items():
        config = override(config, f"train.{name}={json.dumps(value)}")
    return config


def _train(config: TrainConfig, run_dir: Path, per_step: float, limit: float) -> TrainResult:
    config = _set(config, max_seconds=limit)
    logger.info(
        "training %s: %d steps of about %.2f s on %d threads",
        config.adapter, config.train.steps, per_step, config.train.threads,
    )  # fmt: skip
    result = train(config, run_dir)
    if result.stopped_by:
        raise RWKVError(f"stopped by {result.stopped_by.name}; the run is in {result.run_dir}")
    return result


def _export(result: TrainResult, folder: Path) -> Report:
    logger.info("exporting, and comparing with PyTorch")
    return export(result.model, folder)


def _rows(result: TrainResult, report: Report) -> dict[str, str]:
    threads = result.config.train.threads
    return {
        "parameters": f"{sum(p.numel() for p in result.model.parameters()):,}",
        "training": f"{result.seconds:.0f} s, {result.step} steps, {threads} threads",
        "export": f"{report.bytes / 1e6:.1f} MB, {sum(report.nodes.values())} nodes",
        "worst disagreement": f"{report.worst:.1e} of the largest value",
    }


def _elsewhere(code: str, arguments: list[Any]) -> Any:
    """Return what a fresh interpreter that cannot import torch prints as JSON."""
    command = [sys.executable, "-c", NO_TORCH + code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RWKVError(f"the process without torch failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)
