"""The export of a language model as large as people use, and of tiny trained ones, in figures.

    pytest -m slow -s tests/test_export_full_size.py

RWKV-7 of 12 layers × 768 and a vocabulary of 65,536 with random weights: five minutes, 4 GB.
"""

import numpy as np
import onnx
import pytest
import rwkv_export
import torch

import rwkv_text
from rwkv_core import checkpoint
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

pytestmark = pytest.mark.slow

TOKENS = 200
LENGTHS = (1, 7, 64, 100)
SPLITS = 3  # of 96 tokens into six pieces


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Return the model of random weights and its folder."""
    torch.manual_seed(0)
    model = checkpoint.build("text", TextConfig(dim=768, depth=12, vocab_size=65536))
    perturb(model, 0.02)
    folder = tmp_path_factory.mktemp("large") / "out"
    rwkv_export.export(model.eval(), folder, steps=(1, 16))
    return model, folder


@torch.inference_mode()
def teacher_forced(model, runtime):
    """Return the worst differences of logits from PyTorch, of the steps and of the prefill."""
    tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=TOKENS)
    expected = model(torch.from_numpy(tokens)[None]).logits_BTV[0].numpy()
    stream, off = runtime.stream(runtime.initial_state("step", 1)), []
    for token, logits in zip(tokens, expected, strict=True):
        found = stream("step", {"tokens": np.array([[token]])})["logits"][0]
        off.append(np.abs(found - logits).max())
    inputs = {"tokens": tokens[None], "positions": np.arange(TOKENS)}
    found = runtime.stream(runtime.initial_state("prefill", 1))("prefill", inputs)["logits"][0]
    return np.max(off), np.abs(found - expected).max(), np.abs(expected).max()


def at_once_and_by_steps(runtime, pieces):
    """Return the worst differences of the last logits and of the states."""
    tokens = np.random.default_rng(sum(pieces)).integers(
        runtime.metadata["vocab_size"], size=(1, sum(pieces))
    )
    step, prefill = (runtime.stream(runtime.initial_state(g, 1)) for g in ("step", "prefill"))
    for t in range(tokens.shape[1]):
        expected = step("step", {"tokens": tokens[:, t : t + 1]})["logits"]
    for begin, size in zip(np.cumsum([0, *pieces[:-1]]), pieces, strict=True):
        inputs = {"tokens": tokens[:, begin : begin + size], "positions": np.array([size - 1])}
        found = prefill("prefill", inputs)["logits"][:, 0]
    states = [np.abs(prefill.state[n] - x).max() for n, x in step.state.items()]
    return np.abs(found - expected).max(), np.max(states)


def proven(name, model, folder, *, relative=False):
    """Print the differences and hold them to the bounds, of 1 or of the largest logit."""
    runtime = rwkv_export.load(folder, threads=1)
    step, prefill, largest = teacher_forced(model, runtime)
    rng = np.random.default_rng(0)
    cuts = [sorted(rng.choice(np.arange(1, 96), 5, replace=False)) for _ in range(SPLITS)]
    splits = [[int(n) for n in np.diff([0, *cut, 96])] for cut in cuts]
    seen = [at_once_and_by_steps(runtime, p) for p in [*([n] for n in LENGTHS), *splits]]
    logits, states = np.max(seen, 0)
    print(
        f"\n{name}: {TOKENS} teacher-forced tokens, logits up to {largest:.1f}: step off by "
        f"{step:.1e}, prefill by {prefill:.1e}; prefill from step at T = 1, 7, 64, 100 and 96 in "
        f"{SPLITS} splits of six: logits {logits:.1e}, states {states:.1e}"
    )
    scale = largest if relative else 1.0
    assert np.max([step, prefill]) <= 2e-5 * scale
    assert np.max([logits, states]) <= 5e-5 * scale


def test_the_large_model_is_equal(large):
    proven("RWKV-7, 12 × 768, 65,536", *large)


def test_a_layer_is_few_nodes(large):
    _, folder = large
    for name, limit in {"step": 65, "prefill": 68}.items():
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        print(f"\n{name}: {len(graph.node)} nodes, {len(graph.node) / 12:.1f} per layer")
        assert len(graph.node) / 12 <= limit


@pytest.mark.shared
@pytest.mark.parametrize("name", ["4v0-660K", "5v2-730K", "7v0-834K"])
def test_trained_models_are_equal(name, shared_data, tmp_path):
    model = rwkv_text.load(shared_data / f"rwkv_cpp_tiny/tiny-rwkv-{name}-FP32.bin").eval()
    rwkv_export.export(model, tmp_path / "out", steps=(1, 16))
    # generation 5 normalises first tokens that fp32 knows to five digits
    proven(f"tiny trained RWKV {name}", model, tmp_path / "out", relative=name.startswith("5"))
