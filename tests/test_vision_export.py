"""An exported classifier: any size, the same answers without torch, everything a host needs."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import rwkv_export
import timm
import torch
from onnx import numpy_helper
from PIL import Image
from rwkv_export.onnx import write_onnx
from torch import Tensor, nn

from rwkv_core import checkpoint
from rwkv_core.adapter import ExportSpec
from rwkv_core.registry import ADAPTERS
from rwkv_core.testing import perturb
from rwkv_core.train import evaluate
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.data import batches
from rwkv_vision.host import preprocess
from rwkv_vision.model import Classifier
from rwkv_vision.pictures import confusion, report

SMALL = {"embed_dim": 16, "depth": 1, "patch_size": 4}
adapter = ADAPTERS["classify"]


def small(data: Path | str, **changes: object) -> ClassifyConfig:
    config = ClassifyConfig(
        model="test_vrwkv", model_options=SMALL, data=str(data), image_size=(12, 8), batch_size=4
    )
    return dataclasses.replace(config, **changes)


WITHOUT_TORCH = """
import json, sys
import numpy as np
import rwkv_export
runtime = rwkv_export.load("onnx")
pixels = np.load("pixels.npy")
predictions = runtime.predict(["picture.png", *pixels])
assert not {"torch", "timm", "torchvision"} & set(sys.modules)
print(json.dumps([[p.label, p.confidence, p.logits.tolist()] for p in predictions]))
"""


@pytest.fixture(scope="module")
def exported(
    paint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Classifier, Path]:
    """Return a model with noise in every parameter, and the folder its export is in."""
    folder = tmp_path_factory.mktemp("exported")
    config = small(paint(folder / "colors"), uint8_graph=True)
    model = checkpoint.build("classify", config)
    perturb(model)
    rwkv_export.export(model.eval(), folder / "onnx")
    return model, folder


def test_export_predicts_the_same_without_torch(
    exported: tuple[Classifier, Path], tmp_path: Path, run_python: Callable[..., str]
) -> None:
    model, folder = exported
    (tmp_path / "onnx").symlink_to(folder / "onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 20, 31, 3), np.uint8)
    np.save(tmp_path / "pixels.npy", pixels)
    Image.fromarray(pixels[0, :, :17]).save(tmp_path / "picture.png")
    seen = json.loads(run_python(WITHOUT_TORCH, block=("torch", "timm", "torchvision")))
    expected = model.predict([tmp_path / "picture.png", *pixels])
    assert [label for label, _, _ in seen] == [p.label for p in expected]
    for (_, confidence, logits), p in zip(seen, expected, strict=True):
        np.testing.assert_allclose(logits, p.logits, rtol=0, atol=1e-5)
        assert confidence == pytest.approx(p.confidence, abs=1e-5)


def test_graphs_take_any_size_and_carry_preprocessing(exported: tuple[Classifier, Path]) -> None:
    model, folder = exported
    runtime = rwkv_export.load(folder / "onnx")
    assert {n: g.opset for n, g in runtime.graphs.items()} == {"image": 20, "pixels": 20}
    for size in ((1, 12, 8), (2, 13, 27), (3, 40, 5), (1, 1, 1)):
        image = np.random.default_rng(0).standard_normal((size[0], 3, *size[1:]), np.float32)
        expected = model(torch.from_numpy(image)).detach().numpy()
        logits = runtime("image", {"image": image})["logits"]
        np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    # bytes in the model's own size need no stretching: both graphs agree
    pixels = np.random.default_rng(0).integers(0, 256, (2, 12, 8, 3), np.uint8)
    image = np.stack([preprocess(Image.fromarray(p), runtime.metadata) for p in pixels])
    np.testing.assert_allclose(
        runtime("pixels", {"pixels": pixels})["logits"],
        runtime("image", {"image": image})["logits"],
        rtol=0, atol=1e-4,
    )  # fmt: skip


def test_nothing_is_cropped_and_padded_at_once(exported: tuple[Classifier, Path]) -> None:
    """Where that crops to nothing, onnxruntime before 1.24 writes no zeros."""
    graph = onnx.load(exported[1] / "onnx" / "image.onnx").graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    pads = [
        constants[n.input[1]] for n in graph.node if n.op_type == "Pad" and n.input[1] in constants
    ]
    assert len(pads) == 2  # the Q-Shifts of one layer
    assert all(amounts.min() >= 0 for amounts in pads)


def test_manifest_says_what_a_host_needs(exported: tuple[Classifier, Path]) -> None:
    _, folder = exported
    manifest = json.loads((folder / "onnx" / "manifest.json").read_text())
    metadata = manifest["metadata"]
    assert metadata["labels"] == ["blue", "green", "red"]
    assert metadata["mean"] == metadata["std"] == [0.5]
    assert metadata["image_size"] == [12, 8]
    assert metadata["task"] == "image-classification"
    assert "uint8 [batch, height, width, channels]" in metadata["pixels"]
    inputs = {name: graph["inputs"][0] for name, graph in manifest["graphs"].items()}
    assert inputs["image"]["shape"] == ["batch", 3, "height", "width"]
    assert inputs["pixels"]["shape"] == ["batch", "height", "width", 3]
    assert inputs["pixels"]["dtype"] == "uint8"
    parity = json.loads((folder / "onnx" / "parity.json").read_text())
    assert parity["worst"] <= 1e-5
    assert len({(r["height"], r["width"]) for r in parity["graphs"]["image"]}) >= 3


@pytest.mark.slow
def test_any_other_model_of_timm_trains_and_exports(colors: Path, tmp_path: Path) -> None:
    config = small(colors, model="test_convnext", model_options={}, image_size=(32, 32))
    model = checkpoint.build("classify", config)
    loss, _ = adapter.loss(model.train(), next(batches(model.config, "train")), None)
    loss.backward()
    report = rwkv_export.export(model.eval(), tmp_path / "onnx")
    assert report.worst <= 1e-5


def test_report_counts_and_draws(exported: tuple[Classifier, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model, folder = exported
    runtime = rwkv_export.load(folder / "onnx")
    accuracy = report(runtime, model.config, tmp_path / "pictures")
    expected = evaluate(model, model.config, "test")["accuracy"]
    assert accuracy == pytest.approx(expected)
    for name in ("confusion.png", "predictions.png"):
        with Image.open(tmp_path / "pictures" / name) as picture:
            assert min(picture.size) > 100
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
    assert confusion([0, 0, 1], [0, 1, 1], 2).tolist() == [[1, 1], [0, 1]]


class Everything(nn.Module):
    """Logits and the features after every block, as ``features_only`` models compute them."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        final, features = self.net.forward_intermediates(x)
        return (self.net.forward_head(final), *features)


