"""The classification domain: data in fixed parts, training, exact resume, fine-tuning."""

import dataclasses
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rwkv_export
import torch

from rwkv_core import checkpoint
from rwkv_core.cli import main
from rwkv_core.config import override
from rwkv_core.errors import CheckpointError, ConfigError, DataError, ExportError, TrainingError
from rwkv_core.registry import ADAPTERS, RECIPES
from rwkv_core.testing import check_adapter, perturb
from rwkv_core.train import TrainConfig, TrainSettings, evaluate, train
from rwkv_core.train.optim import optimizer
from rwkv_core.train.schedule import learning_rate
from rwkv_core.train.sinks import read_log
from rwkv_vision.baselines import nearest_neighbours
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.data import batches, eval_transform
from rwkv_vision.host import preprocess
from rwkv_vision.model import Classifier, load
from rwkv_vision.sources import labels_of, open_split, stratified

COLORS = ("blue", "green", "red")
SMALL = {"embed_dim": 16, "depth": 2, "patch_size": 4}
adapter = ADAPTERS["classify"]


def small(data: Path | str, **changes: object) -> ClassifyConfig:
    config = ClassifyConfig(
        model="test_vrwkv", model_options=SMALL, data=str(data), image_size=(12, 8), batch_size=4
    )
    return dataclasses.replace(config, **changes)


def test_fulfils_the_contract_of_a_domain() -> None:
    options = {"embed_dim": 16, "depth": 1, "patch_size": 4}
    config = dataclasses.replace(RECIPES["digits"]().task, model_options=options, batch_size=8)
    check_adapter("classify", config)


@pytest.mark.parametrize("name", ["cifar10", "classify", "digits", "imagenet", "mnist"])
def test_recipes_are_complete_configurations(name: str) -> None:
    config = RECIPES[name]()
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    doc = RECIPES[name].__doc__
    assert f"rwkv train {name}" in doc
    assert "2026-" in doc


# -- data


def test_split_is_stratified_fixed_and_without_overlap() -> None:
    targets = np.repeat([0, 1, 2], [50, 10, 2])
    rest, held_out = stratified(targets, 0.2, seed=0)
    assert np.bincount(targets[held_out]).tolist() == [10, 2, 1]
    assert not set(rest) & set(held_out)
    assert len(rest) + len(held_out) == 62
    assert np.array_equal(stratified(targets, 0.2, seed=0)[1], held_out)
    assert not np.array_equal(stratified(targets, 0.2, seed=1)[1], held_out)


def test_digits_are_split_before_anything_is_chosen() -> None:
    config = RECIPES["digits"]().task
    parts = {split: open_split(config, split) for split in ("train", "eval", "test")}
    assert {n: len(p.targets) for n, p in parts.items()} == {
        "train": 1295,
        "eval": 143,
        "test": 359,
    }
    names = [{p.name(i) for i in range(len(p.targets))} for p in parts.values()]
    assert len(set.union(*names)) == 1797
    assert min(np.bincount(parts["test"].targets)) >= 34


def test_folders_own_parts_are_used(paint: Callable[..., Path], tmp_path: Path) -> None:
    for part, n in (("train", 10), ("test", 3)):
        paint(tmp_path / part, n)
    config = small(tmp_path)
    assert labels_of(config) == ("blue", "green", "red")
    sizes = {s: len(open_split(config, s).targets) for s in ("train", "eval", "test")}
    assert sizes == {"train": 27, "eval": 3, "test": 9}
    paint(tmp_path / "val", 2)
    sizes = {s: len(open_split(config, s).targets) for s in ("train", "eval", "test")}
    assert sizes == {"train": 30, "eval": 6, "test": 9}


