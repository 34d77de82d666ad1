"""What importing us brings in: no more than is needed, without a word, whatever the environment."""

import json
from collections.abc import Callable

import pytest

HEAVY = ["timm", "torchvision", "onnx", "onnxscript", "onnxruntime", "matplotlib", "sklearn"]
TORCH_FREE = [
    "rwkv_core.adapter", "rwkv_core.config", "rwkv_core.errors", "rwkv_core.registry",
    "rwkv_text.adapter", "rwkv_text.config", "rwkv_text.host", "rwkv_text.pile",
    "rwkv_text.sampling", "rwkv_text.tokenizer", "rwkv_text.world", "rwkv_vision",
    "rwkv_vision.adapter", "rwkv_vision.config", "rwkv_vision.host", "rwkv_export.runtime",
]  # fmt: skip

# imports the modules and prints, as JSON, which top-level modules came with them, what was written
# to the terminal and which environment variables one of our own modules asked for; what torch
# itself brings and asks for is not ours
OBSERVE = """
import contextlib, importlib, io, json, os, sys
for name in {before!r}:
    importlib.import_module(name)
before = set(sys.modules)
asked, lookup = [], os._Environ.__getitem__

def watched(self, key):
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") in ("os", "collections.abc"):
        frame = frame.f_back
    if frame.f_globals.get("__name__", "").startswith("rwkv_"):
        asked.append(key)
    return lookup(self, key)

os._Environ.__getitem__ = watched
terminal = io.StringIO()
with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
    for name in {names!r}:
        importlib.import_module(name)
new = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})
print(json.dumps({{"modules": new, "terminal": terminal.getvalue(), "environment": asked}}))
"""


@pytest.fixture
def observe(run_python: Callable[..., str]) -> Callable[..., dict[str, object]]:
    def run(names: list[str], *, before: list[str], block: tuple[str, ...]) -> dict[str, object]:
        return json.loads(run_python(OBSERVE.format(names=names, before=before), block=block))

    return run


@pytest.mark.parametrize(
    "names",
    [
        ["rwkv_core.ops", "rwkv_core.train", "rwkv_core.checkpoint", "rwkv_core.state"],
        ["rwkv_text.model", "rwkv_text.data", "rwkv_text.recipes"],
    ],
)
def test_import_brings_nothing_heavy(names: list[str], observe: Callable[..., dict]) -> None:
    seen = observe(names, before=["torch"], block=())
    assert seen["terminal"] == ""
    assert seen["environment"] == []
    assert not {"triton", *HEAVY} & set(seen["modules"])


def test_packages_import_without_any_dependency(observe: Callable[..., dict]) -> None:
    names = ["rwkv_core", "rwkv_text", "rwkv_export"]
    seen = observe(names, before=[], block=("torch", "numpy", "safetensors", *HEAVY))
    assert seen["terminal"] == ""
    assert seen["environment"] == []
    assert set(names) <= set(seen["modules"])


@pytest.mark.parametrize("name", TORCH_FREE)
def test_imports_where_torch_does_not_exist(name: str, observe: Callable[..., dict]) -> None:
    seen = observe([name], before=[], block=("torch",))
    assert seen["terminal"] == ""
    assert seen["environment"] == []
    assert not {"torch", "safetensors", "onnx", "matplotlib"} & set(seen["modules"])


def test_the_observer_sees(observe: Callable[..., dict], tmp_path) -> None:
    loud = "import os, sqlite3\nprint('hello')\nos.environ.get('HOME')\nos.getenv('NOT_SET')\n"
    (tmp_path / "rwkv_loud.py").write_text(loud)
    seen = observe(["rwkv_loud"], before=[], block=())
    assert seen["terminal"] == "hello\n"
    assert seen["environment"] == ["HOME", "NOT_SET"]
    assert "sqlite3" in seen["modules"]
