"""Which package may import which: core ← text, vision ← export, and nothing heavy on the way in."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOMES = {
    "rwkv_core": ROOT / "rwkv_core",
    "rwkv_text": ROOT / "rwkv_text",
    "rwkv_vision": ROOT / "rwkv_vision",
    "rwkv_export": ROOT / "export" / "rwkv_export",
}


class Rule(NamedTuple):
    """What the modules of a package may import: ours, others' at the top, others' in functions."""

    ours: set[str]
    top: set[str]
    lazy: set[str]


RULES = {
    "rwkv_core": Rule(
        set(), {"torch", "safetensors", "numpy"}, {"matplotlib", "tqdm", "huggingface_hub"}
    ),
    "rwkv_text": Rule(
        {"rwkv_core"},
        {"torch", "safetensors", "numpy"},
        {"tokenizers", "pyrwkv_tokenizer"},
    ),
    "rwkv_vision": Rule(
        {"rwkv_core"},
        {"torch", "safetensors", "numpy", "timm", "torchvision", "PIL"},
        {"sklearn", "matplotlib"},
    ),
    "rwkv_export": Rule(
        {"rwkv_core", "rwkv_text", "rwkv_vision"},
        {"torch", "safetensors", "numpy", "onnx", "onnxscript", "onnx_ir", "onnxruntime"},
        set(),
    ),
}
# these reach domains and exporter by name at run time; everything else takes what it is given
DOORS = {"rwkv_core/cli.py", "rwkv_core/testing.py"}
OUR_NAME = re.compile(r"(rwkv_(?:core|text|vision|export))(?:\.\w+)*(?::\w+)?")


class Import(NamedTuple):
    """One import: its full name, the name taken from it, where, at run time of what."""

    module: str
    name: str
    line: int
    kind: str  # "top", "lazy" (in a function or for type checkers), "relative" or "string"


def imports(source: str) -> Iterator[Import]:
    """Yield every import of a module, and every string that names one of our modules."""

    def visit(node: ast.AST, kind: str) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(a.name, "", node.lineno, kind) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            kind = "relative" if node.level else kind
            yield from (Import(node.module or "", a.name, node.lineno, kind) for a in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # import_module("rwkv_text"), "rwkv_text.adapter:adapter" and f"rwkv_text.{name}"
            if OUR_NAME.fullmatch(node.value.rstrip(".")):
                yield Import(node.value.partition(":")[0], "", node.lineno, "string")
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, "lazy" if function or checking else kind)

    return visit(ast.parse(source), "top")


def leans_on_reference(path: str, module: str, name: str) -> bool:
    """Tell whether a faster form of an op imports the slow one; their single step may be shared."""
    is_faster = re.fullmatch(r"\w+/ops/\w+/(?!__init__|reference)\w+\.py", path)
    taken = f"{module}.{name}"
    return bool(is_faster) and ".reference" in taken and not taken.endswith("_step")


def faults(path: str, source: str) -> list[str]:
    """Return what a module imports and must not, one sentence each; ``path`` starts a package."""
    package = path.partition("/")[0]
    rule = RULES[package]
    found = []
    for module, name, line, kind in imports(source):
        root = module.partition(".")[0]
        fault = ""
        if kind == "relative":
            fault = "imports relatively"
        elif root in HOMES:
            through_door = kind == "string" and path in DOORS
            if root not in rule.ours | {package} and not through_door:
                fault = f"reaches for {module}"
            elif leans_on_reference(path, module, name):
                fault = f"is a faster form of an op and imports {module}.{name}"
        elif root in rule.lazy and kind == "top":
            fault = f"imports {module} at the top; import it in the function that needs it"
        elif root not in sys.stdlib_module_names | rule.top | rule.lazy:
            fault = f"imports {module}"
        if fault:
            found.append(f"{path}:{line} {fault}")
    return found


def modules() -> list[tuple[str, Path]]:
    """Return every module of ours, as it lies in the wheel and on disk."""
    return [
        (f"{package}/{file.relative_to(home).as_posix()}", file)
        for package, home in HOMES.items()
        for file in sorted(home.rglob("*.py"))
    ]


@pytest.mark.parametrize("package", HOMES)
def test_arrows_point_one_way(package: str) -> None:
    ours = [(path, file) for path, file in modules() if path.startswith(f"{package}/")]
    assert ours
    found = [fault for path, file in ours for fault in faults(path, file.read_text("utf-8"))]
    assert not found, "\n".join(found)


OP = "rwkv_core/ops/wkv7"
SLOW = "from rwkv_core.ops.wkv7.reference import"


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rwkv_core/state.py", "import rwkv_text"),
        ("rwkv_core/state.py", "def f():\n    from rwkv_export import load"),
        ("rwkv_core/state.py", "importlib.import_module('rwkv_vision.encoder')"),
        ("rwkv_core/state.py", "home = f'rwkv_text.{name}'"),
        ("rwkv_core/registry.py", "ADAPTERS.register('text', 'rwkv_text.adapter:adapter')"),
        ("rwkv_core/cli.py", "def f():\n    import rwkv_export"),
        ("rwkv_core/state.py", "import timm"),
        ("rwkv_core/state.py", "try:\n    import triton\nexcept ImportError:\n    pass"),
        ("rwkv_core/train/sinks.py", "import tqdm"),
        ("rwkv_core/state.py", "from . import registry"),
        (f"{OP}/chunked.py", f"{SLOW} wkv7_reference"),
        (f"{OP}/native.py", "def f():\n    from rwkv_core.ops.wkv7 import reference"),
        ("rwkv_text/model.py", "import rwkv_vision.encoder"),
        ("rwkv_text/model.py", "if TYPE_CHECKING:\n    import rwkv_export"),
        ("rwkv_vision/host.py", "from rwkv_text.tokenizer import ByteTokenizer"),
        ("rwkv_export/runtime.py", "import requests"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(faults(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rwkv_core/cli.py", "importlib.import_module('rwkv_export')"),
        ("rwkv_core/registry.py", "MIXERS.register('rwkv7', 'rwkv_core.mixers.rwkv7:RWKV7')"),
        ("rwkv_core/train/sinks.py", "def f():\n    from tqdm import tqdm"),
        ("rwkv_core/errors.py", "'see rwkv_text.load for files'"),
        (f"{OP}/__init__.py", f"{SLOW} wkv7_reference"),
        (f"{OP}/native.py", f"{SLOW} wkv7_step"),
        ("rwkv_export/onnx.py", "import onnx, torch, rwkv_core"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert faults(path, source) == []
