"""Frozen dataclasses as configuration: to JSON, from JSON, and changed by ``a.b=value``."""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from rwkv_core.errors import ConfigError, did_you_mean

__all__ = ["from_dict", "override", "to_dict"]

C = TypeVar("C")


def to_dict(config: Any) -> dict[str, Any]:
    """Return the JSON-serialisable form of a configuration dataclass."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Build a configuration dataclass from plain values.

    Raises:
        ConfigError: an unknown key (the nearest field is named), a missing one, or a value of the
            wrong type.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected an object, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            raise ConfigError(f"unknown field '{where}{name}'; {did_you_mean(name, fields)}")
    try:
        return cls(**{n: _coerce(hints[n], v, f"{where}{n}") for n, v in values.items()})
    except TypeError as error:  # a required field is missing
        raise ConfigError(f"{where or cls.__name__}: {error}") from error


def override(config: C, assignment: str) -> C:
    """Return a copy of ``config`` changed by one ``"a.b=value"``.

    The value is read as the field's annotation says; fields of type ``dict`` take any JSON value.

    Raises:
        ConfigError: no ``=``, an unknown field, or a value that does not fit the field's type.
    """
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ConfigError(f"expected a.b=value, got {assignment!r}")
    return _set(config, path.strip().split("."), text.strip(), "")


def _set(config: Any, path: list[str], text: str, where: str) -> Any:
    name, rest = path[0], path[1:]
    full = f"{where}{name}"
    if isinstance(config, dict):
        inner = config.get(name, {})
        return {**config, name: _set(inner, rest, text, f"{full}.") if rest else _parse(text)}
    known = [f.name for f in dataclasses.fields(config)] if dataclasses.is_dataclass(config) else []
    if name not in known:
        raise ConfigError(f"unknown field '{full}'; {did_you_mean(name, known)}")
    if rest:
        value = _set(getattr(config, name), rest, text, f"{full}.")
    else:
        value = _coerce(typing.get_type_hints(type(config))[name], _parse(text), full)
    return dataclasses.replace(config, **{name: value})


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None if text == "None" else text


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotation says, or raise ConfigError naming the field."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = [a for a in args if a is not type(None)]
        return _coerce(hint, value, where)
    if dataclasses.is_dataclass(hint):
        if isinstance(value, Mapping):
            return from_dict(typing.cast(type, hint), value, f"{where}.")
        if isinstance(value, typing.cast(type, hint)):
            return value
    elif origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_coerce(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint is str and value is not None and not isinstance(value, (dict, list)):
        return value if isinstance(value, str) else str(value)
    elif isinstance(value, bool) is (hint is bool) and isinstance(value, origin or hint):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise ConfigError(f"field '{where}' expects {expected}, got {value!r}")
