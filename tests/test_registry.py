"""Names: lazy, unique, suggested when mistyped, and brought by plugins."""

import re
import sys
from pathlib import Path

import pytest

from rwkv_core.errors import RWKVError, UnknownNameError
from rwkv_core.registry import ADAPTERS, MIXERS, RECIPES, Registry


@pytest.fixture
def registry():
    return Registry("thing", "rwkv_toolkit.test_group_without_members")


def test_decorator_and_direct_and_lazy_forms(registry):
    @registry.register("decorated")
    def thing():
        return 1

    registry.register("direct", "a string is lazy:not this")
    registry.register("lazy", "math:tau")
    assert registry["decorated"] is thing
    assert list(registry) == ["decorated", "direct", "lazy"]
    assert abs(registry["lazy"] - 6.283) < 1e-3


def test_listing_and_membership_import_nothing(registry):
    registry.register("lazy", "a_module_that_does_not_exist:attr")
    assert "lazy" in registry
    assert len(registry) == 1
    assert list(registry) == ["lazy"]
    assert registry.origin("lazy") == "a_module_that_does_not_exist:attr"


def test_a_taken_name_names_the_earlier_origin(registry):
    registry.register("x", "first:thing")
    with pytest.raises(ValueError, match=r"'x' is already registered by first:thing; second:thing"):
        registry.register("x", "second:thing")
    registry.register("x", "first:thing")


def test_unknown_names_list_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown recipe 'pydok'; did you mean 'pydoc'"):
        RECIPES["pydok"]
    with pytest.raises(UnknownNameError, match=r"unknown domain 'zzz'; known: .*text"):
        ADAPTERS["zzz"]
    assert {"rwkv7", "none"} <= set(MIXERS)


def test_the_readmes_table_has_a_row_for_every_mixer():
    page = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| yes \| yes \| yes \|$", page, re.M)
    assert sorted(rows) == list(MIXERS)


def test_a_plugin_that_fails_on_import_hurts_only_who_asks_for_it(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no licence found')\n")
    info = tmp_path / "broken_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[rwkv_toolkit.adapters]\nbroken = broken_plugin:x\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("domain", "rwkv_toolkit.adapters")
    assert {"broken", "text"} <= set(registry)
    assert "broken_plugin" not in sys.modules
    assert registry["text"].Config
    with pytest.raises(RWKVError, match=r"'broken' .*failed to import: RuntimeError: no licence"):
        registry["broken"]
