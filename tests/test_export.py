"""The exported folder: proven, clean, safe, and run without torch."""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import rwkv_export
import torch
from rwkv_export.onnx import nodes_per_op
from rwkv_export.rwkv7_layers import Sequence7
from rwkv_export.traced import as_nodes

from rwkv_core import checkpoint
from rwkv_core.errors import ExportError
from rwkv_core.graphs import SequenceGraph
from rwkv_core.mixers import rwkv7
from rwkv_core.run import TorchRun
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

DEPTH = 3
SETTINGS = {"max_tokens": 60, "temperature": 0.8, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = TextConfig(dim=64, depth=DEPTH, mixer_options={"head_dim": 32})
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    return model


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "out"
    report = rwkv_export.export(model, folder, steps=(1, 16, 256))
    return report, folder


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported[1], tmp_path / "copy")


def test_the_report_covers_outputs_states_steps_and_batches(exported):
    report, folder = exported
    parity = json.loads((folder / "parity.json").read_text())
    rows = parity["graphs"]["step"]
    assert [(r["batch"], r["step"]) for r in rows] == [(1, 1), (1, 16), (1, 256), (3, 1), (3, 16)]
    for row in rows:
        assert set(row["errors"]) == {"logits", "att_shift", "wkv", "ffn_shift"}
        assert all(error <= 2e-5 for error in row["errors"].values())
    lengths = [(r["batch"], r["time"], r["step"]) for r in parity["graphs"]["prefill"]]
    assert lengths == [(1, 64, 64), (1, 64, 256), (1, 1, 1), (1, 1, 16), (3, 7, 7), (3, 7, 21),
                       (2, 100, 100)]  # fmt: skip
    pieces = [r["pieces"] for r in parity["graphs"]["prefill = step"]]
    assert pieces[:4] == [[1], [7], [64], [100]]
    assert [(sum(p), len(p)) for p in pieces[4:]] == 3 * [(96, 6)]
    everything = [row for rows in parity["graphs"].values() for row in rows]
    assert report.worst == max(max(r["errors"].values()) for r in everything) > 0
    assert report.worst <= 2e-5
    versions = parity["versions"]
    assert {"torch", "onnx", "onnxruntime", "onnxscript", "rwkv-toolkit"} <= set(versions)
    assert {p.name for p in folder.iterdir()} == {
        "manifest.json", "parity.json", "step.onnx", "prefill.onnx", "weights.bin",
        "reference.safetensors",
    }  # fmt: skip


def test_both_graphs_share_their_weights(exported, model):
    """What one graph has of the weights file, the other has too; none is stored twice."""
    _, folder = exported
    size = sum(4 * p.numel() for p in model.parameters())
    assert (folder / "weights.bin").stat().st_size < 1.03 * size
    matrices = [p for p in model.parameters() if p.ndim == 2 and p.numel() >= 4096]
    places = []
    for name in ("step", "prefill"):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        outside = {i.name: i for i in graph.initializer if i.external_data}
        assert all(
            e.value == "weights.bin"
            for i in outside.values()
            for e in i.external_data
            if e.key == "location"
        )
        assert "backbone.blocks.1.time_mix.key.weight" in outside
        places.append({n for n, i in outside.items() if len(i.dims) == 2})
        assert (folder / f"{name}.onnx").stat().st_size < 120_000
    assert places[0] == places[1]
    assert len(places[0]) >= len(matrices)


def test_the_graph_is_small_clean_and_its_batch_free(exported):
    _, folder = exported
    graph = onnx.load(folder / "step.onnx")
    for name, most in (("step", 68), ("prefill", 72)):  # of 12 layers 65 and 68
        nodes = nodes_per_op(onnx.load(folder / f"{name}.onnx", load_external_data=False))
        assert sum(nodes.values()) / DEPTH <= most, nodes
    content = (folder / "step.onnx").read_bytes() + (folder / "prefill.onnx").read_bytes()
    here = [
        Path(__file__).parents[1],
        Path.home(),
        sys.prefix,
        sys.base_prefix,
        tempfile.gettempdir(),
    ]
    for trace in [*map(str, here), "site-packages", ".py"]:
        assert trace.encode() not in content, trace
    for value in graph.graph.input:
        axis = 0 if value.name == "tokens" else 1
        assert value.type.tensor_type.shape.dim[axis].dim_param == "batch"
    assert {o.domain: o.version for o in graph.opset_import} == {"": 20}


