"""timm's own scripts, unchanged, on our models: train, validate, inference and benchmark.

They are in no wheel. They are looked for in the folder that RWKV_TIMM_SCRIPTS names, a checkout of
timm of the installed version, and without one in the sdist of that version, which pip downloads.
"""

import csv
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import timm

import rwkv_vision  # noqa: F401 - enters the models in the registry

pytestmark = pytest.mark.slow

SCRIPTS = ("train.py", "validate.py", "inference.py", "benchmark.py")
MODELS = [n for n in timm.list_models(module="models") if n.startswith("test_")]
RUN = "import rwkv_vision, runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
CPU = ("--device", "cpu", "--batch-size", "4")


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds timm's scripts, or skip with the reason why there is none."""
    if given := os.environ.get("RWKV_TIMM_SCRIPTS"):
        missing = [name for name in SCRIPTS if not (Path(given) / name).is_file()]
        assert not missing, f"RWKV_TIMM_SCRIPTS={given} lacks {missing}"
        return Path(given)
    folder = tmp_path_factory.mktemp("timm")
    package = f"timm=={timm.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "timm", package]
    result = subprocess.run(pip, cwd=folder, capture_output=True, text=True, timeout=300)
    if result.returncode:
        pytest.skip(f"pip downloads no sdist of {package}: {result.stderr.strip()[-200:]}")
    (archive,) = folder.glob("timm-*.tar.gz")
    with tarfile.open(archive) as file:
        held = {m.name.partition("/")[2]: m for m in file.getmembers() if m.isfile()}
        if missing := [name for name in SCRIPTS if name not in held]:
            pytest.skip(
                f"the sdist of {package} lacks {', '.join(missing)}; set RWKV_TIMM_SCRIPTS to a "
                "checkout of timm of that version"
            )
        for name in SCRIPTS:
            content = file.extractfile(held[name])
            assert content is not None
            (folder / name).write_bytes(content.read())
    return folder


@pytest.fixture
def run(scripts: Path, tmp_path: Path) -> Callable[..., str]:
    """Return ``run("train.py", …) -> what it wrote``, our models entered by an import alone.

    A script that knows ``--device-modules`` imports them itself; others are started after it.
    """

    def run(name: str, *arguments: str) -> str:
        script = scripts / name
        if "--device-modules" in script.read_text("utf-8"):
            start = [str(script), *arguments, "--device-modules", "rwkv_vision.models"]
        else:
            start = ["-c", RUN, str(script), *arguments]
        result = subprocess.run(
            [sys.executable, *start], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert result.returncode == 0, f"{name}\n{result.stdout}\n{result.stderr}"
        return result.stdout + result.stderr

    return run


@pytest.mark.parametrize("model", MODELS)
def test_train_then_validate_then_inference(
    model: str, run: Callable[..., str], paint: Callable[..., Path], tmp_path: Path
) -> None:
    paint(tmp_path / "data" / "train", per_class=4)
    paint(tmp_path / "data" / "validation", per_class=2)
    size = ("--img-size", "64", "--num-classes", "3", "--workers", "0", *CPU)
    recipe = ("--epochs", "2", "--warmup-epochs", "0", "--opt", "adamw", "--lr", "1e-3")
    out = ("--output", "runs", "--experiment", "run")
    run("train.py", "data", "--model", model, *size, *recipe, *out, "--layer-decay", "0.8")
    with (tmp_path / "runs/run/summary.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2
    trained = ("--model", model, *size, "--checkpoint", "runs/run/last.pth.tar")
    said = run("validate.py", "data", *trained)
    assert '"top1"' in said
    # full names: those of the files alone are the same in every class
    found = ("--label-type", "none", "--fullname", "--results-dir", "found")
    run("inference.py", "data", *trained, *found)
    (results,) = (tmp_path / "found").glob("*.csv")
    assert len(results.read_text("utf-8").splitlines()) == 1 + 3 * 2


@pytest.mark.parametrize("model", MODELS)
def test_benchmark(model: str, run: Callable[..., str]) -> None:
    steps = ("--num-warm-iter", "1", "--num-bench-iter", "5", "--img-size", "64")
    said = run("benchmark.py", "--model", model, "--bench", "both", *steps, *CPU)
    assert "infer_samples_per_sec" in said
    assert "train_samples_per_sec" in said
