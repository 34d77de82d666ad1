"""Names for mixers, domain adapters and recipes, ours and anybody's, found without importing."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar, cast

from rwkv_core.errors import RWKVError, UnknownNameError, did_you_mean

__all__ = ["ADAPTERS", "MIXERS", "RECIPES", "Registry"]

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to objects that may live in modules not imported yet.

    Args:
        kind: what the names stand for, as error messages call it.
        group: entry-point group; a distribution that declares ``name = "module:attr"`` in it is
            listed without being imported, and imported when the name is asked for.
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._entries: dict[str, T | str] = {}
        self._origin: dict[str, str] = {}
        self._scanned = False

    def register(self, name: str, entry: T | str | None = None) -> Callable[[T], T]:
        """Register an object or a lazy ``"module:attr"``; without either, act as a decorator.

        Raises:
            ValueError: the name is taken; the message names the earlier origin.
        """

        def add(entry: T | str) -> Any:
            origin = entry if isinstance(entry, str) else getattr(entry, "__module__", repr(entry))
            if name in self._entries and self._origin[name] != origin:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {self._origin[name]}; "
                    f"{origin} must choose another name"
                )
            self._entries[name], self._origin[name] = entry, str(origin)
            return entry

        return add if entry is None else add(entry)

    def origin(self, name: str) -> str:
        """Return where a name comes from, as ``module:attr`` or module."""
        self._scan()
        return self._origin[name]

    def __getitem__(self, name: str) -> T:
        if name not in self:
            known = ", ".join(self)
            raise UnknownNameError(
                f"unknown {self.kind} {name!r}; {did_you_mean(name, self)} (registered: {known})"
            )
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attr = entry.partition(":")
            try:
                entry = cast(T, getattr(importlib.import_module(module), attr))
            except Exception as error:
                raise RWKVError(
                    f"{self.kind} {name!r} ({entry}) failed to import: "
                    f"{type(error).__name__}: {error}"
                ) from error
            self._entries[name] = entry
        return entry

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._scan()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._scan()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._scan()
        return len(self._entries)

    def _scan(self) -> None:
        if self._scanned:
            return
        self._scanned = True
        for point in entry_points(group=self.group):
            self.register(point.name, point.value)


MIXERS: Registry[Any] = Registry("mixer", "rwkv_toolkit.mixers")
ADAPTERS: Registry[Any] = Registry("domain", "rwkv_toolkit.adapters")
RECIPES: Registry[Any] = Registry("recipe", "rwkv_toolkit.recipes")

MIXERS.register("rwkv4", "rwkv_core.mixers.rwkv4:RWKV4")
MIXERS.register("rwkv5", "rwkv_core.mixers.rwkv5:RWKV5")
MIXERS.register("rwkv6", "rwkv_core.mixers.rwkv6:RWKV6")
MIXERS.register("rwkv7", "rwkv_core.mixers.rwkv7:RWKV7")
MIXERS.register("none", "rwkv_core.mixers.none:NONE")
