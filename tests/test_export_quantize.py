"""Quantised folders: every matrix smaller, the same contract, and a gate that refuses."""

import dataclasses
import json

import numpy as np
import onnx
import pytest
import rwkv_export
import torch
from rwkv_export import reference
from rwkv_export._compress import compress
from rwkv_export.gate import ANYTHING, Bounds, compare_answers
from rwkv_export.half_states import in_half
from rwkv_export.heldout import held_out
from rwkv_export.quantize import layers_of, matrices, outliers, quantized

from rwkv_core import checkpoint
from rwkv_core.errors import ExportError
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

pytestmark = pytest.mark.slow

# random weights say nothing about quality: what is measured here is that it is measured
SIZE = {"fp16": 0.60, "int8": 0.36, "int8-dynamic": 0.36, "int4": 0.28}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    config = TextConfig(dim=128, depth=2, mixer_options={"head_dim": 64})
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    folder = tmp_path_factory.mktemp("quantize") / "out"
    rwkv_export.export(model, folder, steps=(1, 16))
    return folder


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(0).integers(256, size=(2, 100))


@pytest.mark.parametrize("scheme", list(SIZE))
def test_every_matrix_is_quantised_and_the_folder_keeps_its_contract(
    exported, tokens, scheme, tmp_path
):
    made = compress(exported, tmp_path / "small", scheme, tokens, bounds=ANYTHING)
    before, after = rwkv_export.load(exported), rwkv_export.load(tmp_path / "small")
    wanted = matrices(onnx.load(exported / "step.onnx"))
    assert made.matrices == len(wanted) >= 13
    assert "embed.weight" in wanted
    for name in ("step", "prefill"):
        graph = onnx.load(tmp_path / "small" / f"{name}.onnx")
        big = [
            i.name
            for i in graph.graph.initializer
            if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) == 2 and min(i.dims) >= 64
        ]
        assert not big
        assert [t.name for t in graph.graph.input] == [
            t.name for t in onnx.load(exported / f"{name}.onnx").graph.input
        ]
    ratio = (tmp_path / "small/weights.bin").stat().st_size / (
        exported / "weights.bin"
    ).stat().st_size
    assert ratio <= SIZE[scheme]
    # both graphs still tell the same story
    ids = tokens[:1, :21]
    at_once = after(
        "prefill",
        {"tokens": ids, "positions": np.array([20]), **after.initial_state("prefill", 1)},
    )
    stream = after.stream(after.initial_state("step", 1))
    for token in ids[0]:
        logits = stream("step", {"tokens": np.array([[token]])})["logits"]
    exact = scheme == "fp16"
    np.testing.assert_allclose(at_once["logits"][:, 0], logits, atol=2e-5 if exact else 0.1)
    assert before.metadata == {n: v for n, v in after.metadata.items() if n != "quantization"}
    reference.check(after)  # within what was measured when it was made
    said = json.loads((tmp_path / "small/parity.json").read_text())["quantization"]
    assert said["scheme"] == scheme
    assert said["quality"]["kl"] == made.quality.kl > 0
    assert np.isfinite(list(said["quality"].values())).all()
    with pytest.raises(ExportError, match="quantised already"):
        compress(tmp_path / "small", tmp_path / "again", scheme, tokens)


def test_quality_is_that_of_the_definitions(exported, tokens):
    run = rwkv_export.load(exported)
    same = compare_answers(run, run, tokens)
    assert (same.kl, same.top1, same.greedy, same.worst_logit) == (0, 1, 1, 0)
    logits = np.concatenate([_logits(run, row)[:-1] for row in tokens])
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(tokens[:, 1:].reshape(-1))
    )
    assert same.loss == pytest.approx(expected.item(), rel=1e-9)


