"""Pictures of any size, stripe by stripe: equal to the whole, in memory that does not grow."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import rwkv_vision  # noqa: F401 - registers the models
from rwkv_core.errors import ConfigError, DataError
from rwkv_core.testing import perturb, relative_error
from rwkv_vision.tiled import PixelRows, tiled_features, tiled_logits

# less than a patch; wide; two whole rows of patches; odd sizes; tall
SIZES = [(1, 1), (5, 300), (32, 64), (150, 70), (333, 97)]


class Pixels:
    """A picture in memory that notes what is read of it."""

    def __init__(self, x_BCHW: Tensor) -> None:
        self.x_BCHW, self.size = x_BCHW, tuple(x_BCHW.shape[2:])
        self.seen: list[tuple[int, int]] = []

    def read(self, top: int, bottom: int) -> Tensor:
        self.seen.append((top, bottom))
        return self.x_BCHW[:, :, top:bottom]


def create(name: str, **options: object) -> nn.Module:
    model = timm.create_model(name, **options).eval()
    perturb(model, 0.1)
    return model


@pytest.mark.parametrize("name", ["test_vrwkv", "test_vrwkv_large"])
@pytest.mark.parametrize("size", SIZES)
def test_stripes_give_what_the_whole_does(size: tuple[int, int], name: str) -> None:
    model, x = create(name), torch.randn(1, 3, *size)
    columns = -(-size[1] // 16)
    with torch.no_grad():
        features, logits = model.forward_features(x), model(x)
    for n_rows in (1, 2, 4, 100):
        picture = Pixels(x)
        stripes = list(tiled_features(model, picture, tokens=(n_rows + 2) * columns))
        assert all(y.shape[1] == n_rows for y in stripes[:-1])
        assert not any(y.requires_grad for y in stripes)
        assert relative_error(torch.cat(stripes, 1), features) <= 2e-6
        assert relative_error(tiled_logits(model, picture, tokens=columns), logits) <= 2e-6
        # its rows once, in order and without a gap; twice, because two functions were called
        tops, bottoms = zip(*picture.seen, strict=True)
        assert tops.count(0) == 2
        assert [a for a in tops if a] == [b for b in bottoms if b != size[0]]


def test_a_model_in_fp64_stays_so() -> None:
    model, x = create("test_vrwkv").double(), torch.randn(1, 3, 100, 64, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
    ours = tiled_logits(model, Pixels(x), tokens=8)
    assert ours.dtype == torch.float64
    # but for positions, which are resampled in fp32 on both sides
    assert relative_error(ours, logits) <= 1e-7


def test_features_after_an_earlier_block() -> None:
    model, x = create("test_vrwkv", num_classes=0), torch.randn(1, 3, 80, 48)
    with torch.no_grad():
        expected = model.forward_intermediates(x, indices=[1], norm=True, output_fmt="NHWC")[1][0]
    model.prune_intermediate_layers([1])
    ours = torch.cat(list(tiled_features(model, Pixels(x), tokens=6)), 1)
    assert relative_error(ours, expected) <= 2e-6


def test_bytes_on_disk_are_normalised_as_they_are_read(tmp_path: Path) -> None:
    bytes_HWC = np.random.default_rng(0).integers(0, 256, (90, 50, 3), np.uint8)
    np.save(tmp_path / "slide.npy", bytes_HWC)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = torch.from_numpy(((bytes_HWC / 255 - mean) / std).astype(np.float32)).permute(2, 0, 1)[None]
    picture = PixelRows(np.load(tmp_path / "slide.npy", mmap_mode="r"), mean, std)
    assert picture.size == (90, 50)
    torch.testing.assert_close(picture.read(16, 48), x[:, :, 16:48])
    model = create("test_vrwkv", in_chans=3)
    with torch.no_grad():
        assert relative_error(tiled_logits(model, picture, tokens=4), model(x)) <= 2e-6
    with pytest.raises(DataError, match=r"pixels are float64 of shape \(4, 4, 3\); expected uint8"):
        PixelRows(np.zeros((4, 4, 3)), mean, std)


def test_the_file_is_gone_when_it_is_over(tmp_path: Path) -> None:
    model = create("test_vrwkv")
    stripes = tiled_features(model, Pixels(torch.randn(1, 3, 64, 64)), tokens=12, folder=tmp_path)
    next(stripes)
    stripes.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        next(tiled_features(model, Pixels(torch.zeros(1, 3, 8, 8)), folder=tmp_path / "none"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test_vrwkv", lambda m: m.train(), "in training mode; call its eval"),
        ("test_vrwkv6", lambda m: m, "block 0 mixes by SpatialMix6; only SpatialMix"),
        ("test_vrwkv7", lambda m: m, "block 0 mixes by SpatialMix7"),
        ("test_vrwkv_2d", lambda m: m, "block 0 mixes by SpatialMix2d"),
        ("test_vit", lambda m: m, "expected a model of rwkv_vision.models, got a VisionTransf"),
        ("test_vrwkv", lambda m: m.reset_classifier(5, "max") or m, "pools by 'max'.*'avg'"),
    ],
)
def test_models_that_cannot_are_refused(name: str, change: Callable, message: str) -> None:
    model = timm.create_model(name).eval()
    with pytest.raises(ConfigError, match=message):
        tiled_logits(change(model), Pixels(torch.zeros(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 0, 5), "0 × 5 pixels; expected at least one"),
        (torch.zeros(1, 4, 40, 40), r"rows 0 to 16 .* \(1, 4, 16, 40\), expected \(1, 3, 16, 40\)"),
        (torch.zeros(2, 3, 40, 40), r"\(2, 3, 16, 40\), expected \(1, 3, 16, 40\)"),
        (torch.zeros(1, 3, 40, 40).index_fill(2, torch.tensor(37), torch.nan),
         "rows 32 to 40 of the picture hold pixels that are not numbers"),
    ],
)  # fmt: skip
def test_pictures_that_are_none_are_refused(pixels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tiled_logits(create("test_vrwkv"), Pixels(pixels), tokens=3)


# in a process that may take so much and no more beyond what it has with the model built
CAPPED = """
import resource, sys
from pathlib import Path
import timm, torch
import rwkv_vision
from rwkv_vision.tiled import tiled_logits

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field + ":"))

