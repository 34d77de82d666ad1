"""What every test shares: one torch thread, fixed seeds, poisoned memory, fresh interpreters."""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch; the processes that tests start inherit it

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils._device
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("rwkv_core", "rwkv_text", "rwkv_vision", "rwkv_export")

# hides modules from a fresh interpreter as if they had never been installed
HIDE = """
import importlib.machinery as _machinery
_find = _machinery.PathFinder.find_spec
_machinery.PathFinder.find_spec = lambda name, *rest: (
    None if name.partition(".")[0] in {names!r} else _find(name, *rest)
)
"""


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Give every test the same random numbers and one thread, whatever ran before it."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Fill what our packages get from torch.empty, so that reading it unwritten shows.

    Floats become NaN and integers their largest value. Tracing sees the real functions.
    """
    # torch keeps its own list of constructors; it must be made of the real ones
    torch.utils._device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", _poisoning(torch.empty))
        patch.setattr(torch, "empty_like", _poisoning(torch.empty_like))
        patch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))
        yield


def _poisoning(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return allocate(*args, **kwargs)
        x = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in PACKAGES:
            with torch.no_grad():
                if x.is_floating_point() or x.is_complex():
                    x.fill_(float("nan"))
                elif x.dtype is not torch.bool:
                    x.fill_(torch.iinfo(x.dtype).max)
        return x

    return poisoned


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real test data: RWKV_SHARED_DATA, or shared/data beside the checkout."""
    path = Path(os.environ.get("RWKV_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; set RWKV_SHARED_DATA to the folder of test data")
    return path


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """Return ``run(code, block=("torch",)) -> stdout``: code in a fresh interpreter.

    The modules named in ``block`` cannot be imported there. It works in ``tmp_path``; an exit
    status other than 0 fails the test and shows what it wrote to stderr.
    """

    def run(code: str, block: Sequence[str] = ("torch",)) -> str:
        result = subprocess.run(
            [sys.executable, "-c", HIDE.format(names=set(block)) + code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}{result.stderr}"
        return result.stdout

    return run


@pytest.fixture(scope="session")
def paint() -> Callable[..., Path]:
    """Return ``paint(folder, per_class=6) -> folder``: noisy pictures, one colour per class."""
    shades = {"blue": (40, 40, 220), "green": (30, 200, 60), "red": (220, 40, 40)}

    def fill(folder: Path, per_class: int = 6) -> Path:
        rng = np.random.default_rng(0)
        for name, color in shades.items():
            (folder / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = np.clip(rng.normal(color, 25, (12, 10, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / name / f"{i}.png")
        return folder

    return fill


@pytest.fixture
def colors(paint: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a folder of pictures in the classes blue, green and red."""
    return paint(tmp_path / "colors")
