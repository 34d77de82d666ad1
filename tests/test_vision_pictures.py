"""Pictures as people have them: other depths and modes, damaged, missing, or none at all."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rwkv_core import checkpoint
from rwkv_core.errors import DataError
from rwkv_core.train import TrainConfig, TrainSettings, evaluate, train
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.data import batches
from rwkv_vision.host import decode, from_array, predict
from rwkv_vision.sources import open_split

SHADES = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
COLORS = np.stack([SHADES, SHADES.T, 255 - SHADES], -1)


def make(folder: Path, classes: int = 2, n: int = 10) -> Path:
    rng = np.random.default_rng(0)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 100, (9, 7, 3), np.uint8) + 100 * c
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"class{c}" / f"{i}.png")
    return folder


def config(data: Path | str, **changes: object) -> ClassifyConfig:
    options = {"embed_dim": 16, "depth": 2, "patch_size": 4}
    values = {"image_size": (8, 8), "batch_size": 4, **changes}
    return ClassifyConfig(model="test_vrwkv", model_options=options, data=str(data), **values)


# -- what a picture is


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_keep_their_shades(tmp_path: Path, suffix: str) -> None:
    wide = SHADES.astype(np.uint16) * 257
    Image.fromarray(wide).save(tmp_path / f"a.{suffix}")
    with Image.open(tmp_path / f"a.{suffix}") as picture:
        assert picture.mode.startswith("I")
    for channels in (1, 3):
        pixels = np.asarray(decode(tmp_path / f"a.{suffix}", channels))
        assert pixels.shape == (8, 8) if channels == 1 else (8, 8, 3)
        np.testing.assert_array_equal(pixels if channels == 1 else pixels[..., 1], SHADES)
    np.testing.assert_array_equal(np.asarray(from_array(wide, 1)), SHADES)


def test_grey_becomes_colour_and_colour_grey(tmp_path: Path) -> None:
    Image.fromarray(SHADES).save(tmp_path / "grey.png")
    grey = np.asarray(decode(tmp_path / "grey.png", 3))
    np.testing.assert_array_equal(grey, np.stack([SHADES] * 3, -1))
    Image.fromarray(COLORS).save(tmp_path / "colour.png")
    assert np.asarray(decode(tmp_path / "colour.png", 1)).shape == (8, 8)
    Image.fromarray(SHADES > 99).save(tmp_path / "bilevel.png")
    np.testing.assert_array_equal(
        np.asarray(decode(tmp_path / "bilevel.png", 1)), (SHADES > 99) * 255
    )


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    alpha = np.where(np.arange(8)[:, None] < 4, 0, 255).repeat(8, 1).astype(np.uint8)
    expected = np.where(alpha[..., None] > 0, COLORS, 255)
    rgba = np.concatenate([COLORS, alpha[..., None]], -1)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    np.testing.assert_array_equal(np.asarray(decode(tmp_path / "rgba.png", 3)), expected)
    np.testing.assert_array_equal(np.asarray(from_array(rgba, 3)), expected)
    grey = Image.merge("LA", [Image.fromarray(SHADES), Image.fromarray(alpha)])
    grey.save(tmp_path / "la.png")
    np.testing.assert_array_equal(
        np.asarray(decode(tmp_path / "la.png", 1)), np.where(alpha > 0, SHADES, 255)
    )


def test_palettes_are_resolved_not_read_as_shades(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4))
    picture.putpalette([200, 30, 60, 10, 220, 40])
    picture.putpixel((1, 0), 1)
    picture.save(tmp_path / "palette.png")
    pixels = np.asarray(decode(tmp_path / "palette.png", 3))
    assert pixels[0, 0].tolist() == [200, 30, 60]
    assert pixels[0, 1].tolist() == [10, 220, 40]
    picture.save(tmp_path / "hole.png", transparency=1)
    assert np.asarray(decode(tmp_path / "hole.png", 3))[0, 1].tolist() == [255, 255, 255]


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held sideways
    Image.fromarray(np.zeros((4, 9, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    assert decode(tmp_path / "a.jpg", 3).size == (4, 9)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no picture"),
        (b"hello", "damaged or no picture"),
        (b"\x89PNG\r\n\x1a\n", "damaged or no picture"),
        (None, "does not exist"),
    ],
)
def test_files_that_are_no_pictures_are_named(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.png.*{message}"):
        decode(tmp_path / "a.png", 3)


def test_every_cut_of_a_picture_is_an_error_or_a_picture(tmp_path: Path) -> None:
    refused = 0
    for name in ("a.png", "a.jpg", "a.gif", "a.bmp", "a.tiff", "a.webp"):
        Image.fromarray(COLORS).save(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        for end in range(0, len(content), 7):
            (tmp_path / name).write_bytes(content[:end])
            try:
                assert decode(tmp_path / name, 3).size == (8, 8)
            except DataError as error:
                refused += name in str(error)
    assert refused > 100


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match=r"a\.tiff holds floating-point pixels"):
        decode(tmp_path / "a.tiff", 1)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4, 3), np.nan), "picture 1 holds pixels that are not numbers"),
        (np.full((4, 4), np.inf, np.float32), "picture 1 holds pixels that are not numbers"),
        (np.full((4, 4, 3), 200.0), "floats from 200 to 200; expected 0 to 1"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        (np.zeros(4, np.uint8), r"shape \(4,\)"),
        (np.zeros((4, 4, 3), np.int64), "dtype int64"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(pixels: np.ndarray, message: str) -> None:
    class Silent:
        metadata = {  # noqa: RUF012
            "labels": ["a", "b"], "channels": 3, "image_size": [4, 4],
            "interpolation": "bilinear", "mean": [0.5], "std": [0.5],
        }  # fmt: skip

    with pytest.raises(DataError, match=message):
        predict(Silent(), [np.zeros((4, 4), np.uint8), pixels])


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (1, 400), (400, 1), (37, 61)])
def test_pictures_of_any_size_are_classified(tmp_path: Path, size: tuple[int, int]) -> None:
    model = checkpoint.build("classify", config(make(tmp_path)))
    pixels = np.random.default_rng(0).random((*size, 3), np.float32)
    (prediction,) = model.predict([pixels])
    assert prediction.label in ("class0", "class1")
    assert np.isfinite(prediction.logits).all()
    assert model.predict([]) == []


# -- what a folder of pictures is


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda p: None, "is no folder; expected one with a subfolder of pictures"),
        (lambda p: p.mkdir(), "holds no pictures"),
        (lambda p: (p / "a").mkdir(parents=True), "holds no pictures"),
        (lambda p: make(p, 1), r"has 1 class \('class0'\); a classifier needs at least two"),
        (lambda p: make(p / "train", 1), r"has 1 class \('class0'\)"),
        (lambda p: (make(p), Image.new("L", (3, 3)).save(p / "x.png")), "x.png lies outside"),
        (
            lambda p: (make(p / "train", 3), make(p / "test", 2)),
            r"test part has 2 classes .*training part 3 classes",
        ),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(
    tmp_path: Path, prepare, message: str
) -> None:
    prepare(tmp_path / "data")
    with pytest.raises(DataError, match=message):
        checkpoint.build("classify", config(tmp_path / "data"))
    run = TrainConfig(adapter="classify", task=config(tmp_path / "data"))
    with pytest.raises(DataError, match=message):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_torchvision_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"torch/cifar10 cannot be read from .*Dataset not found"):
        open_split(config("torch/cifar10", root=str(tmp_path)), "train")


def test_a_damaged_picture_is_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make(tmp_path / "data")
    bad = [folder / "class0" / "3.png", folder / "class1" / "7.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:60])
    task = config(folder, batch_size=5)
    settings = TrainSettings(steps=12, checkpoint_every=0)
    with caplog.at_level(logging.WARNING, "rwkv_vision"):
        train(TrainConfig(adapter="classify", task=task, train=settings), tmp_path / "run")
        model = checkpoint.load(tmp_path / "run")
        counted = sum(len(b.targets) for s in ("eval", "test") for b in batches(task, s))
    for path in bad:
        assert any(str(path) in r.getMessage() for r in caplog.records), path
    in_training = {
        task_name(task, "train", i) for i in range(len(open_split(task, "train").targets))
    }
    held_out_bad = sum(str(p) not in in_training for p in bad)
    total = sum(len(open_split(task, s).targets) for s in ("eval", "test"))
    assert counted == total - held_out_bad
    assert 0 <= evaluate(model, task, "test")["accuracy"] <= 1


def task_name(task: ClassifyConfig, split: str, i: int) -> str:
    return open_split(task, split).name(i)


def test_nothing_but_damaged_pictures_is_an_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "data", n=5)
    for path in folder.rglob("*.png"):
        path.write_bytes(b"no picture")
    for split in ("train", "test"):
        with pytest.raises(DataError, match=r"not one (of \d+ pictures|picture of .*) can be read"):
            next(batches(config(folder), split))


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown split 'tset'; expected one of"):
        open_split(config(make(tmp_path / "data")), "tset")
