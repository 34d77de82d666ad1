"""Every generation as an exported step: proven, small, and right for models nobody here made."""

import numpy as np
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


@pytest.mark.parametrize("mixer", list(NODES))
def test_a_step_of_every_generation_is_proven_and_runs_alone(mixer, tmp_path):
    options = {"head_dim": 32} if "head_dim" in MIXERS[mixer].options() else {}
    config = TextConfig(dim=64, depth=DEPTH, mixer=mixer, mixer_options=options)
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    report = rwkv_export.export(model, tmp_path / "out", steps=(1, 16, 256))
    assert report.worst <= 2e-5
    assert report.nodes["step"] / DEPTH <= NODES[mixer]
    runtime = rwkv_export.load(tmp_path / "out")
    settings = {"max_tokens": 60, "temperature": 0.8, "top_p": 0.9, "seed": 5}
    assert runtime.generate("RW", **settings) == model.generate("RW", **settings)


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
