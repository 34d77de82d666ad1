"""Data stays data: nothing of ours turns a file or a string into running code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rwkv_core", "rwkv_text", "rwkv_vision", "export", "examples", "benchmarks")
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}


def faults(source: str) -> list[str]:
    """Return the calls and imports that could run code from data, as ``line text``."""
    found = []
    for node in ast.walk(ast.parse(source)):
        bad = False
        if isinstance(node, ast.Import):
            bad = any(a.name.partition(".")[0] in UNPICKLES for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            bad = (node.module or "").partition(".")[0] in UNPICKLES
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            bad = (
                called in RUNS_CODE
                or (called == "torch.load" and given.get("weights_only") != "True")
                or given.get("allow_pickle", "False") != "False"
            )
        if bad:
            found.append(f"{node.lineno} {ast.unparse(node)}")
    return found


def test_our_sources_run_no_code_from_data() -> None:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    assert files
    found = [f"{file}:{f}" for file in files for f in faults(file.read_text("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "exec(open(path).read())",
        "import pickle",
        "def f():\n    from joblib import load",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_code_from_data_is_found(source: str) -> None:
    assert len(faults(source)) == 1


def test_harmless_calls_pass() -> None:
    assert faults("model.eval()\nre.compile('a')\ntorch.load(p, weights_only=True)") == []
