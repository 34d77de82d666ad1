"""benchmarks/cifar10.py: its models differ in what their names say, its runs resume exactly."""

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PICTURE = (3, 16, 12)


@pytest.fixture(scope="module")
def study() -> Iterator[ModuleType]:
    before = set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("cifar10", FOLDER / "cifar10.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["cifar10"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and (FOLDER / f"{name}.py").is_file():
            del sys.modules[name]


def moved(net: torch.nn.Module) -> np.ndarray:
    """Return which tokens of the first layer's recurrence feel each of them [T, T]."""
    att = net.blocks[0].att
    k = torch.randn(1, 4, 3, 32)
    v = torch.randn(1, 4, 3, 32, requires_grad=True)
    y = att.recur(k, v).flatten(1, 2)
    rows = [torch.autograd.grad(y[0, t].sum(), v, retain_graph=True)[0] for t in range(12)]
    return np.stack([(row.flatten(1, 2)[0].abs().sum(-1) > 0).numpy() for row in rows])


def test_models_are_what_their_names_say(study: ModuleType) -> None:
    sees = {name: moved(study.make(name, PICTURE)) for name in ("causal, Q-Shift", "none")}
    assert np.array_equal(sees["causal, Q-Shift"], np.tri(12, dtype=bool))
    assert np.array_equal(sees["none"], np.eye(12, dtype=bool))
    for name in ("both ways, no shift", *study.SCANS):
        assert moved(study.make(name, PICTURE)).all(), name

    x = torch.randn(1, 4, 3, 32)
    shifted = {name: study.make(f"causal, {name}", PICTURE) for name in ("no shift", "previous")}
    for net in shifted.values():
        assert all(type(b.att.shift) is type(b.ffn.shift) for b in net.blocks)
    assert torch.equal(shifted["no shift"].blocks[1].att.shift(x), x)
    previous = shifted["previous"].blocks[1].ffn.shift(x).flatten(1, 2)
    assert torch.equal(previous[:, 1:], x.flatten(1, 2)[:, :-1])
    assert not previous[:, 0].any()
    own_32 = torch.rand(32)
    (mixed,) = shifted["previous"].blocks[1].ffn.shift.mix(x, own_32[None])
    expected = x.flatten(1, 2) * own_32 + previous * (1 - own_32)
    torch.testing.assert_close(mixed.flatten(1, 2), expected)


def test_every_contestant_learns(study: ModuleType) -> None:
    models = (*study.SAID, *study.ABLATION)
    for model in models:
        net = study.make(model, PICTURE)
        net(torch.randn(2, *PICTURE)).logsumexp(-1).sum().backward()
        idle = [name for name, p in net.named_parameters() if p.grad is None]
        # without a recurrence, keys and decays have nothing to do
        assert all(model == "none" and re.search("att.key|spatial|mix_k", n) for n in idle), idle


def test_parts_start_as_the_whole_does(study: ModuleType, monkeypatch) -> None:
    rows = importlib.import_module("rwkv_vision.scan").RowScan
    monkeypatch.setitem(study.SCANS, "rows", (rows, rows))
    nets = []
    for name in ("rows", study.OURS, "zigzag"):
        torch.manual_seed(0)
        nets.append(study.make(name, PICTURE).eval())
    x = torch.randn(2, *PICTURE)
    torch.testing.assert_close(nets[0](x), nets[1](x))
    assert not torch.allclose(nets[2](x), nets[1](x))


def test_contestants_are_of_one_size(study: ModuleType) -> None:
    sizes = {
        name: sum(p.numel() for p in study.make(name, (3, 32, 32)).parameters())
        for name in (study.OURS, "vit", "vit, mean", "vit, fan-in")
    }
    assert max(sizes.values()) / min(sizes.values()) < 1.01
    assert sizes[study.OURS] == 45_066


def test_augmentation_crops_and_mirrors_whole_pictures(study: ModuleType) -> None:
    images = torch.arange(1, 193, dtype=torch.uint8).view(1, 1, 16, 12).repeat(200, 3, 1, 1)
    found = study.augment(images, np.random.default_rng(0), mirror=True)
    assert found.shape == images.shape
    padded = torch.nn.functional.pad(images[0, 0], (2, 2, 2, 2))
    crops = {
        tuple(side[i : i + 16, j : j + 12].flatten().tolist())
        for side in (padded, padded.flip(1))
        for i in range(5)
        for j in range(5)
    }
    assert {tuple(image[0].flatten().tolist()) for image in found} <= crops
    assert len({tuple(image[0].flatten().tolist()) for image in found}) > 40
    assert torch.equal(found[:, 0], found[:, 2])
    never = study.augment(images, np.random.default_rng(0), mirror=False)
    first_rows = never[:, 0].diff(dim=2)
    assert (first_rows[first_rows != 0] == 1).float().mean() > 0.8  # left to right throughout


def test_an_interrupted_run_goes_on_exactly_and_a_finished_one_rests(
    study: ModuleType, paint: Callable[..., Path], tmp_path: Path, monkeypatch
) -> None:
    for part, n in (("train", 12), ("test", 4)):
        paint(tmp_path / "data" / part, n)
    monkeypatch.setattr(study, "BATCH", 8)
    monkeypatch.setattr(study, "read", small(study.read))
    run = study.Run("cifar10", "vrwkv", 2, 0, 1e-3)
    whole = study.Study(tmp_path / "whole", None)
    whole.finish(run, tmp_path / "data")

    parted = study.Study(tmp_path / "parted", None)
    save, saved = torch.save, []

    def once(*args: object) -> None:
        save(*args)
        saved.append(args)
        monkeypatch.setattr(torch, "save", save)

    monkeypatch.setattr(torch, "save", once)
    replace = study.os.replace

    def then_stop(*args: object) -> None:
        replace(*args)
        monkeypatch.setattr(study.os, "replace", replace)
        raise KeyboardInterrupt

    monkeypatch.setattr(study.os, "replace", then_stop)
    with pytest.raises(KeyboardInterrupt):
        parted.finish(run, tmp_path / "data")
    assert parted.rows == []
    assert len(saved) == 1
    parted.finish(run, tmp_path / "data")
    kept = ("name", "accuracy", "losses", "parameters", "lr")
    assert {k: parted.rows[0][k] for k in kept} == {k: whole.rows[0][k] for k in kept}

    again = study.Study(tmp_path / "parted", None)
    assert again.rows == parted.rows
    again.train = None
    again.finish(run, tmp_path / "data")
    held_out = dataclasses.replace(run, held_out=True)
    assert held_out.name != run.name
    images, _, judged, _ = whole.split(held_out, tmp_path / "data")
    assert (len(images), len(judged)) == (33, 3)
    shown = {image.numpy().tobytes() for image in images}
    assert not shown & {image.numpy().tobytes() for image in judged}


def small(read: Callable) -> Callable:
    def cut(config: object, n: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = read(config, n)
        return images[:, :, :8, :8], targets

    return cut


def rows() -> list[dict]:
    one = {"data": "cifar10", "held_out": False, "parameters": 45066, "seconds": 100.0}
    return [
        {**one, "model": "vrwkv", "epochs": 10, "seed": 0, "lr": 0.008, "accuracy": 0.60},
        {**one, "model": "vrwkv", "epochs": 10, "seed": 1, "lr": 0.008, "accuracy": 0.62},
        {**one, "model": "vit, mean", "epochs": 10, "seed": 0, "lr": 0.002, "accuracy": 0.5},
        {**one, "model": "zigzag", "epochs": 5, "seed": 0, "lr": 0.008, "accuracy": 0.55},
        {**one, "model": "vrwkv", "epochs": 2, "seed": 0, "lr": 0.008, "accuracy": 0.45,
         "held_out": True},
        {**one, "model": "vrwkv", "epochs": 2, "seed": 0, "lr": 0.004, "accuracy": 0.4,
         "held_out": True},
    ]  # fmt: skip


def test_tables_hold_mean_and_deviation_over_seeds(study: ModuleType, tmp_path: Path) -> None:
    found = study.summary(rows())
    assert [(r["model"], r["epochs"], r["seeds"]) for r in found] == [
        ("zigzag", 5, 1), ("vrwkv", 10, 2), ("vit, mean", 10, 1),
    ]  # fmt: skip
    assert found[1]["%"] == pytest.approx(61)
    assert found[1]["±"] == pytest.approx(2**0.5)
    page = study.filled(f"above {study.MARKS[0]} old {study.MARKS[1]} below", rows())
    assert page.startswith("above <!--")
    assert page.endswith("--> below")
    assert "old" not in page
    assert "| VRWKV | 45,066 | 0.008 | 10 | 61.0 ± 1.4 % (2 seeds) |  |  |" in page
    assert "| VRWKV, zigzag | 0.008 | 55.0 % (1 seed) |" in page
    assert "| VRWKV | 40.0 at 0.004, 45.0 at 0.008 |" in page
    assert study.filled(page, rows()) == page
    with pytest.raises(SystemExit, match="no place for the tables"):
        study.filled("a page without marks", rows())

    path = tmp_path / "runs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    chosen = study.Study(tmp_path, None)
    assert chosen.best_rate("vrwkv") == 0.008


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        ([0.001, 0.002, 0.004], [0.001, 0.002, 0.004, 0.008, 0.016]),
        ([0.008], [0.004, 0.008, 0.016]),
        ([0.032], [0.004, 0.008, 0.016, 0.032]),
    ],
)
def test_the_sweep_goes_on_until_the_best_rate_has_worse_neighbours(
    study, tmp_path, start, expected
) -> None:
    found = study.Study(tmp_path, None)
    for run in study.sweep(found, "vrwkv", start):
        score = 1 - abs(np.log2(run.lr / 0.008))
        if run.lr not in [row["lr"] for row in found.rows]:
            found.rows.append({**dataclasses.asdict(run), "accuracy": score})
    assert sorted(row["lr"] for row in found.rows) == expected
    assert found.best_rate("vrwkv") == 0.008


