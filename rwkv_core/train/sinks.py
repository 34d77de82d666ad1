"""Where a run's figures go: JSON lines always, the terminal for whoever watches, a PNG after."""

import json
import logging
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rwkv_core._files import atomic_file

__all__ = ["Console", "JsonlSink", "plot_losses", "read_log"]

logger = logging.getLogger(__name__)
LOG = "log.jsonl"


class JsonlSink:
    """Append one JSON object a line to ``log.jsonl``; lines after ``start`` are dropped first."""

    def __init__(self, run_dir: Path, start: int) -> None:
        self.path = run_dir / LOG
        kept = [row for row in read_log(run_dir) if row["step"] <= start]
        with atomic_file(self.path) as file:
            file.writelines((json.dumps(row) + "\n").encode() for row in kept)

    def log(self, row: Mapping[str, Any]) -> None:
        """Write one line; it is on disk when this returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


class Console:
    """A tqdm bar on a terminal, one aligned log line otherwise."""

    def __init__(self, steps: int, start: int) -> None:
        self.steps, self.start, self.began = steps, start, time.monotonic()
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True)

    def step(self) -> None:
        """Advance by one step."""
        if self.bar is not None:
            self.bar.update()

    def log(self, row: Mapping[str, Any]) -> None:
        """Show one row of figures."""
        text = "  ".join(
            f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "seconds") and _shown(v)
        )
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        else:
            width = len(str(self.steps))
            elapsed = time.monotonic() - self.began
            logger.info("step %*d/%d  %s  %5.1f s", width, row["step"], self.steps, text, elapsed)

    def close(self) -> None:
        """Leave the terminal tidy."""
        if self.bar is not None:
            self.bar.close()


def _shown(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's log; a last line cut short by a crash is left out."""
    path = Path(run_dir) / LOG
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def plot_losses(run_dir: Path) -> Path | None:
    """Draw training and held-out loss against the step; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.info("no loss curve: matplotlib is missing (pip install 'rwkv-toolkit[plot]')")
        return None
    rows = read_log(run_dir)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    train = [(r["step"], r["loss"]) for r in rows if "loss" in r]
    if train:
        axes.plot(*zip(*train, strict=True), lw=1, label="training")
    held_out = [(r["step"], r["eval_loss"]) for r in rows if "eval_loss" in r]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss", title="/".join(Path(run_dir).parts[-2:]))
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(run_dir) / "loss.png"
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=120)
    return path
