"""The wheel: all that runs is in it, nothing else is, and it works away from the checkout."""

import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {
    "rwkv_core": ROOT / "rwkv_core",
    "rwkv_text": ROOT / "rwkv_text",
    "rwkv_vision": ROOT / "rwkv_vision",
    "rwkv_export": ROOT / "export" / "rwkv_export",
}
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command: str | Path, cwd: Path) -> str:
    """Return what a command printed; nothing in its environment leads to the checkout."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    offline = ["--no-deps", "--no-index", "--no-build-isolation"]
    run(*PIP, "wheel", *offline, "--wheel-dir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of commands of an environment that holds the wheel and nothing else."""
    home = tmp_path_factory.mktemp("clean") / "env"
    venv.create(home, with_pip=False, symlinks=True)
    run(*PIP, "--python", home, "install", "--no-deps", "--no-index", wheel, cwd=home)
    return home / "bin"


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    for package, home in HOMES.items():
        sources = {f"{package}/{file.relative_to(home)}" for file in home.rglob("*.py")}
        assert sources | {f"{package}/py.typed"} <= files
    native = HOMES["rwkv_core"] / "ops" / "native" / "src"
    assert {f"rwkv_core/ops/native/src/{file.name}" for file in native.iterdir()} <= files
    roots = {name.partition("/")[0] for name in files}
    (info,) = roots - set(HOMES)
    assert info.endswith(".dist-info")
    assert {f"{info}/licenses/LICENSE", f"{info}/entry_points.txt"} <= files


def test_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "rwkv-toolkit"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert {"dev", "demo", "plot"} <= set(metadata.get_all("Provides-Extra"))
    assert wheel.name.endswith("-py3-none-any.whl")


def test_wheel_is_what_the_clean_environment_imports(clean: Path, tmp_path: Path) -> None:
    for package in ("rwkv_core", "rwkv_text", "rwkv_export"):
        code = f"import {package}; print({package}.__file__)"
        file = Path(run(clean / "python", "-c", code, cwd=tmp_path).strip())
        assert file.is_relative_to(clean.parent)
        assert not file.is_relative_to(ROOT)


def test_command_lists_where_nothing_else_is_installed(clean: Path, tmp_path: Path) -> None:
    listed = run(clean / "rwkv", "list", cwd=tmp_path)
    assert all(name in listed for name in ("rwkv7", "text", "pydoc"))