def test_the_plan_holds_every_comparison_over_three_seeds(study, tmp_path) -> None:
    found = study.Study(tmp_path, None)
    liked = {"vrwkv": 0.6, "vit, fan-in": 0.5}
    for run in study.plan(found, ["cifar10", "mnist"]):
        score = liked.get(run.model, 0.3) - abs(np.log2(run.lr / 0.004)) / 100
        if run.name not in [row["name"] for row in found.rows]:
            row = {"name": run.name, "accuracy": score, "parameters": 1, "seconds": 1.0}
            found.rows.append({**dataclasses.asdict(run), **row})
    assert found.best_vit() == "vit, fan-in"
    counted = {(r["data"], r["epochs"], r["model"]): r["seeds"] for r in study.summary(found.rows)}
    assert set(counted.values()) == {3}
    wholes = {m for d, e, m in counted if (d, e) == ("cifar10", 10)}
    assert wholes == {"vrwkv", "vit, fan-in", "vrwkv6", "vrwkv7", "causal, Q-Shift"}
    assert {m for d, e, m in counted if e == 30 or d == "mnist"} == {"vrwkv", "vit, fan-in"}
    parts = {m for d, e, m in counted if e == 5}
    assert parts >= {*study.ABLATION, *study.SCANS, "vrwkv", "vrwkv_2d", "vrwkv, σ 0.02"}
    assert {row["lr"] for row in found.rows if not row["held_out"]} == {0.004}