AUGMENTED = {
    "crop_scale": (0.3, 1.0), "hflip": 0.5, "color_jitter": 0.4, "erase": 0.5,
    "auto_augment": "rand-m9-mstd0.5-inc1", "mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1,
}  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("channels", [1, 3])
def test_batches_are_a_function_of_seed_and_step(colors: Path, channels: int, workers: int) -> None:
    config = small(colors, channels=channels, **AUGMENTED)
    stream = batches(config, "train", seed=3)
    first = [next(stream) for _ in range(6)]
    random.random(), np.random.rand(), torch.rand(1)
    resumed = batches(dataclasses.replace(config, workers=workers), "train", start=4, seed=3)
    for a, b in zip(first[4:], resumed, strict=False):
        assert torch.equal(a.images_BCHW, b.images_BCHW)
        assert torch.equal(a.targets, b.targets)
    assert first[0].images_BCHW.shape == (4, channels, 12, 8)
    assert first[0].targets.shape == (4, 3)
    torch.testing.assert_close(first[0].targets.sum(1), torch.ones(4))
    other = next(batches(config, "train", seed=4))
    assert not torch.equal(other.images_BCHW, first[0].images_BCHW)


def test_loading_leaves_everybody_elses_random_numbers_alone(colors: Path) -> None:
    states = random.getstate(), torch.get_rng_state()
    numbers = np.random.get_state()[1].copy()
    next(batches(small(colors, **AUGMENTED), "train"))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.array_equal(np.random.get_state()[1], numbers)