class Made:
    def __init__(self, side):
        self.size = (side, side)
    def read(self, top, bottom):
        y, x = torch.arange(top, bottom)[:, None], torch.arange(self.size[1])
        return torch.sin(y * 0.01 + x * 0.02).expand(1, 3, -1, -1)

torch.set_num_threads(1)
net = timm.create_model("test_vrwkv").eval()
with torch.no_grad():
    net(torch.zeros(1, 3, 64, 64))
before, limit = status("VmRSS"), status("VmData") + (64 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
for side in (512, 2048, 8192):
    Path("/proc/self/clear_refs").write_text("5")
    assert tiled_logits(net, Made(side)).isfinite().all()
    print(side, (status("VmHWM") - before) >> 20)
try:
    with torch.no_grad():
        net(Made(8192).read(0, 8192))
except (MemoryError, RuntimeError) as error:
    print("whole", "memory" in str(error))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_picture(
    run_python: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # what was freed goes back at once; else holes are measured, not what is asked for
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    lines = dict(line.split() for line in run_python(CAPPED, block=()).splitlines())
    assert lines.pop("whole") == "True"  # the limit is one
    peaks = {int(side): int(mib) for side, mib in lines.items()}
    assert set(peaks) == {512, 2048, 8192}
    assert max(peaks.values()) <= 64
    # 262,144 patches take no more than 16,384: both are of more than one stripe
    assert peaks[8192] <= 1.1 * peaks[2048] + 2