def test_only_layers_of_rwkv_7_itself_are_traced_in_another_form(model):
    """A class that derives from one of them is traced as it is; afterwards all are as before."""

    class Derived(rwkv7.TimeMix7):
        pass

    graph = SequenceGraph(model.emb, model.backbone, model.head)
    with as_nodes(graph):
        assert type(graph) is Sequence7
    assert type(graph) is SequenceGraph
    mixer = model.backbone.blocks[1].time_mix
    mixer.__class__ = Derived
    try:
        with as_nodes(graph):
            assert type(graph) is SequenceGraph
    finally:
        mixer.__class__ = rwkv7.TimeMix7


@pytest.mark.parametrize("graph", ["step", "prefill"])
def test_states_are_written_last_so_that_buffers_may_be_shared(exported, model, graph):
    """Bind past and present to one buffer, as aliasing hosts do, and lose nothing."""
    import onnxruntime

    _, folder = exported
    runtime = rwkv_export.load(folder)
    session = onnxruntime.InferenceSession(folder / f"{graph}.onnx")
    shared = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array)
        for name, array in runtime.initial_state("step", 1).items()
    }
    expected = runtime.initial_state("step", 1)
    for token in (7, 7, 30, 200, 1):
        inputs = {"tokens": np.array([[token]], np.int64)}
        if graph == "prefill":
            inputs = {"tokens": np.arange(token, token + 21)[None], "positions": np.array([20])}
        binding = session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array)
        binding.bind_output("logits")
        for name, value in shared.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(f"{name}_out", value)
        session.run_with_iobinding(binding)
        expected = runtime(graph, {**inputs, **expected})
        np.testing.assert_array_equal(binding.get_outputs()[0].numpy(), expected.pop("logits"))
    for name, value in shared.items():
        np.testing.assert_array_equal(value.numpy(), expected[name])


def test_manifest_describes_the_graph_as_it_is(exported):
    _, folder = exported
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, info in manifest["graphs"].items():
        graph = onnx.load(folder / f"{name}.onnx").graph
        names = [t["name"] for t in info["inputs"] + info["state"]]
        assert names == [i.name for i in graph.input]
        outs = [*info["outputs"], *(f"{t['name']}_out" for t in info["state"])]
        assert outs == [o.name for o in graph.output]
        for described, value in zip(info["inputs"] + info["state"], graph.input, strict=True):
            dims = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            assert described["shape"] == dims
            dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
            assert described["dtype"] == dtype.name
    assert manifest["metadata"]["tokenizer"] == "bytes"
    assert set(manifest["metadata"]) == {"tokenizer", "vocab_size", "model"}


def test_runtime_writes_the_same_text_where_torch_does_not_exist(exported, model, run_python):
    _, folder = exported
    expected = model.generate("The ", **SETTINGS)
    code = f"""
import importlib.util, sys
assert importlib.util.find_spec("torch") is None
import rwkv_export
runtime = rwkv_export.load({str(folder)!r})
text = runtime.generate("The ", **{SETTINGS!r})
assert "".join(runtime.generate("The ", stream=True, **{SETTINGS!r})) == text
heavy = {{"torch", "timm", "torchvision", "onnx", "onnxscript"}} & set(sys.modules)
assert not heavy, heavy
print(ascii(text))
"""
    assert run_python(code, block=("torch", "timm", "torchvision", "onnx")).strip() == ascii(
        expected
    )


def test_predict_is_one_code_for_both(exported, model):
    _, folder = exported
    from rwkv_text.adapter import adapter

    tokens = [0, *b"some text"]
    ours = TorchRun(model, adapter.exports(model), adapter.metadata(model))
    runtime = rwkv_export.load(folder)
    assert not runtime._sessions  # a session is opened when its graph is needed
    np.testing.assert_allclose(
        rwkv_export.load(folder).predict(tokens), adapter.predict(ours, tokens), atol=2e-5
    )
    with pytest.raises(ValueError, match="token id 256 is outside the vocabulary of 256"):
        rwkv_export.load(folder).predict([256])