def test_an_epoch_shows_every_picture_once(colors: Path) -> None:
    config = small(colors, batch_size=3)
    n = len(open_split(config, "train").targets)
    assert n % 3 == 0
    stream = batches(config, "train")
    shown = [image.sum().item() for _ in range(n // 3) for image in next(stream).images_BCHW]
    assert len(set(shown)) == n


def test_host_sees_what_evaluation_sees(colors: Path) -> None:
    for changes in ({}, {"channels": 1}, {"interpolation": "bicubic", "mean": (0.4, 0.5, 0.6)}):
        config = small(colors, labels=("blue", "green", "red"), **changes)
        pictures = open_split(config, "test")
        metadata = Classifier(config).metadata()
        for i in range(len(pictures.targets)):
            expected = eval_transform(config)(pictures.load(i))
            np.testing.assert_array_equal(preprocess(pictures.load(i), metadata), expected)


# -- training


def test_learns_colours_resumes_exactly_and_predicts(colors: Path, tmp_path: Path) -> None:
    settings = TrainSettings(steps=40, lr=5e-3, warmup_steps=2, checkpoint_every=20, log_every=5)
    config = TrainConfig(adapter="classify", task=small(colors), train=settings)
    result = train(config, tmp_path / "run")
    assert evaluate(result.model, result.model.config, "test")["accuracy"] == 1.0
    assert result.model.config.labels == ("blue", "green", "red")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["task"]["labels"]

    shutil.rmtree(tmp_path / "run" / "step-0000040")
    resumed = train(
        TrainConfig.from_dict(json.loads((tmp_path / "run" / "run.json").read_text())),
        tmp_path / "run",
        resume=True,
    )
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name

    loaded = load(tmp_path / "run")
    paths = [colors / name / "0.png" for name in COLORS]
    predictions = loaded.predict(paths)
    assert [p.label for p in predictions] == list(COLORS)
    assert all(0.5 < p.confidence <= 1 for p in predictions)
    assert predictions[0].logits.shape == (3,)


@pytest.mark.parametrize(
    ("name", "schedule", "last"),
    # timm's step falls to a tenth twice, its poly is a tenth root
    [("lion", "cosine", 1e-3), ("sgd", "step", 1e-4), ("", "poly", 7.4e-3), ("adamw", "", 1e-3)],
)
def test_timms_optimisers_and_schedules_train_and_resume_exactly(
    colors: Path, tmp_path: Path, name: str, schedule: str, last: float
) -> None:
    settings = TrainSettings(
        steps=30, lr=1e-2, lr_final=1e-3, warmup_steps=2, checkpoint_every=15, log_every=1
    )
    task = small(colors, optimizer=name, schedule=schedule)
    config = TrainConfig(adapter="classify", task=task, train=settings)
    result = train(config, tmp_path / "run")
    rates = [row["lr"] for row in read_log(tmp_path / "run")]
    assert rates[0] == pytest.approx(1e-4, rel=0.01)
    assert max(rates) == pytest.approx(1e-2, rel=0.02)
    assert rates[-1] == pytest.approx(last, rel=0.05)
    shutil.rmtree(tmp_path / "run" / "step-0000030")
    resumed = train(result.config, tmp_path / "run", resume=True)
    for key, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[key]), key


def test_the_command_evaluates_and_draws(
    colors: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(colors, labels=COLORS)
    path = checkpoint.save(checkpoint.build("classify", config), tmp_path / "model")
    argv = ["eval", str(path), "--split", "test", "--pictures", str(tmp_path / "figures")]
    assert main(argv) == 0
    assert "accuracy" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "confusion.png",
        "predictions.png",
        "receptive.png",
    }


def test_unknown_optimisers_and_schedules_name_the_nearest(colors: Path, tmp_path: Path) -> None:
    for field, value, near in (("optimizer", "lionn", "lion"), ("schedule", "cosin", "cosine")):
        config = TrainConfig(adapter="classify", task=small(colors, **{field: value}))
        with pytest.raises(ConfigError, match=f"did you mean '{near}'"):
            train(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_averaged_labels_and_smoothing_give_the_expected_loss(colors: Path) -> None:
    config = small(colors, labels=("blue", "green", "red"), smoothing=0.3)
    model = checkpoint.build("classify", config)
    batch = next(batches(config, "train"))
    logp = model(batch.images_BCHW).log_softmax(1)
    hot = torch.nn.functional.one_hot(batch.targets, 3)
    for training, targets in ((True, 0.7 * hot + 0.1), (False, hot)):
        loss, sums = adapter.loss(model.train(training), batch, None)
        torch.testing.assert_close(loss, -(targets * logp).sum(1).mean())
        assert sums["pictures"] == 4
    mixed = batch._replace(targets=torch.tensor([[0.6, 0.4, 0.0]] * 4))
    loss, _ = adapter.loss(model.train(), mixed, None)
    torch.testing.assert_close(loss, -(mixed.targets * logp).sum(1).mean())
    figures = adapter.metrics(config, {"correct": 3.0, "nats": 2.0, "pictures": 4.0})
    assert figures == {"accuracy": 0.75, "loss": 0.5}


def test_running_mean_of_the_weights_answers_outside_of_training(
    colors: Path, tmp_path: Path
) -> None:
    settings = TrainSettings(steps=6, lr=1e-2, warmup_steps=0, checkpoint_every=3)
    config = TrainConfig(adapter="classify", task=small(colors, ema=0.5), train=settings)
    result = train(config, tmp_path / "run")
    model = load(tmp_path / "run")
    x = torch.randn(1, 3, 12, 8)
    assert torch.equal(model(x), model.averaged.module(x))
    assert not torch.equal(model.net(x), model(x))
    assert torch.equal(model.train()(x), model.net(x))

    # by hand: step n of m weighs decay^(m-1-n), and what the last step did is not yet in it
    torch.manual_seed(0)
    task = result.model.config
    again = checkpoint.build("classify", task).train()
    mean = {n: t.clone() for n, t in again.net.state_dict().items()}
    stream, optim = batches(task, "train"), optimizer(again, settings)
    assert {n for g in optim.param_groups for n in g["names"]} == {
        f"net.{n}" for n, _ in again.net.named_parameters()
    }
    for step in range(6):
        torch.manual_seed(step)
        mean = {n: 0.5 * m + 0.5 * again.net.state_dict()[n] for n, m in mean.items()}
        optim.zero_grad()
        adapter.loss(again, next(stream), None)[0].backward()
        torch.nn.utils.clip_grad_norm_(again.parameters(), settings.grad_clip)
        for group in optim.param_groups:
            group["lr"] = learning_rate(step, settings)
        optim.step()
    for name, tensor in model.averaged.module.state_dict().items():
        torch.testing.assert_close(tensor, mean[name], msg=name)

    shutil.rmtree(tmp_path / "run" / "step-0000006")
    train(dataclasses.replace(config, task=task), tmp_path / "run", resume=True)
    for name, tensor in load(tmp_path / "run").state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name]), name
    start = checkpoint.build("classify", small(colors, init_from=str(tmp_path / "run")))
    assert torch.equal(start.eval()(x), result.model(x))


