"""Configuration: round trips, typed overrides, errors that name the field."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from rwkv_core.config import from_dict, override, to_dict
from rwkv_core.errors import ConfigError
from rwkv_core.train import TrainConfig, TrainSettings
from rwkv_text.recipes import text


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = Inner()
    name: str = "a"
    on: bool = False
    count: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


def test_round_trip():
    config = Outer(inner=Inner(rate=2, sizes=(3,)), options={"head_dim": 8}, count=4)
    assert from_dict(Outer, to_dict(config)) == config
    assert TrainConfig.from_dict(text().to_dict()) == text()


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("inner.rate=3e-4", "inner.rate", 3e-4),
        ("inner.rate=2", "inner.rate", 2.0),
        ("inner.sizes=[4, 5]", "inner.sizes", (4, 5)),
        ("name=123", "name", "123"),
        ("on=true", "on", True),
        ("count=7", "count", 7),
        ("count=None", "count", None),
        ("options.head_dim=32", "options", {"head_dim": 32}),
        ("options.deep.er=1", "options", {"deep": {"er": 1}}),
    ],
)
def test_override(assignment, path, value):
    got = override(Outer(count=1), assignment)
    for name in path.split("."):
        got = getattr(got, name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("inner.rat=1", "unknown field 'inner.rat'; did you mean 'rate'"),
        ("inner.rate.x=1", "unknown field 'inner.rate.x'"),
        ("inner.rate=fast", "'inner.rate' expects float, got 'fast'"),
        ("on=1", "'on' expects bool, got 1"),
        ("count=true", "'count' expects int, got True"),
        ("count=1.5", "'count' expects int, got 1.5"),
        ("inner=3", "'inner' expects Inner, got 3"),
        ("name", "expected a.b=value, got 'name'"),
    ],
)
def test_override_refuses(assignment, message):
    with pytest.raises(ConfigError, match=message):
        override(Outer(), assignment)


def test_unknown_and_missing_fields_are_named():
    with pytest.raises(ConfigError, match=r"unknown field 'train.lrr'; did you mean 'lr'"):
        TrainConfig.from_dict({**text().to_dict(), "train": {"lrr": 1}})
    with pytest.raises(ConfigError, match=r"unknown field 'trane'; did you mean 'train'"):
        TrainConfig.from_dict({**text().to_dict(), "trane": {}})
    with pytest.raises(ConfigError, match=r"missing: \['task', 'train'\]"):
        TrainConfig.from_dict({"adapter": "text"})
    with pytest.raises(ConfigError, match="expected an object, got 3"):
        from_dict(Outer, 3)


def test_values_that_cannot_work_are_refused():
    with pytest.raises(ConfigError, match=r"train.steps must be positive, got 0"):
        TrainSettings(steps=0)