def test_beyond_the_bounds_it_is_refused_and_the_worst_layers_named(exported, tokens, tmp_path):
    strict = Bounds(kl=1e-9)
    with pytest.raises(ExportError, match="int4 is refused: KL") as error:
        compress(exported, tmp_path / "small", "int4", tokens, bounds=strict)
    named = str(error.value).split("What costs most: ")[1].split(". Keep")[0].split(", ")
    layers = {name.split(" ")[0] for name in named}
    assert len(layers) == 3
    assert layers <= {"blocks.0", "blocks.1", "embed", "head"}
    assert not list(tmp_path.iterdir())
    # what is named and kept is no longer quantised
    made = compress(exported, tmp_path / "kept", "int4", tokens, bounds=ANYTHING, keep=layers)
    rest = layers_of(matrices(onnx.load(exported / "step.onnx")))
    assert made.matrices == sum(len(own) for name, own in rest.items() if name not in layers)
    with pytest.raises(ExportError, match=r"no layer or weight 'blocks\.9'; layers: "):
        compress(exported, tmp_path / "no", "int4", tokens, keep=["blocks.9"])


def test_four_bits_take_data_to_be_rounded_by_and_other_data_to_be_judged_by(
    exported, tokens, tmp_path
):
    with pytest.raises(ExportError, match="judged by the others; got 1, give at least two"):
        compress(exported, tmp_path / "small", "int4", tokens[:1], bounds=ANYTHING)
    made = compress(exported, tmp_path / "small", "int4", tokens, bounds=ANYTHING)
    runs = rwkv_export.load(exported), rwkv_export.load(tmp_path / "small")
    assert made.quality == compare_answers(*runs, tokens[1:])
    alone = onnx.load(exported / "step.onnx")
    rounded = quantized(alone, "int4")
    name = "backbone.blocks.1.time_mix.key.weight.int4"
    small = onnx.load(tmp_path / "small" / "step.onnx")
    with_data, without = (next(i for i in m.graph.initializer if i.name == name)
                          for m in (small, rounded))  # fmt: skip
    share = np.mean(onnx.numpy_helper.to_array(with_data) != onnx.numpy_helper.to_array(without))
    assert share > 0.1, "the data had no part in it"


def test_moments_are_those_of_every_token_however_it_is_read(exported, tokens):
    from rwkv_export.moments import moments

    at_once = rwkv_export.load(exported)
    singly = rwkv_export.load(exported)
    del singly.graphs["prefill"]
    a, b = (moments(run, tokens[:, :20]) for run in (at_once, singly))
    assert a.keys() == b.keys()
    assert len(a) >= 12
    for name in a:
        np.testing.assert_allclose(a[name], b[name], rtol=1e-3, atol=1e-3 * np.abs(a[name]).max())


