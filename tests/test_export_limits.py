"""What file formats, runtimes and disks set a limit to: 2 GiB, opsets, the folder, its space."""

import resource

import numpy as np
import onnx
import onnxruntime
import pytest
import rwkv_export
import torch
from onnx import TensorProto, helper
from rwkv_export import onnx as writer
from rwkv_export import reference
from rwkv_export.manifest import GraphInfo, Manifest, TensorInfo, sha256
from rwkv_export.weights import WeightFile
from torch import nn

from rwkv_core import checkpoint
from rwkv_core.adapter import ExportSpec
from rwkv_core.errors import ExportError
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

BEYOND = (1 << 31) + 4096  # bytes; protobuf and signed 32-bit offsets end before


class SparseFile(WeightFile):
    """A weights file with a hole of 2 GiB before the first weight."""

    def __init__(self, path):
        super().__init__(path)
        path.touch()
        with path.open("r+b") as file:
            file.truncate(BEYOND)


@pytest.fixture
def spec():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    return ExportSpec(
        name="graph", module=module, inputs={"x": x}, outputs=("y",), dynamic={"x": {0: "batch"}}
    )


def answers(spec, path):
    x = spec.inputs["x"]
    (y,) = onnxruntime.InferenceSession(path).run(None, {"x": x})
    expected = spec.module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(y, expected, atol=1e-6)


def places(proto):
    return [int(e.value) for i in proto.graph.initializer for e in i.external_data
            if e.key == "offset"]  # fmt: skip


def test_weights_beyond_2_gib_are_found(spec, tmp_path):
    weights = SparseFile(tmp_path / "weights.bin")
    proto = writer.write_onnx(spec, tmp_path / "graph.onnx", weights=weights)
    assert len(places(proto)) == 2
    assert min(places(proto)) >= BEYOND
    assert (tmp_path / "weights.bin").stat().st_blocks * 512 < 1 << 20  # the hole is a hole
    answers(spec, tmp_path / "graph.onnx")


def test_a_large_graph_gets_a_weights_file_of_its_own(spec, tmp_path, monkeypatch):
    assert not places(writer.write_onnx(spec, tmp_path / "small.onnx"))
    assert writer.EXTERNAL_DATA_FROM < 1 << 31
    monkeypatch.setattr(writer, "EXTERNAL_DATA_FROM", 2 * 64 * 64 * 4)
    assert len(places(writer.write_onnx(spec, tmp_path / "graph.onnx"))) == 2
    answers(spec, tmp_path / "graph.onnx")
    assert (tmp_path / "graph.onnx").stat().st_size < 4096


def folder_of(tmp_path, *, opset=20, outside=None):
    """Write an exported folder of one addition by hand, and what lies beside it."""
    folder = tmp_path / "out"
    folder.mkdir()
    np.arange(2048, dtype=np.float32).tofile(tmp_path / "secret.bin")
    weight = TensorProto(name="w", dims=[2048], data_type=TensorProto.FLOAT, raw_data=bytes(8192))
    if outside:
        onnx.external_data_helper.set_external_data(weight, outside, 0, 8192)
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2048]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    (folder / "add.onnx").write_bytes(model.SerializeToString())
    info = GraphInfo(
        file="add.onnx",
        sha256=sha256(folder / "add.onnx"),
        opset=opset,
        inputs=(TensorInfo(name="x", dtype="float32", shape=(2048,)),),
        outputs=("y",),
        state=(),
    )
    Manifest(adapter="text", graphs={"add": info}, metadata={}).write(folder)
    return folder


def ask(folder):
    return rwkv_export.load(folder)("add", {"x": np.zeros(2048, np.float32)})


def test_an_opset_that_the_installed_onnxruntime_lacks(tmp_path):
    with pytest.raises(ExportError, match=r"onnxruntime \S+ does not open .*add.onnx: .*pset 999"):
        ask(folder_of(tmp_path, opset=999))


@pytest.mark.parametrize("absolute", [False, True])
def test_weights_outside_the_folder_are_not_read(tmp_path, absolute):
    outside = str(tmp_path / "secret.bin") if absolute else "../secret.bin"
    with pytest.raises(ExportError, match=r"does not open .*[Ee]xternal data"):
        ask(folder_of(tmp_path, outside=outside))


def test_the_folder_written_by_hand_runs(tmp_path):
    """What is refused above is refused for its fault alone."""
    assert not ask(folder_of(tmp_path))["y"].any()


def text_model():
    torch.manual_seed(0)
    config = TextConfig(dim=64, depth=1, mixer_options={"head_dim": 32})
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    return model


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path):
    """The system itself refuses to write more than 100 kB to a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            rwkv_export.export(text_model(), tmp_path / "out", steps=(1,))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_folder_of_more_than_2_gib_is_proven_and_verified(tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_export._export.WeightFile", SparseFile)
    report = rwkv_export.export(text_model(), tmp_path / "out", steps=(1, 16))
    assert report.bytes > BEYOND
    assert report.worst <= 2e-5
    assert reference.check(rwkv_export.load(tmp_path / "out")).keys() == {"step", "prefill"}