class Features(nn.Module):
    """timm's own wrapper of a ``features_only`` model, as a tuple."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.net(x))


def check_dynamic_file(module: nn.Module, patch: int, path: Path) -> None:
    """Export with batch, height and width free; compare at sizes that were not traced."""
    traced = (2, 3, 6 * patch, 7 * patch)
    with torch.no_grad():
        outputs = tuple(f"y{i}" for i in range(len(module(torch.zeros(1, *traced[1:])))))
    spec = ExportSpec(
        name="image",
        module=module,
        inputs={"image": np.zeros(traced, np.float32)},
        outputs=outputs,
        dynamic={"image": {0: "batch", 2: "height", 3: "width"}},
    )
    write_onnx(spec, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch, height, width in ((1, 4, 4), (3, 9, 2), (1, 1, 40)):
        # whole patches, and pictures that must be padded to them
        for less in (0, patch - 1):
            x = torch.randn(batch, 3, height * patch - less, width * patch - less)
            with torch.no_grad():
                expected = [y.numpy() for y in module(x)]
            for y, e in zip(session.run(None, {"image": x.numpy()}), expected, strict=True):
                np.testing.assert_allclose(y, e, rtol=0, atol=1e-5 * np.abs(e).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vrwkv_large", "test_vrwkv6", "test_vrwkv7"])
def test_one_file_serves_every_size_logits_and_features(name: str, tmp_path: Path) -> None:
    net = timm.create_model(name, depth=2)
    perturb(net, 0.05)
    check_dynamic_file(Everything(net.eval()), 16, tmp_path / "image.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("features_only", [False, True], ids=["classifier", "features_only"])
@pytest.mark.parametrize("name", timm.list_models(module="models"))
def test_every_registered_model_exports(name: str, features_only: bool, tmp_path: Path) -> None:
    patch = 4 if "patch4" in name else 16
    net = timm.create_model(name, features_only=features_only)
    perturb(net, 0.01)
    module = Features(net) if features_only else Everything(net)
    check_dynamic_file(module.eval(), patch, tmp_path / "image.onnx")
