"""Load the compiled library once, say why not where there is none, and call its functions."""

import ctypes
import os
import platform
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from rwkv_core.errors import NativeError
from rwkv_core.ops.native.build import is_whole, library_path, variants

__all__ = ["Library", "available", "check", "choose", "forget", "loaded", "why_not"]

BUILD = "run `rwkv build-native`"
FORCE = "run `rwkv build-native --force`"


class Library:
    """The kernels of one instruction set, on torch's threads."""

    def __init__(self, path: Path, isa: str | None = None) -> None:
        self.path = path
        self._functions = ctypes.CDLL(str(path))
        self._functions.rwkv_native_isa.restype = ctypes.c_char_p
        best = self._functions.rwkv_native_isa().decode()
        self.usable = list(variants())[: list(variants()).index(best) + 1]
        self.isa = isa or best
        if self.isa not in self.usable:
            raise NativeError(f"this processor has no {self.isa}; it has {', '.join(self.usable)}")
        self._parallel = _parallel_for()

    def run(
        self,
        name: str,
        sizes: Sequence[int],
        inputs: Sequence[Tensor | None],
        outputs: Sequence[Tensor | None],
    ) -> None:
        """Call a kernel: contiguous fp32 tensors in, tensors to fill out; None is left out."""
        code = getattr(self._functions, f"{name}_{self.isa}")(
            self._parallel,
            (ctypes.c_int64 * len(sizes))(*sizes),
            _pointers(inputs),
            _pointers(outputs),
        )
        if code:
            raise MemoryError(f"native {name}: no memory for the workspace")

    def run_alone(self) -> None:
        """Use no thread but the caller's: in a forked process torch's threads do not exist."""
        self._parallel = None


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    return (ctypes.c_void_p * len(addresses))(*addresses)


def _parallel_for() -> ctypes.c_void_p | None:
    """Return torch's stable ``torch_parallel_for``; None, that is one thread, where it is not."""
    name = {"Darwin": "libtorch_cpu.dylib", "Windows": "torch_cpu.dll"}.get(platform.system())
    path = Path(torch.__file__).parent / "lib" / (name or "libtorch_cpu.so")
    try:
        return ctypes.cast(ctypes.CDLL(str(path)).torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


_lock = threading.Lock()
_found: Library | str | None = None  # a library, the reason why there is none, or not looked yet


def _find() -> Library | str:
    global _found
    if _found is None:
        with _lock:
            if _found is None:
                _found = _load()
    return _found


def _load() -> Library | str:
    try:
        path = library_path()
        if not path.exists():
            return f"not built for torch {torch.__version__}; {BUILD}"
        if not is_whole(path):
            return f"{path} is damaged; {BUILD}"
        return Library(path)
    except (OSError, AttributeError, ValueError, RuntimeError) as error:
        return f"cannot be loaded ({error}); {FORCE}"


def forget() -> None:
    """Look for the library anew at the next call: after a build, or for another cache."""
    global _found
    _found = None


def available() -> bool:
    """Tell whether the native ops can run in this process."""
    return isinstance(_find(), Library)


def loaded() -> Library:
    """Return the library; raise NativeError with the reason if there is none."""
    found = _find()
    if isinstance(found, str):
        raise NativeError(f"native ops: {found}")
    return found


def why_not(like: Tensor) -> str | None:
    """Return why the native ops cannot take tensors like this one, or None if they can."""
    found = _find()
    if like.device.type != "cpu":
        return f"tensors are on {like.device.type}, native ops run on cpu"
    if like.dtype == torch.float64:
        return "native ops compute in fp32, the tensors are fp64"
    return found if isinstance(found, str) else None


def check(op: str, like: Tensor) -> None:
    """Raise NativeError if the native ``op`` cannot take tensors like this one."""
    reason = why_not(like)
    if reason:
        raise NativeError(f"{op}: impl='native': {reason}")


def choose(impl: str, torch_form: str, like: Tensor) -> str:
    """Return the name of the implementation that ``impl`` means for tensors like this one.

    ``"auto"`` is the native one where it is built and takes such tensors. What is being compiled,
    traced or exported gets the torch form, made of operations that every backend knows; so do
    subclasses of Tensor.
    """
    if impl != "auto":
        return impl
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(like) is not Tensor:
        return torch_form
    return torch_form if why_not(like) else "native"


def _after_fork() -> None:
    if isinstance(_found, Library):
        _found.run_alone()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
