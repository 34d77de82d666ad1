"""The races of benchmarks/: the harness on toy contestants, and every script's --help.

No test here looks at a time; what a race measures is for its reader.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(p.stem for p in FOLDER.glob("*.py") if "def main()" in p.read_text())


@pytest.fixture(autouse=True)
def _beside_the_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let them import each other, as they do when run by their path."""
    monkeypatch.syspath_prepend(FOLDER)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and (FOLDER / f"{name}.py").is_file():
            del sys.modules[name]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def race() -> ModuleType:
    return script("race")


def test_make_bench_runs_every_script() -> None:
    listed = re.search(r"^RACES \?= (.+)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert sorted(listed) == SCRIPTS


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_help(name, monkeypatch, capsys):
    text = (FOLDER / f"{name}.py").read_text()
    if "parse_args()" not in text:
        pytest.skip("takes no arguments")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script(name).main()
    printed = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert script(name).__doc__.splitlines()[0] in printed
    assert "--quick" in printed


def test_contestants_take_turns_and_their_own_times_are_kept(race):
    order = []
    clock = itertools.accumulate([0, 1, 0, 10, 0, 3, 0, 30, 0, 2, 0, 20])  # a: 1 3 2, b: 10 30 20
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = race.interleave(runs, 3, warm_up=False, clock=lambda: float(next(clock)))
    assert order == list("ababab")
    assert times == {"a": race.Timing(2, 1, 3), "b": race.Timing(20, 10, 3)}


def test_warming_up_is_not_timed(race):
    seen = []
    clock = itertools.count()
    times = race.interleave({"a": lambda: seen.append(0)}, 2, clock=lambda: float(next(clock)))
    assert len(seen) == 3
    assert times["a"] == race.Timing(1, 1, 2)


def test_a_missing_peer_is_a_gap_with_a_reason_and_a_wrong_one_is_disqualified(race):
    def absent() -> None:
        race.installed("no-such-package-anywhere", "pip install it")

    def wrong() -> None:
        race.compare(0.5, 1e-3)

    present, missing = race.line_up({"here": lambda: 7, "absent": absent, "wrong": wrong})
    assert present == {"here": 7}
    assert missing[0] == {"name": "absent", "gap": "not installed: pip install it"}
    assert missing[1]["name"] == "wrong"
    assert "5.0e-01" in missing[1]["disqualified"]


def test_a_gap_is_no_error_and_a_disqualification_is_one(race):
    race.finish([{"name": "a"}, {"name": "b", "gap": "not installed"}])
    with pytest.raises(SystemExit, match="a, c"):
        race.finish([{"name": n, "disqualified": "differs"} for n in "ac"])


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), 2e-3])
def test_answers_that_are_no_numbers_are_disqualified(race, worst):
    with pytest.raises(race.Disqualified):
        race.compare(worst, 1e-3)
    assert race.compare(1e-3, 1e-3) == 1e-3


def test_the_table_is_aligned_and_shows_gaps(race):
    rows = [
        {"name": "ours", "tok/s": 12.34, "more": 1},
        {"name": "a longer name", "gap": "not installed"},
        {"name": "peer", "tok/s": 1234.5},
    ]
    assert race.table(rows, {"tok/s": ".1f", "more": "d"}).splitlines() == [
        "                tok/s  more",
        "ours             12.3     1",
        "a longer name  not installed",
        "peer           1234.5",
    ]


def test_a_race_leaves_rows_machine_and_versions(race, tmp_path, capsys):
    rows = [{"name": "ours", "time": race.Timing(2.0, 1.0, 3)}, {"name": "b", "gap": "why"}]
    path = race.write("toy", rows, {"rounds": 3}, tmp_path / "new")
    found = json.loads(path.read_text())
    assert found["race"] == "toy"
    assert found["settings"] == {"rounds": 3}
    assert found["rows"][0]["time"] == {"median": 2.0, "minimum": 1.0, "rounds": 3}
    assert found["rows"][1] == rows[1]
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"].keys() >= {"python", *race.PACKAGES}
    assert found["machine"].keys() >= {"date", "cpu", "flags", "cores", "load", "native ops"}
    assert found["machine"]["threads"] == 1


def test_the_plot_is_written_or_its_absence_said(race, tmp_path, capsys, monkeypatch):
    rows = [{"name": "ours", "tok/s": 2.0}, {"name": "b", "gap": "why"}]
    path = race.plot("toy", race.bars(rows, ["tok/s"]), tmp_path)
    if importlib.util.find_spec("matplotlib"):
        assert path.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert race.plot("toy", race.bars(rows, ["tok/s"]), tmp_path) is None
    assert "pip install matplotlib" in capsys.readouterr().out


def test_the_equal_gpt_is_equal_in_size_and_causal():
    gpt, training = script("gpt"), script("training")
    sizes = [sum(p.numel() for p in make(4096).parameters()) for make in training.MODELS.values()]
    assert max(sizes) / min(sizes) < 1.05
    model = gpt.GPT(50, 128, 2, context=16)
    tokens = torch.randint(50, (2, 16))
    logits = model(tokens)
    tokens[:, 9] = (tokens[:, 9] + 1) % 50
    same = torch.isclose(logits, model(tokens), atol=1e-6).all(-1).all(0)
    assert same.tolist() == [True] * 9 + [False] * 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_engine_answers_as_the_model_does(tmp_path, dtype):
    from rwkv_text import TextConfig, load

    engines = script("engines")
    engines.write(TextConfig(dim=64, depth=2, vocab_size=50), tmp_path)
    tokens = np.random.default_rng(0).integers(1, 50, 20).tolist()
    with torch.inference_mode():
        expected = load(tmp_path / engines.MODEL)(torch.tensor([tokens])).logits_BTV[0].numpy()
    read = engines.ours(tmp_path, dtype)
    bound = 1e-5 if dtype == torch.float32 else 0.2
    for again in range(2):  # what was read before a fresh start is forgotten
        found = [read([t], i == 0) for i, t in enumerate(tokens[:7])]
        found.append(read(tokens[7:], False))
        assert np.abs(np.stack(found) - expected[[*range(7), 19]]).max() < bound, again
