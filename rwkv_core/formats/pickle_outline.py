"""What a ``.pth`` pickle describes, found without unpickling: no object is made, no code is run.

The instructions are walked one by one, with tuples, strings and plain records in place of objects.
Whatever is not a dictionary of tensors ends in an error that names it, and so does a number that
does not fit the file. Only then is torch's own reader let near the file.
"""

import io
import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from rwkv_core.errors import CheckpointError
from rwkv_core.formats.weights import MAX_TENSORS

__all__ = ["Storage", "TensorOutline", "outline"]

STORAGES = {
    f"torch {name}Storage": dtype
    for name, dtype in {
        "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Double": torch.float64, "Long": torch.int64, "Int": torch.int32, "Short": torch.int16,
        "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool,
    }.items()
}  # fmt: skip
MAPPING = "collections OrderedDict"
TENSOR, PARAMETER = "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter"
GLOBALS = {*STORAGES, MAPPING, TENSOR, PARAMETER}
MAX_AXES = 8
NESTED = ("model", "module", "state_dict")  # where trainers put the weights of a larger record


class Storage(NamedTuple):
    """A run of ``numel`` values, stored in the archive under ``data/key``."""

    dtype: torch.dtype
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of the run."""
        return self.numel * self.dtype.itemsize


class TensorOutline(NamedTuple):
    """A tensor as a view of a storage, checked to lie within it."""

    storage: Storage
    size: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's own values."""
        return math.prod(self.size) * self.storage.dtype.itemsize


class _Global(NamedTuple):
    name: str


@dataclass
class _Mapping:
    items: dict[str, Any] = field(default_factory=dict)


class _Fault(Exception):
    """Something that a file of weights has no use for."""


_MARK = object()


def outline(pickle: bytes, source: str) -> tuple[dict[str, TensorOutline], tuple[str, ...]]:
    """Return the tensors that a pickle of protocol 2 describes, and the keys they are nested in.

    Raises:
        CheckpointError: anything but a dictionary of tensors, flat or below ``model``, ``module``
            or ``state_dict``; a tensor that does not fit its storage.
    """
    at = -1
    machine = _Machine()
    try:
        for opcode, argument, position in pickletools.genops(io.BytesIO(pickle)):
            at = position or 0
            machine.run(opcode.name, argument)
        return _tensors(machine.result)
    except _Fault as fault:
        raise CheckpointError(
            f"{source} is not a plain dictionary of tensors: at byte {at} of its pickle {fault}; "
            "save model.state_dict() and nothing else"
        ) from None
    except Exception as error:  # genops and a stack that runs empty raise many kinds
        raise CheckpointError(
            f"{source}: its pickle is damaged after byte {at}: {type(error).__name__}: {error}"
        ) from error


