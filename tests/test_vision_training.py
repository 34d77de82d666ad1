"""Recipes of image models, any model of timm by the same road, and what a network looks at."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from rwkv_core import checkpoint
from rwkv_core.errors import ConfigError, RWKVError
from rwkv_core.registry import RECIPES
from rwkv_core.testing import perturb
from rwkv_core.train import TrainConfig, TrainSettings, train
from rwkv_core.train.schedule import learning_rate
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.optim import image_optimizer
from rwkv_vision.pictures import draw_fields
from rwkv_vision.receptive import fields_of, receptive_field

COLORS = ("blue", "green", "red")
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
OURS = {"embed_dim": 16, "depth": 2, "patch_size": 4}


def task(colors: Path, model: str, options: dict[str, object]) -> ClassifyConfig:
    return ClassifyConfig(
        model=model, model_options=options, data=str(colors), labels=COLORS,
        image_size=(16, 12), batch_size=4,
    )  # fmt: skip


# -- recipes


def test_imagenets_recipe_is_the_published_one() -> None:
    config = RECIPES["imagenet"]()
    settings, doc = config.train, RECIPES["imagenet"].__doc__
    pictures = settings.steps * config.task.batch_size
    assert pictures == pytest.approx(300 * 1_281_167, abs=config.task.batch_size)
    at = {epoch: learning_rate(round(epoch * 1_281_167 / 1024), settings) for epoch in (0, 20, 300)}
    assert at == {0: pytest.approx(1e-5), 20: pytest.approx(1e-3), 300: pytest.approx(1e-5)}
    for said in ("300 epochs", "75.1 %", "drop_path_rate=0.3", "drop_path_rate=0.5", "mixup=0.8"):
        assert said in doc


@pytest.mark.parametrize(
    ("name", "options"),
    [("imagenet", {}), ("imagenet", {"mixup": 0.8, "cutmix": 1.0, "ema": 0.9}), ("cifar10", {})],
)
def test_recipes_train_on_files(colors: Path, tmp_path: Path, name: str, options: dict) -> None:
    config = RECIPES[name]()
    small = {"embed_dim": 16, "depth": 1, "patch_size": 8, "drop_path_rate": 0.1}
    config = dataclasses.replace(
        config,
        task=dataclasses.replace(
            config.task, data=str(colors), model_options=small, image_size=(32, 32),
            batch_size=4, workers=0, **options,
        ),
        train=dataclasses.replace(config.train, steps=2, log_every=1),
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    assert np.isfinite(result.metrics["loss"])
    assert config.train.beta2 == result.config.train.beta2


# -- models that are timm's own


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_a_vit_trains_by_the_same_script_and_sees_the_same_pictures(
    colors: Path, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Tensor]] = {}
    for name, options in ((model, VIT), ("test_vrwkv", OURS)):
        config = task(colors, name, options)
        net = checkpoint.build("classify", config).net
        kept = seen.setdefault(name, [])
        forward = type(net).forward
        monkeypatch.setattr(
            type(net), "forward", lambda s, x, f=forward, k=kept: (k.append(x), f(s, x))[1]
        )
        settings = TrainSettings(steps=3, lr=1e-3, checkpoint_every=0)
        result = train(
            TrainConfig(adapter="classify", task=config, train=settings), tmp_path / name
        )
        monkeypatch.setattr(type(net), "forward", forward)
        assert checkpoint.load(tmp_path / name).config == result.model.config
    theirs, ours = seen.values()
    assert len(theirs) == len(ours) > 3
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_timms_own_models_decay_what_timm_decays(colors: Path) -> None:
    settings = TrainSettings(weight_decay=0.3)
    xcit = {"embed_dim": 16, "depth": 1, "num_heads": 2, "cls_attn_layers": 1}
    # the second one's temperatures [heads, 1, 1] decay; of our layers only weights do
    for name, options in (("vit_tiny_patch16_224", VIT), ("xcit_nano_12_p16_224", xcit)):
        model = checkpoint.build("classify", task(colors, name, options))
        found = image_optimizer(model, settings).param_groups
        timms = create_optimizer_v2(model.net, "adamw", weight_decay=0.3).param_groups
        assert decayed(found) == decayed(timms)
        assert sorted(n for g in found for n in g["names"]) == sorted(
            n for n, _ in model.named_parameters()
        )
        for group in found:
            by_name = dict(model.named_parameters())
            for n, p in zip(group["names"], group["params"], strict=True):
                assert by_name[n] is p


def decayed(groups: list[dict]) -> set[int]:
    return {id(p) for g in groups if g["weight_decay"] == 0.3 for p in g["params"]}


def test_our_models_keep_their_own_groups(colors: Path) -> None:
    model = checkpoint.build("classify", task(colors, "test_vrwkv6", {**OURS, "head_dim": 8}))
    groups = image_optimizer(model, TrainSettings()).param_groups
    scales = {n: g["lr_scale"] for g in groups for n in g["names"]}
    assert scales["net.blocks.0.att.time_decay"] == 2
    assert scales["net.blocks.0.att.key.weight"] == 1


def test_networks_without_a_size_get_none(colors: Path) -> None:
    model = checkpoint.build("classify", task(colors, "test_resnet", {}))
    assert model.eval()(torch.zeros(1, 3, 16, 12)).shape == (1, 3)
    with pytest.raises(ConfigError, match="model_options of test_resnet"):
        checkpoint.build("classify", task(colors, "test_resnet", {"img_size": 32}))


# -- what a network looks at


class Convolution(nn.Module):
    """Features whose receptive field is known: 3 × 3 pixels, the middle one three times."""

    def forward_intermediates(self, x: Tensor, **_: object) -> list[Tensor]:
        kernel = torch.ones(2, x.shape[1], 3, 3)
        kernel[:, :, 1, 1] = 3
        return [nn.functional.conv2d(x, kernel, padding=1)]


def test_receptive_field_of_a_convolution_is_its_kernel() -> None:
    field = receptive_field(Convolution(), torch.randn(5, 3, 9, 7))
    expected = np.zeros((9, 7))
    expected[3:6, 2:5] = 1 / 3
    expected[4, 3] = 1
    np.testing.assert_allclose(field, expected, atol=1e-6)


def test_receptive_field_is_the_whole_picture_for_every_generation() -> None:
    for mixer in ("vrwkv", "vrwkv6", "vrwkv7"):
        torch.manual_seed(0)
        net = timm.create_model("test_vrwkv", mixer=mixer, head_dim=16, img_size=64)
        if mixer == "vrwkv7":  # whose maps out of a layer start at 0
            for block in net.blocks:
                nn.init.normal_(block.att.output.weight, std=0.1)
        field = receptive_field(net.train(), torch.randn(1, 3, 64, 64))
        assert net.training
        assert field.shape == (64, 64)
        assert field.max() == 1
        assert (field > 0).all(), mixer


def test_fields_before_and_after_training_are_drawn(colors: Path, tmp_path: Path) -> None:
    config = task(colors, "test_vrwkv", OURS)
    model = checkpoint.build("classify", config)
    perturb(model)
    state = torch.get_rng_state()
    fields = fields_of(model, config, "test")
    assert torch.equal(torch.get_rng_state(), state)
    assert list(fields) == ["before training", "after training"]
    assert {f.shape for f in fields.values()} == {(16, 12)}
    again = fields_of(model, config, "test")
    assert all(np.array_equal(again[name], field) for name, field in fields.items())
    assert not np.array_equal(*fields.values())
    seven = {str(i): fields["after training"] for i in range(7)}
    sizes = []
    for drawn in (fields, seven):
        draw_fields(drawn, tmp_path / "receptive.png")
        with Image.open(tmp_path / "receptive.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][0] == 3 * sizes[0][0]
    assert sizes[1][1] == 2 * sizes[0][1]


def test_networks_without_intermediate_features_have_no_field(colors: Path) -> None:
    with pytest.raises(RWKVError, match="Linear gives no intermediate features"):
        receptive_field(nn.Linear(3, 3), torch.zeros(1, 3, 4, 4))
    config = task(colors, "vit_tiny_patch16_224", VIT)
    model = checkpoint.build("classify", config)
    assert fields_of(model, config, "test")["after training"].shape == (16, 12)
    model.net = nn.Flatten()
    assert fields_of(model, config, "test") == {}