def test_drift_is_refused_and_nothing_written(model, tmp_path, monkeypatch):
    real = TorchRun.__call__

    def drifting(self, graph, inputs):
        out = real(self, graph, inputs)
        out["wkv"] = out["wkv"] + 1e-3
        return out

    monkeypatch.setattr(TorchRun, "__call__", drifting)
    with pytest.raises(ExportError, match=r"'step' disagrees with PyTorch: 'wkv' differs by"):
        rwkv_export.export(model, tmp_path / "out", steps=(1,))
    assert not list(tmp_path.iterdir())


def test_nan_weights_are_refused(model, tmp_path):
    import copy

    spoiled = copy.deepcopy(model)
    with torch.no_grad():
        spoiled.backbone.blocks[1].time_mix.w0[3] = float("nan")
    with pytest.raises(ExportError, match=r"blocks.1.time_mix.w0 holds values that are not finite"):
        rwkv_export.export(spoiled, tmp_path / "out", steps=(1,))
    assert not list(tmp_path.iterdir())


def test_a_mixer_that_does_not_export_says_so_before_it_starts(model, tmp_path, monkeypatch):
    mixer = model.backbone.blocks[1].time_mix
    monkeypatch.setattr(type(mixer), "exportable", False)
    with pytest.raises(
        ExportError, match=r"backbone.blocks.0.time_mix \(TimeMix7\) does not export"
    ):
        rwkv_export.export(model, tmp_path / "out")


@pytest.mark.slow  # traces again
def test_an_operation_without_translation_is_named(model, tmp_path, monkeypatch):
    mixer = type(model.backbone.blocks[0].channel_mix)

    def with_bessel(self, x):
        return torch.special.bessel_j0(x)

    monkeypatch.setattr(mixer, "expand", with_bessel)
    with pytest.raises(ExportError, match=r"graph 'step' cannot be written as ONNX: .*bessel_j0"):
        rwkv_export.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_and_one_that_cannot_be_written(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists already"):
        rwkv_export.export(model, tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        rwkv_export.export(model, tmp_path / "file" / "out")


def test_an_edited_or_incomplete_folder_is_refused(copied):
    for name in ("step.onnx", "weights.bin", "reference.safetensors"):
        file = copied / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(ExportError, match=f"{name} is not the file that was exported"):
            rwkv_export.load(copied)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    (copied / "step.onnx").unlink()
    with pytest.raises(ExportError, match=r"lacks the file 'step.onnx'"):
        rwkv_export.load(copied)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda m: m.update(format=99), "has format 99; this version reads 1"),
        (lambda m: m.pop("graphs"), "does not describe an exported model: KeyError"),
        (
            lambda m: m["graphs"]["step"].update(file="../step.onnx"),
            r"lacks the file '../step.onnx'",
        ),
        (
            lambda m: m["graphs"]["step"]["state"][0].update(dtype="object("),
            "does not describe an exported model",
        ),
    ],
)
def test_a_damaged_manifest_is_refused(copied, change, error):
    manifest = json.loads((copied / "manifest.json").read_text())
    change(manifest)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match=error):
        rwkv_export.load(copied)


def test_a_folder_that_is_no_export(tmp_path):
    with pytest.raises(ExportError, match=r"is not an exported model: no manifest.json"):
        rwkv_export.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(ExportError, match="does not describe an exported model"):
        rwkv_export.load(tmp_path)


def test_verbs_check_run_and_measure_a_folder_without_torch(exported, model, run_python):
    _, folder = exported
    code = f"""
from rwkv_core.cli import main
assert main(["verify", {str(folder)!r}]) == 0
assert main(["run", {str(folder)!r}, "The", "RW", "--max-tokens", "5"]) == 0
assert main(["bench", {str(folder)!r}, "--tokens", "4", "--prompt", "20", "--threads", "1"]) == 0
"""
    lines = run_python(code, block=("torch", "timm", "torchvision", "onnx")).splitlines()
    assert lines[0] == "files       4 as they were written"
    checked = [line.split()[1:4] for line in lines if line.startswith("graph ")][:2]
    assert checked == [["prefill:", "1", "calls,"], ["step:", "64", "calls,"]]
    assert any("torch 2" in line and "onnxruntime" in line for line in lines)
    assert any(line.startswith("The RW") for line in lines)
    speeds = {line.split()[0]: line.split()[1:] for line in lines[-2:]}
    assert speeds["step"][0] == "1"
    assert speeds["prefill"][0] == "20"
    assert all(float(x) > 0 for row in speeds.values() for x in row)