class _Machine:
    """The stack machine of a pickle, reduced to what torch.save writes for tensors."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.n_tensors = 0
        self.result: Any = None

    def run(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"):
            self.stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            if self.stack[-1] is _MARK:
                raise _Fault("a mark is memorised")
            self.memo[argument] = self.stack[-1]
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise _Fault(f"stands the instruction {name}")

    def protocol(self, version: int) -> None:
        if version != 2:
            raise _Fault(f"begins pickle protocol {version}, expected 2, torch.save's own")

    def named(self, name: str) -> None:
        if name not in GLOBALS:
            raise _Fault(f"it asks for {name.replace(' ', '.')}")
        self.stack.append(_Global(name))

    def since_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise _Fault("a mark is missing")
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def pops(self, count: int) -> list[Any]:
        items = self.stack[-count:]
        if len(items) < count or any(item is _MARK for item in items):
            raise _Fault("the stack runs empty")
        del self.stack[-count:]
        return items

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, _Mapping) or len(items) % 2:
            raise _Fault("items are set on what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # whole numbers are keys of optimiser states beside the weights
            if type(key) not in (str, int):
                raise _Fault(f"a key is a {type(key).__name__}")
            if str(key) in target.items:
                raise _Fault(f"the key {str(key)[:80]!r} comes twice")
            target.items[str(key)] = value

    def add_items(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Fault("items are appended to what is no list")
        self.stack[-1].extend(items)

    def build(self) -> None:
        """Pass over the one attribute that a module's state has, versions of its layers."""
        (state,) = self.pops(1)
        plain = isinstance(state, _Mapping) and state.items.keys() <= {"_metadata"}
        if not plain or not isinstance(self.stack[-1], _Mapping):
            raise _Fault("unknown attributes are set")

    def storage(self) -> None:
        (pid,) = self.pops(1)
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage":
            raise _Fault("a storage is malformed")
        _, kind, key, location, numel = pid
        if not isinstance(kind, _Global) or kind.name not in STORAGES:
            raise _Fault("a storage is of no known type")
        if not isinstance(key, str) or not isinstance(location, str) or location == "meta":
            raise _Fault("a storage has no place in the file")
        storage = Storage(STORAGES[kind.name], key, _whole(numel, "the length of a storage"))
        if self.storages.setdefault(key, storage) != storage:
            raise _Fault(f"the storage {key[:80]!r} is described in two ways")
        self.stack.append(storage)

    def reduce(self) -> None:
        function, arguments = self.pops(2)
        if not isinstance(function, _Global) or type(arguments) is not tuple:
            raise _Fault("something unknown is called")
        if function.name == MAPPING and not arguments:
            self.stack.append(_Mapping())
        elif function.name == TENSOR and len(arguments) == 6:
            self.n_tensors += 1
            if self.n_tensors > MAX_TENSORS:
                raise _Fault(f"it makes more than {MAX_TENSORS} tensors")
            self.stack.append(_tensor(*arguments))
        elif function.name == PARAMETER and len(arguments) == 3:
            tensor, _, hooks = arguments
            if not isinstance(tensor, TensorOutline) or hooks != _Mapping():
                raise _Fault("a parameter is malformed")
            self.stack.append(tensor)
        else:
            what = function.name.replace(" ", ".")
            raise _Fault(f"{what} is called with {len(arguments)} arguments")

    def stop(self) -> None:
        if len(self.stack) != 1 or self.result is not None:
            raise _Fault("the pickle ends with more or less than one object")
        (self.result,) = self.pops(1)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, requires_grad: Any, hooks: Any
) -> TensorOutline:
    if not isinstance(storage, Storage) or hooks != _Mapping() or type(requires_grad) is not bool:
        raise _Fault("a tensor is malformed")
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise _Fault("a tensor has no shape")
    if len(size) > MAX_AXES:
        raise _Fault(f"a tensor has {len(size)} axes")
    offset = _whole(offset, "the offset of a tensor")
    size = tuple(_whole(n, "a size of a tensor") for n in size)
    stride = tuple(_whole(n, "a stride of a tensor") for n in stride)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage.numel:
        raise _Fault(
            f"a tensor of shape {list(size)} reaches value {last} of a storage of {storage.numel}"
        )
    if offset > storage.numel:
        raise _Fault(f"a tensor begins at value {offset} of a storage of {storage.numel}")
    return TensorOutline(storage, size)


def _whole(value: Any, what: str) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        shown = value if type(value) is float or type(value) is int else type(value).__name__
        raise _Fault(f"{what} is {str(shown)[:40]}")
    return value


def _tensors(result: Any) -> tuple[dict[str, TensorOutline], tuple[str, ...]]:
    path: tuple[str, ...] = ()
    while isinstance(result, _Mapping) and len(path) < 2:
        inner = [n for n in NESTED if isinstance(result.items.get(n), _Mapping)]
        if len(inner) != 1:
            break
        path, result = (*path, inner[0]), result.items[inner[0]]
    if not isinstance(result, _Mapping):
        raise _Fault("ends an object that is no dictionary")
    for name, value in result.items.items():
        if not isinstance(value, TensorOutline):
            raise _Fault(f"ends a dictionary whose {name[:80]!r} is no tensor")
    return result.items, path


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False, "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list, "EMPTY_DICT": _Mapping, "MARK": lambda: _MARK,
}  # fmt: skip
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.protocol,
    "GLOBAL": _Machine.named,
    "TUPLE": lambda m, _: m.stack.append(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.stack.append(tuple(m.pops(1))),
    "TUPLE2": lambda m, _: m.stack.append(tuple(m.pops(2))),
    "TUPLE3": lambda m, _: m.stack.append(tuple(m.pops(3))),
    "SETITEM": lambda m, _: m.set_items(m.pops(2)),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    "APPEND": lambda m, _: m.add_items(m.pops(1)),
    "APPENDS": lambda m, _: m.add_items(m.since_mark()),
    "BUILD": lambda m, _: m.build(),
    "BINPERSID": lambda m, _: m.storage(),
    "REDUCE": lambda m, _: m.reduce(),
    "STOP": lambda m, _: m.stop(),
}
