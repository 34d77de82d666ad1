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

from rwkv_core import checkpoint
from rwkv_core.testing import perturb
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.model import Classifier

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


@pytest.fixture
def classifier(colors: Path) -> Callable[..., Classifier]:
    """Return ``classifier(embed_dim=16) -> model`` of one layer for the pictures of ``colors``."""

    def make(embed_dim: int) -> Classifier:
        config = ClassifyConfig(
            model="test_vrwkv",
            model_options={"embed_dim": embed_dim, "depth": 1, "patch_size": 4},
            data=str(colors),
            image_size=(12, 8),
            batch_size=4,
        )
        torch.manual_seed(0)
        model = checkpoint.build("classify", config)
        perturb(model, 0.05)
        return model

    return make


@pytest.fixture(scope="session")
def official() -> Callable[..., dict[str, torch.Tensor]]:
    """Return ``official("5.2", depth=2, …) -> tensors``: a small model as BlinkDL stores it.

    The names and shapes are those of the official trainers, written down here on their own; the
    values are random. Versions: 4, 5.0, "5.0 raw" (bonus not exponentiated), 5.1, 5.2, 6 and 7.
    """
    return _official


def _official(
    version: str,
    *,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    hidden: int = 96,
    vocab: int = 10,
    rank: int = 32,
    dtype: torch.dtype = torch.float32,
    tuned: bool = False,
) -> dict[str, torch.Tensor]:
    C, H, N, F, D = dim, heads, dim // heads, hidden, rank
    square = dict.fromkeys((f"att.{n}.weight" for n in ("receptance", "key", "value")), (C, C))
    layer: dict[str, tuple[int, ...]] = {**square, "att.output.weight": (C, C)}
    layer |= {"ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}
    layer |= {f"ln{i}.{kind}": (C,) for i in (1, 2) for kind in ("weight", "bias")}
    if version != "7":
        layer["ffn.receptance.weight"] = (C, C)
    if version != "4":
        layer |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    if version in ("5.1", "5.2", "6"):
        layer["att.gate.weight"] = (C, C)
    if version[0] in "45":
        mixes = "kvrg" if version in ("5.1", "5.2") else "kvr"
        layer |= {f"att.time_mix_{c}": (1, 1, C) for c in mixes}
        layer |= {f"ffn.time_mix_{c}": (1, 1, C) for c in "kr"}
        shape = {"4": (C,), "5.2": (H, N)}.get(version, (H,))
        bonus = "time_first" if version in ("4", "5.0") else "time_faaaa"
        layer |= {"att.time_decay": shape, f"att.{bonus}": shape}
    elif version == "6":
        layer |= {f"att.time_maa_{c}": (1, 1, C) for c in "xwkvrg"}
        layer |= {"att.time_maa_w1": (C, 5 * D), "att.time_maa_w2": (5, D, C)}
        layer |= {"att.time_decay": (1, 1, C), "att.time_faaaa": (H, N)}
        layer |= {"att.time_decay_w1": (C, 2 * D), "att.time_decay_w2": (2 * D, C)}
        layer |= {f"ffn.time_maa_{c}": (1, 1, C) for c in "kr"}
    else:
        layer |= {f"att.x_{c}": (1, 1, C) for c in "rwkvag"}
        layer |= {f"att.{n}": (1, 1, C) for n in ("w0", "a0", "v0", "k_k", "k_a")}
        layer |= {f"att.{c}1": (C, D) for c in "wav"} | {f"att.{c}2": (D, C) for c in "wav"}
        layer |= {"att.g1": (C, 2 * D), "att.g2": (2 * D, C), "att.r_k": (H, N)}
        layer["ffn.x_k"] = (1, 1, C)
    if tuned:
        layer["att.time_state"] = (H, N, N)
    shapes = {"emb.weight": (vocab, C), "blocks.0.ln0.weight": (C,), "blocks.0.ln0.bias": (C,)}
    shapes |= {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in layer.items()}
    shapes |= {"ln_out.weight": (C,), "ln_out.bias": (C,), "head.weight": (vocab, C)}
    if version == "7":  # exports leave out what layer 0 never uses
        shapes = {n: s for n, s in shapes.items() if n[:14] != "blocks.0.att.v" or len(n) > 15}
    generator = torch.Generator().manual_seed(0)
    return {
        name: (0.5 * torch.randn(shape, generator=generator)).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def native_library() -> Iterator[None]:
    """Build once, in the usual cache; where there is no compiler, there is nothing to test."""
    from rwkv_core.ops.native import build, library

    if build.compiler() is None and not build.is_whole(build.library_path()):
        pytest.skip("no C++ compiler")
    build.build()
    library.forget()
    yield
    library.forget()


@pytest.fixture(params=["scalar", "neon", "avx2", "avx512"])
def isa(
    native_library: None, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Run a test once for every instruction set this processor has."""
    from rwkv_core.ops.native import library

    loaded = library.loaded()
    if request.param not in loaded.usable:
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(library, "_found", library.Library(loaded.path, request.param))
    return request.param
