"""Compile the native ops: which compiler, which flags, where the result is kept."""

import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from rwkv_core._files import atomic_file, cache_folder
from rwkv_core.errors import NativeError

__all__ = ["Built", "build", "compiler", "library_path"]

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti",
    "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi",
]  # fmt: skip
# instruction set → floats of a vector, flags; isa.cpp chooses between them at run time
X86 = {
    "scalar": (4, ()),
    "avx2": (8, ("-mavx2", "-mfma")),
    "avx512": (16, ("-mavx512f", "-mavx512dq", "-mavx2", "-mfma", "-mprefer-vector-width=512")),
}
VARIANTS: Mapping[str, Mapping[str, tuple[int, tuple[str, ...]]]] = {
    "x86_64": X86,
    "amd64": X86,
    "aarch64": {"neon": (4, ())},
    "arm64": {"neon": (4, ())},
}
PLAIN = {"scalar": (4, ())}  # any other processor


class Built(NamedTuple):
    """A compiled library, and what it took."""

    path: Path
    seconds: float  # 0 if it was in the cache
    compiler: str


def variants() -> Mapping[str, tuple[int, tuple[str, ...]]]:
    """Return the instruction sets that are compiled on this kind of machine."""
    return VARIANTS.get(platform.machine().lower(), PLAIN)


def compiler() -> list[str] | None:
    """Return the command of a C++ compiler: what CXX says, else the first one found, else None."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if shutil.which(command[0]):
            return command
    return None


def library_path() -> Path:
    """Return where the library for these sources, flags, torch and kind of machine belongs."""
    key = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        key.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    about = [
        torch.__version__,
        platform.system(),
        platform.machine(),
        FLAGS,
        list(variants().items()),
    ]
    key.update(json.dumps(about).encode())
    return cache_folder("native") / f"{key.hexdigest()[:20]}.so"


def build(*, force: bool = False) -> Built:
    """Compile the library unless it is in the cache, and return where it is.

    It appears under its name whole or not at all, with its checksum beside it. What the compiler
    says is kept in a file of the same name that ends in .log.

    Raises:
        NativeError: there is no compiler, or it failed.
        OSError: the cache cannot be written.
    """
    path = library_path()
    if not force and is_whole(path):
        return Built(path, 0.0, "")
    command = compiler()
    if command is None:
        where = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else ", ".join(COMPILERS)
        raise NativeError(
            f"no C++ compiler found ({where}); install one, such as Debian's g++. Without it the "
            "ops run in their torch forms"
        )
    began = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        result = Path(folder) / "library.so"
        _compile(command, result, log=path.with_suffix(".log"))
        data = result.read_bytes()
    path.unlink(missing_ok=True)  # never write into a file that a process may have loaded
    with atomic_file(path) as file:
        file.write(data)
    with atomic_file(path.with_suffix(".sha256")) as file:
        file.write(hashlib.sha256(data).hexdigest().encode())
    return Built(path, time.perf_counter() - began, shlex.join(command))


def is_whole(path: Path) -> bool:
    """Tell whether a library is there and has its checksum: loading half a file can crash."""
    try:
        expected = path.with_suffix(".sha256").read_text("ascii").strip()
        return hashlib.sha256(path.read_bytes()).hexdigest() == expected
    except (OSError, UnicodeDecodeError):
        return False


def _compile(command: list[str], result: Path, *, log: Path) -> None:
    """Compile every instruction set at the same time, then link them into one library."""
    steps = {
        name: ["kernels.cpp", f"-DISA={name}", f"-DLANES={lanes}", *flags]
        for name, (lanes, flags) in variants().items()
    } | {"isa": ["isa.cpp"]}
    objects = []
    running = []
    for name, (source, *flags) in steps.items():
        objects.append(str(result.with_name(f"{name}.o")))
        line = [*command, *FLAGS, *flags, "-c", str(SOURCES / source), "-o", objects[-1]]
        running.append((line, _start(line)))
    outputs = [(line, process.communicate()[0], process.returncode) for line, process in running]
    if all(code == 0 for *_, code in outputs):
        line = [*command, "-shared", *objects, "-o", str(result)]
        process = _start(line)
        outputs.append((line, process.communicate()[0], process.returncode))
    log.write_text("".join(f"$ {shlex.join(line)}\n{text}\n" for line, text, _ in outputs), "utf-8")
    for line, text, code in outputs:
        if code != 0 or not (result.exists() or line is not outputs[-1][0]):
            first = next(
                (part for part in text.splitlines() if "error" in part), text[:200].strip()
            )
            raise NativeError(
                f"{command[0]} failed with status {code}: {first}\nIts output is in {log}; the ops "
                "run in their torch forms"
            )


def _start(line: list[str]) -> "subprocess.Popen[str]":
    try:
        return subprocess.Popen(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise NativeError(f"{line[0]} cannot be run: {error.strerror}") from error
