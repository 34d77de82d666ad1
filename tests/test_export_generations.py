"""Every generation as an exported step: proven, small, and right for models nobody here made."""

import numpy as np
import onnx
import pytest
import rwkv_export
import torch

from rwkv_core import checkpoint
from rwkv_core.registry import MIXERS
from rwkv_core.testing import perturb
from rwkv_text import TextConfig, load
from rwkv_text.host import feed

DEPTH = 3
NODES = {"rwkv4": 55, "rwkv5": 46, "rwkv6": 63}  # of one layer


@pytest.mark.slow
@pytest.mark.parametrize("mixer", NODES)
def test_a_step_of_every_generation_is_proven_and_runs_alone(mixer, tmp_path):
    known = MIXERS[mixer].options()
    options = {"head_dim": 32} if "head_dim" in known else {}
    if "tuned_state" in known:
        options["tuned_state"] = True
    config = TextConfig(dim=64, depth=DEPTH, mixer=mixer, mixer_options=options)
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    report = rwkv_export.export(model, tmp_path / "out", steps=(1, 16, 256))
    assert report.worst <= 2e-5
    if "tuned_state" in known:
        first = rwkv_export.load(tmp_path / "out").initial_state("prefill", 2)["wkv"]
        expected = torch.stack([b.time_mix.time_state for b in model.backbone.blocks]).detach()
        assert expected.any()
        np.testing.assert_array_equal(first, expected.numpy()[:, None].repeat(2, 1))
    assert report.nodes["step"] / DEPTH <= NODES[mixer]
    assert len(report.parity["graphs"]["prefill = step"]) == 7
    runtime = rwkv_export.load(tmp_path / "out")
    settings = {"max_tokens": 60, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    assert runtime.generate("RW", **settings) == model.generate("RW", **settings)


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["linear_attention", "chunk"])
@pytest.mark.parametrize("mixer", ["rwkv5", "rwkv6", "rwkv7"])
def test_every_lane_is_proven_and_writes_the_same_text(mixer, lane, tmp_path):
    config = TextConfig(dim=64, depth=2, mixer=mixer, mixer_options={"head_dim": 32})
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    report = rwkv_export.export(model, tmp_path / "out", steps=(1, 16, 256), lane=lane)
    assert report.worst <= 2e-5
    graph = onnx.load(tmp_path / "out" / f"{'chunk' if lane == 'chunk' else 'prefill'}.onnx")
    ops = {node.op_type for body in (graph.graph, *graph.functions) for node in body.node}
    if lane == "chunk":
        assert not ops & {"Scan", "Loop", "Shape", "CumSum", "Einsum"}
        assert all(d.dim_value for i in graph.graph.input for d in i.type.tensor_type.shape.dim)
    else:
        assert "LinearAttention" in ops
    prompt = "A prompt of forty-one bytes, or so it is."
    settings = {"max_tokens": 64, "temperature": 0.0}
    runtime = rwkv_export.load(tmp_path / "out")
    assert runtime.generate(prompt, **settings) == model.generate(prompt, **settings)
    tokens = list(prompt.encode())
    ours = model(torch.tensor([tokens])).logits_BTV[0].detach()
    np.testing.assert_allclose(feed(runtime, tokens)[0], ours, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "bound"), [("4v0-660K", 5e-6), ("5v2-730K", 5e-6), ("7v0-834K", 1e-6)]
)
def test_the_exported_tiny_models_give_their_published_logits(shared_data, name, bound, tmp_path):
    folder = shared_data / "rwkv_cpp_tiny"
    rwkv_export.export(load(folder / f"tiny-rwkv-{name}-FP32.bin"), tmp_path / "out", steps=(1, 16))
    logits, _ = feed(rwkv_export.load(tmp_path / "out"), [34, 105, 110])
    expected = np.fromfile(folder / f"expected-logits-{name}.bin", np.float32)
    assert np.abs(logits[-1] - expected).max() <= bound
    assert torch.from_numpy(expected).abs().max() > 2
