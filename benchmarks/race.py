"""How every race here is run, and what it leaves behind.

Contestants take turns, A B A B, in one process on one thread; what counts is processor time, median
and minimum. One that cannot run is a named gap in the table, not an error; one that fails, or whose
answers are not ours, is disqualified, and the script ends with an error. A race writes its rows,
the machine and the versions to ``benchmarks/results/NAME.json``, and a plot to ``NAME.png`` where
there is matplotlib.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import torch

from rwkv_core.errors import NativeError
from rwkv_core.ops.native.build import build
from rwkv_core.ops.native.library import loaded
from rwkv_core.train.memory import keep_freed_memory

RESULTS = Path(__file__).parent / "results"
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx_vnni", "amx_bf16", "asimd", "sve")
PACKAGES = ("torch", "timm", "onnxruntime", "rwkv", "transformers", "llama-cpp-python", "gguf",
            "rwkv_cpp_python", "rwkv-ops", "keras")  # fmt: skip

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


class Gap(Exception):
    """Why a contestant cannot run here."""


class Disqualified(Exception):
    """How far a contestant's answers are from ours, so that its speed says nothing."""


@dataclass(frozen=True)
class Timing:
    """Seconds of processor time of one run."""

    median: float
    minimum: float
    rounds: int


def installed(package: str, how: str = "") -> str:
    """Return the version of an installed package.

    Raises:
        Gap: it is not installed; the reason names the command that does it.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise Gap(f"not installed: {how or f'pip install {package}'}") from None


def line_up(makers: Mapping[str, Callable[[], Any]]) -> tuple[dict[str, Any], list[Row]]:
    """Return the contestants that can run, by name, and a row for each that cannot."""
    present, missing = {}, []
    for name, make in makers.items():
        try:
            present[name] = make()
        except Gap as reason:
            missing.append({"name": name, "gap": str(reason)})
        except Disqualified as reason:
            missing.append({"name": name, "disqualified": str(reason)})
        except Exception as error:  # whatever a peer raises, the others run
            missing.append({"name": name, "disqualified": f"{type(error).__name__}: {error}"})
    return present, missing


def compare(worst: float, limit: float) -> float:
    """Return ``worst``, the largest difference from our answers, if it is within the limit.

    Raises:
        Disqualified: it is larger, or no number.
    """
    if not worst <= limit:
        raise Disqualified(f"answers differ by {worst:.1e}, allowed {limit:.0e}")
    return worst


def interleave(
    runs: Mapping[Key, Callable[[], object]],
    rounds: int,
    *,
    warm_up: bool = True,
    clock: Callable[[], float] | None = None,
) -> dict[Key, Timing]:
    """Return the times of contestants that take turns, one run each per round.

    They are processor times, which neighbours on the machine disturb least; with several threads
    the clock on the wall, since threads that wait for each other use the processor, too.
    """
    if clock is None:
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[Key, list[float]] = {name: [] for name in runs}
    if warm_up:
        for run in runs.values():
            run()
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            run()
            seconds[name].append(clock() - began)
    return {
        name: Timing(statistics.median(found), min(found), rounds)
        for name, found in seconds.items()
    }


def in_a_process_of_its_own(script: str, *arguments: object) -> Any:
    """Return what the script prints last, as JSON: memory is measured in a fresh process."""
    command = [sys.executable, script, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def added_megabytes(run: Callable[[], object]) -> float:
    """Return by how much a run raises the largest memory that this process has held."""
    before = peak_bytes()
    run()
    return (peak_bytes() - before) / 1e6


def peak_bytes() -> int:
    """Return the largest memory that this process has held."""
    status = Path("/proc/self/status")
    if status.is_file():  # the other way includes what the parent held before it started us
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def machine() -> dict[str, Any]:
    """Return what a reader of the figures must know of the machine."""
    cpu, flags = platform.processor(), set()
    listing = Path("/proc/cpuinfo")
    for line in listing.read_text().splitlines() if listing.is_file() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            cpu = value
        elif key in ("flags", "Features"):
            flags = set(value.split())
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "system": platform.platform(),
        "cpu": cpu or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "threads": torch.get_num_threads(),
        "torch isa": torch.backends.cpu.get_cpu_capability(),
        "native ops": _native(),
    }


def _native() -> str:
    try:
        return loaded().isa
    except NativeError as reason:
        return f"none: {reason}"


def versions() -> dict[str, str | None]:
    """Return the version of Python and of every package that takes part; None is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return aligned text: one line per row, whatever a row lacks left blank.

    Args:
        rows: each with ``name``, and perhaps ``gap`` or ``disqualified``, a sentence.
        columns: from key, which is also the heading, to format, such as ``{"tok/s": ".0f"}``.
    """
    names = ["", *(str(row["name"]) for row in rows)]
    lines = [name.ljust(max(map(len, names)) + 2) for name in names]
    notes = [row.get("gap") or row.get("disqualified") or "" for row in rows]
    for key, form in columns.items():
        cells = [key, *(f"{row[key]:{form}}" if row.get(key) is not None else "" for row in rows)]
        width = max(map(len, cells))
        lines = [line + cell.rjust(width) + "  " for line, cell in zip(lines, cells, strict=True)]
    for i, note in enumerate(notes, 1):
        lines[i] = f"{names[i].ljust(max(map(len, names)) + 2)}{note}" if note else lines[i]
    return "\n".join(line.rstrip() for line in lines)


def name(race: str, args: argparse.Namespace) -> str:
    """Return the name of a race's files; no quick run overwrites a whole one."""
    threads = getattr(args, "threads", 1)
    return race + (f"-{threads}threads" if threads > 1 else "") + ("-quick" if args.quick else "")