def test_verify_sees_answers_that_changed(copied):
    """Weights edited together with their hash are caught by what PyTorch had answered."""
    from rwkv_export import reference
    from rwkv_export.manifest import sha256

    weights = copied / "weights.bin"
    content = np.fromfile(weights, np.float32)
    content[len(content) // 2 :][:400] += 0.05
    content.tofile(weights)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["files"]["weights.bin"] = sha256(weights)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="does not answer as PyTorch did"):
        reference.check(rwkv_export.load(copied))


def test_weights_outside_of_the_folder_are_not_opened(copied):
    """A graph that points elsewhere does not open, even if its hash is what the manifest says."""
    from rwkv_export.manifest import sha256

    shutil.copy(copied / "weights.bin", copied.parent / "weights.bin")
    graph = onnx.load(copied / "step.onnx", load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../weights.bin"
    (copied / "step.onnx").write_bytes(graph.SerializeToString())
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["graphs"]["step"]["sha256"] = sha256(copied / "step.onnx")
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ExportError, match="does not open"):
        rwkv_export.load(copied).session("step")


@pytest.mark.parametrize(
    ("graph", "inputs", "error"),
    [
        ("step", {}, "also takes tokens"),
        ("step", {"tokens": np.zeros((1, 1), np.int32)}, r"takes 'tokens' as int64 .* got int32"),
        ("step", {"tokens": np.zeros((1, 2), np.int64)}, r"\[batch, 1\].*got int64 \[1, 2\]"),
        ("step", {"tokens": np.zeros((2, 1), np.int64)}, r"takes 'att_shift' .*'batch': 2"),
        ("step", {"tokens": np.zeros((1, 1), np.int64), "x": np.zeros(1)}, "has no input 'x'"),
    ],
)
def test_wrong_inputs_are_named(exported, graph, inputs, error):
    runtime = rwkv_export.load(exported[1])
    with pytest.raises(ExportError, match=error):
        runtime(graph, {**inputs, **runtime.initial_state(graph, 1)})


def test_a_state_of_another_model_is_refused(exported, model, tmp_path):
    runtime = rwkv_export.load(exported[1])
    state = model(torch.tensor([[0, 72, 105]])).state
    state.save(tmp_path / "ours")
    expected = {name: tensor.detach().numpy() for name, tensor in state.packed().items()}
    loaded = runtime.load_state(tmp_path / "ours")
    np.testing.assert_equal(loaded, expected)
    # the same memory goes on in both
    ours = model(torch.tensor([[33]]), state).logits_BTV[:, 0].detach().numpy()
    logits = runtime("step", {"tokens": np.array([[33]]), **loaded})["logits"]
    np.testing.assert_allclose(logits, ours, atol=2e-5)
    config = TextConfig(dim=64, depth=1, mixer_options={"head_dim": 32})
    other = checkpoint.build("text", config)
    other.init_state(1).save(tmp_path / "other")
    with pytest.raises(ExportError, match="belongs to another model"):
        runtime.load_state(tmp_path / "other")
    alien = {n: t.detach().numpy() for n, t in other.init_state(1).packed().items()}
    with pytest.raises(ExportError, match=r"takes 'att_shift' as float32 \[3, batch, 64\]"):
        runtime("step", {"tokens": np.array([[33]]), **alien})


@pytest.mark.slow  # traces again
def test_two_exports_in_one_process_are_the_same_file(model, exported, tmp_path):
    from rwkv_export.onnx import write_onnx
    from rwkv_export.weights import WeightFile

    from rwkv_text.model import step_spec

    weights = WeightFile(tmp_path / "weights.bin")
    write_onnx(step_spec(model), tmp_path / "step.onnx", weights=weights)
    assert (tmp_path / "step.onnx").read_bytes() == (exported[1] / "step.onnx").read_bytes()


@pytest.mark.slow
def test_agreement_holds_over_4096_steps(model, tmp_path):
    report = rwkv_export.export(model, tmp_path / "out")
    steps = {row["step"] for row in report.parity["graphs"]["step"]}
    assert {1, 16, 256, 4096} <= steps
    assert report.worst <= 2e-5
