"""Folders for phones: the same answers in operators that accelerators have."""

import json

import numpy as np
import onnxruntime
import pytest
import rwkv_export
import torch
from onnx import TensorProto, helper, numpy_helper
from rwkv_export import reference
from rwkv_export.phone_operators import for_phones

from rwkv_core import checkpoint
from rwkv_core.cli import main
from rwkv_core.errors import ExportError
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

SHAPE = (1, 7, 6)
CASES = {
    "Neg": ((), {}),
    "ReduceSum": (([1],), {"keepdims": 0}),
    "ReduceL2": (([-1],), {}),
    "LayerNormalization": ((np.arange(6.0), np.ones(6)), {"epsilon": 1e-3}),
    "Gather": ((np.array(0),), {"axis": 0}),
    "CumSum": ((np.array(1),), {"exclusive": 1, "reverse": 1}),
    "ReduceMax": (([1],), {"keepdims": 0}),
    "Pad": (([0, 2, -1, 0, -3, 4],), {}),
}


def graph_of(op, given, attributes, shape=SHAPE):
    """Return a graph of one operator: floats are fp32, whole numbers int64."""
    arrays = [np.asarray(a) for a in given]
    constants = [
        numpy_helper.from_array(a.astype(np.int64 if a.dtype.kind == "i" else np.float32), f"c{i}")
        for i, a in enumerate(arrays)
    ]
    node = helper.make_node(op, ["x", *(c.name for c in constants)], ["y"], **attributes)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", [x], [y], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def answer(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("op", CASES)
def test_every_operator_is_replaced_by_equal_ones(op):
    model = graph_of(op, *CASES[op])
    x = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = answer(model, x)
    for_phones(model)
    assert op not in {node.op_type for node in model.graph.node}
    np.testing.assert_allclose(answer(model, x), expected, rtol=0, atol=2e-6)


def test_what_has_no_equal_stays_and_free_sizes_are_refused():
    for op, given, attributes in [
        ("CumSum", (np.array(2),), {}),  # along the last axis
        ("Gather", ([0, 2],), {"axis": 1}),
        ("Pad", ([0, 1, 0, 0, 1, 0],), {"mode": "reflect"}),
    ]:
        model = graph_of(op, given, attributes)
        for_phones(model)
        assert [node.op_type for node in model.graph.node] == [op]
    with pytest.raises(ExportError, match="'x' has a free dimension"):
        for_phones(graph_of("Neg", (), {}, shape=("batch", 7, 6)))


def proven(folder, graph):
    """Return what the checker says of a folder, after verifying it as any folder."""
    files = {p.name for p in folder.iterdir()}
    assert files == {"manifest.json", "parity.json", "reference.safetensors", f"{graph}.ort",
                     "required_operators.config", "mobile.json"}  # fmt: skip
    assert main(["verify", str(folder)]) == 0
    assert reference.check(rwkv_export.load(folder)).keys() == {graph}
    for name in ("required_operators.config", f"{graph}.ort"):
        assert str(folder.parent).encode() not in (folder / name).read_bytes()
    said = json.loads((folder / "mobile.json").read_text())[graph]
    operators = (folder / "required_operators.config").read_text()
    assert "MatMul" in operators
    assert not {"CumSum", "Neg", "ReduceSum", "LayerNormalization"} & set(
        operators.replace(";", ",").replace("\n", ",").split(",")
    )
    return said


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["rwkv4", "rwkv5", "rwkv6", "rwkv7"])
def test_a_step_is_one_part_of_nnapi_and_coreml(mixer, tmp_path, capsys):
    torch.manual_seed(0)
    options = {} if mixer == "rwkv4" else {"head_dim": 32}
    model = checkpoint.build(
        "text", TextConfig(dim=64, depth=2, mixer=mixer, mixer_options=options)
    )
    perturb(model, 0.1)
    checkpoint.save(model, tmp_path / "model")
    folders = [str(tmp_path / "model"), str(tmp_path / "out")]
    assert main(["export", *folders, "--steps", "16", "--mobile"]) == 0
    said = proven(tmp_path / "out", "step")
    for name, unsupported in {"NNAPI": [], "CoreML MLProgram": ["ai.onnx:Gather"]}.items():
        assert (said[name]["usable"], said[name]["parts"]) == ("YES", 1)
        assert said[name]["unsupported"] == unsupported
    settings = {"max_tokens": 64, "temperature": 0.0}
    runtime = rwkv_export.load(tmp_path / "out")
    assert runtime.generate("RW", **settings) == model.generate("RW", **settings)


@pytest.mark.slow
def test_a_classifier_is_one_part_of_nnapi(classifier, tmp_path, capsys):
    model = classifier(embed_dim=16)
    report = rwkv_export.export(model.eval(), tmp_path / "out", lane="mobile")
    assert report.worst <= 1e-5
    said = proven(tmp_path / "out", "image")
    for name in ("NNAPI", "CoreML MLProgram"):
        assert (said[name]["usable"], said[name]["parts"]) == ("YES", 1)
        assert said[name]["unsupported"] == []
    runtime = rwkv_export.load(tmp_path / "out")
    (shape,) = [t.shape for t in runtime.graphs["image"].inputs]
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, *shape[2:], 3), np.uint8))
    for ours, expected in zip(runtime.predict(pictures), model.predict(pictures), strict=True):
        np.testing.assert_allclose(ours.logits, expected.logits, atol=1e-5)
    with pytest.raises(ExportError, match=r"takes 'image' as float32 \[1, 3, 12, 8\]"):
        runtime("image", {"image": np.zeros((2, 3, 12, 9), np.float32)})