def write(
    name: str, rows: Sequence[Row], settings: Mapping[str, Any], folder: Path = RESULTS
) -> Path:
    """Write ``NAME.json`` and return its path."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "race": name,
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "rows": [{k: asdict(v) if isinstance(v, Timing) else v for k, v in row.items()}
                 for row in rows],
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path}; our native ops: {_native()}")
    return path


def plot(name: str, draw: Callable[[Any], None], folder: Path = RESULTS) -> Path | None:
    """Let ``draw`` fill a figure of matplotlib, write ``NAME.png`` and return its path."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install matplotlib")
        return None
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    draw(figure)
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
    return path


def bars(rows: Sequence[Row], keys: Sequence[str]) -> Callable[[Any], None]:
    """Return a drawing of horizontal bars, one panel per key; rows that lack it are left out."""

    def draw(figure: Any) -> None:
        panels = figure.subplots(1, len(keys), squeeze=False)[0]
        for axes, key in zip(panels, keys, strict=True):
            shown = [row for row in reversed(rows) if row.get(key) is not None]
            colours = ["C1" if "ours" in str(row["name"]) else "C0" for row in shown]
            drawn = axes.barh([row["name"] for row in shown], [row[key] for row in shown],
                              color=colours)  # fmt: skip
            axes.bar_label(drawn, fmt="%.3g", padding=2)
            axes.margins(x=0.15)
            axes.set_title(key)

    return draw


def arguments(description: str) -> argparse.ArgumentParser:
    """Return the parser of a race, with what every race takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short sizes, few rounds")
    parser.add_argument("--rounds", type=int, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=1, help="of every contestant")
    return parser


def prepare(threads: int = 1) -> None:
    """Prepare this process for a race, the same for all contestants.

    So many threads for torch and what is loaded later; freed memory is kept, as when training; our
    native ops are compiled if possible.
    """
    keep_freed_memory()
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[variable] = str(threads)
    torch.set_num_threads(threads)
    try:
        build()
    except NativeError as reason:
        print(f"without native ops: {reason}", file=sys.stderr)


def finish(rows: Sequence[Row]) -> None:
    """End the script with an error if a contestant was disqualified."""
    wrong = [row["name"] for row in rows if "disqualified" in row]
    if wrong:
        sys.exit(f"failed, or gave other answers than ours: {', '.join(map(str, wrong))}")