def test_decay_out_of_range_stops_training_and_export(colors: Path, tmp_path: Path) -> None:
    config = small(colors, labels=("blue", "green", "red"))
    model = checkpoint.build("classify", config)
    batch = next(batches(config, "train"))
    with torch.no_grad():
        model.net.blocks[1].att.spatial_decay[0] = -70
    with pytest.raises(TrainingError, match="spatial mix of layer 1"):
        adapter.loss(model.train(), batch, None)
    with pytest.raises(ExportError, match="spatial mix of layer 1"):
        rwkv_export.export(model, tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_pixels_that_are_no_numbers_stop_training(
    colors: Path, tmp_path: Path, monkeypatch
) -> None:
    config = small(colors)

    def poisoned(config, split, *, start=0, seed=0):
        for batch in batches(config, split, start=start, seed=seed):
            batch.images_BCHW[0, 0, 0, 0] = float("nan")
            yield batch

    monkeypatch.setattr(type(adapter), "data", lambda self, *a, **k: poisoned(*a, **k))
    settings = TrainSettings(steps=3)
    with pytest.raises(TrainingError, match=r"loss nan .* at step 0"):
        train(TrainConfig(adapter="classify", task=config, train=settings), tmp_path / "run")


def test_fine_tuning_on_other_classes_starts_a_new_head(colors: Path, tmp_path: Path) -> None:
    origin = checkpoint.build("classify", small(colors))
    perturb(origin)
    path = checkpoint.save(origin, tmp_path / "origin")
    (colors / "red").rename(tmp_path / "red")
    config = small(colors, init_from=str(path))
    model = checkpoint.build("classify", config)
    assert model.config.labels == ("blue", "green")
    assert model.config.init_from == ""
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, origin.state_dict()[name]) is not name.startswith("net.head"), (
            name
        )

    # what was made for three classes does not go on, or get evaluated, with two
    with pytest.raises(DataError, match=r"2 classes \('blue', 'green'\).*3 classes.*init_from"):
        evaluate(origin, origin.config)
    with pytest.raises(CheckpointError, match=r"net.head.fc.weight has shape \[3, 16\]"):
        checkpoint.load_tensors(model, origin.state_dict(), "origin")
    same = checkpoint.build("classify", dataclasses.replace(origin.config, init_from=str(path)))
    assert torch.equal(same.net.head.fc.weight, origin.net.head.fc.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vrwkv_tinny"}, "timm has no model 'vrwkv_tinny'; did you mean"),
        ({"model_options": {"wide": 3}}, "task.model_options of test_vrwkv.*'wide'"),
        ({"channels": 2}, "task.channels must be 1"),
        ({"image_size": (8,)}, "task.image_size must be two positive numbers"),
        ({"std": (0.0,)}, "task.std must be positive"),
        ({"mean": (0.1, 0.2)}, "task.mean must hold 1 number or one for each of 3"),
        ({"interpolation": "lanczos"}, "task.interpolation must be"),
        ({"mixup": 0.2, "batch_size": 5}, "even task.batch_size, got 5"),
        ({"ema": 1.0}, "task.ema must be"),
        ({"labels": ("a", "a")}, "task.labels must be two or more different names"),
    ],
)
def test_configurations_that_cannot_work_are_refused(
    colors: Path, changes: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        checkpoint.build("classify", small(colors, **changes))


# -- figures


def test_nearest_neighbours_are_a_strong_yardstick_on_digits() -> None:
    accuracy, k = nearest_neighbours(RECIPES["digits"]().task)
    assert accuracy == pytest.approx(0.986, abs=5e-4)
    assert k in (1, 3, 5, 7)


@pytest.mark.slow
@pytest.mark.shared
def test_mnist_reaches_its_figure(shared_data: Path, tmp_path: Path) -> None:
    with tarfile.open(shared_data / "images" / "mnist-png.tar.gz") as archive:
        archive.extractall(tmp_path / "mnist", filter="data")
    config = override(RECIPES["mnist"](), f"task.data={tmp_path / 'mnist'}")
    result = train(override(config, "train.checkpoint_every=0"), tmp_path / "run")
    assert evaluate(result.model, result.model.config, "test")["accuracy"] >= 0.985


@pytest.mark.slow
def test_digits_reach_their_figure(tmp_path: Path) -> None:
    result = train(override(RECIPES["digits"](), "train.checkpoint_every=0"), tmp_path / "run")
    assert evaluate(result.model, result.model.config, "test")["accuracy"] >= 0.97