def test_a_matrix_with_outliers_gets_more_bits(exported):
    model = onnx.load(exported / "step.onnx")
    name = "backbone.blocks.1.time_mix.key.weight"
    tensor = next(i for i in model.graph.initializer if i.name == name)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[::32] *= 40  # one large weight in every block
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, name))
    assert outliers(model, list(matrices(model))) == [name]
    nodes = [n for n in quantized(model, "int4").graph.node if n.op_type == "MatMulNBits"]
    bits = {a.i for n in nodes if "blocks.1.time_mix.key" in n.input[1] for a in n.attribute
            if a.name == "bits"}  # fmt: skip
    assert bits == {8}
    assert {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"} == {4}


def test_the_command_quantises_on_held_out_data_of_the_models_own(tmp_path, capsys):
    from rwkv_core.cli import main

    text = tmp_path / "text.txt"
    text.write_text("a few words, again and again. " * 200)
    config = TextConfig(dim=64, depth=1, mixer_options={"head_dim": 32}, data=str(text))
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    checkpoint.save(model, tmp_path / "model")
    folders = [str(tmp_path / "model"), str(tmp_path / "out")]
    flags = ["--steps", "4", "--quantize", "int8"]
    assert main(["export", *folders, *flags]) == 0
    assert "matrices in int8: KL " in capsys.readouterr().out
    assert main(["verify", folders[1]]) == 0
    assert main(["export", *folders, *flags]) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_classifier_passes_the_gate_or_names_what_it_lost(classifier, tmp_path):
    model = classifier(embed_dim=64)
    rwkv_export.export(model.eval(), tmp_path / "whole")
    images, labels = held_out(model)
    assert len(images) == len(labels) > 1
    made = compress(tmp_path / "whole", tmp_path / "small", "int8", images, labels=labels,
                    bounds=ANYTHING)  # fmt: skip
    assert made.matrices >= 4
    before, after = (
        rwkv_export.load(tmp_path / name)("image", {"image": images})["logits"].argmax(-1)
        for name in ("whole", "small")
    )
    assert made.quality.drop == (before == labels).mean() - (after == labels).mean()
    # right is what the model answers; so an answer that changes is one that was lost
    strict = dataclasses.replace(ANYTHING, drop=-0.5)
    with pytest.raises(ExportError, match=r"int8 is refused: accuracy .* lower. What costs most"):
        compress(tmp_path / "whole", tmp_path / "no", "int8", images, labels=before, bounds=strict)
    # without classes there is a file without NaN
    compress(tmp_path / "whole", tmp_path / "unlabelled", "int8", images, bounds=ANYTHING)
    said = json.loads(
        (tmp_path / "unlabelled/parity.json").read_text(), parse_constant=lambda name: 1 / 0
    )
    assert "kl" in said["quantization"]["quality"]
    assert "loss" not in said["quantization"]["quality"]


def test_states_in_half_are_carried_by_every_graph(exported, tokens, tmp_path):
    made = compress(exported, tmp_path / "half", "fp16", tokens, bounds=ANYTHING, half_states=True)
    whole = compress(exported, tmp_path / "whole", "fp16", tokens, bounds=ANYTHING)
    assert made.quality.kl > whole.quality.kl  # it rounds, and the gate sees it
    assert made.quality.worst_logit <= 1e-2
    runtime = rwkv_export.load(tmp_path / "half")
    reference.check(runtime)
    state = runtime.initial_state("prefill", 2)
    assert {x.dtype for x in state.values()} == {np.dtype(np.float16)}
    out = runtime("prefill", {"tokens": tokens[:, :7], "positions": np.array([6]), **state})
    state = {name: out[name] for name in state}
    out = runtime("step", {"tokens": tokens[:, 7:8], **state})
    assert {out[name].dtype for name in state} == {np.dtype(np.float16)}
    expected = rwkv_export.load(tmp_path / "whole")
    state = expected.initial_state("prefill", 2)
    positions = np.array([7])
    found = expected("prefill", {"tokens": tokens[:, :8], "positions": positions, **state})
    np.testing.assert_allclose(out["logits"], found["logits"][:, 0], atol=1e-2)
    for name in state:
        bound = 4e-3 * np.abs(found[name]).max()
        np.testing.assert_allclose(out[name].astype(np.float32), found[name], rtol=0, atol=bound)


def test_states_in_half_begin_where_they_began(tmp_path):
    torch.manual_seed(0)
    options = {"head_dim": 32, "tuned_state": True}
    model = checkpoint.build("text", TextConfig(dim=64, depth=1, mixer_options=options))
    perturb(model, 0.05)
    rwkv_export.export(model, tmp_path / "out", steps=(1,))
    tokens = np.arange(60).reshape(2, 30)
    compress(tmp_path / "out", tmp_path / "half", "fp16", tokens, bounds=ANYTHING, half_states=True)
    before, after = (rwkv_export.load(tmp_path / name) for name in ("out", "half"))
    expected = before.initial_state("step", 2)["wkv"]
    assert expected.any()
    np.testing.assert_array_equal(
        after.initial_state("step", 2)["wkv"], expected.astype(np.float16)
    )
    with pytest.raises(ExportError, match="the state 'wkv' begins at -1e\\+38, which fp16 cannot"):
        in_half("wkv", np.array([-1e38], np.float32))


def test_unknown_schemes_and_empty_data(exported, tokens, tmp_path):
    with pytest.raises(ExportError, match="unknown quantisation 'int5'; did you mean"):
        compress(exported, tmp_path / "small", "int5", tokens)
    with pytest.raises(ExportError, match="cannot measure quality"):
        compress(exported, tmp_path / "small", "fp16", tokens[:0])
    assert not list(tmp_path.iterdir())


def _logits(run, tokens):
    from rwkv_text.host import feed

    return feed(run, list(map(int, tokens)))[0]
