"""One folder on old and new onnxruntimes: the same file, the same answers.

Older versions are looked for in the virtual environments that RWKV_ONNXRUNTIMES names, separated
like PATH. Each needs onnxruntime and numpy:

    python -m venv old && old/bin/pip install onnxruntime==1.18.1 "numpy<2"
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rwkv_export

from rwkv_core import checkpoint
from rwkv_core.testing import perturb
from rwkv_text import TextConfig

ANSWER = """
import sys, numpy as np, onnxruntime
folder = sys.argv[1]
arrays = dict(np.load(folder + "/inputs.npz"))
state = {name: arrays[name] for name in arrays if name not in ("tokens", "positions")}
def session(graph):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(f"{folder}/{graph}.onnx", options, ["CPUExecutionProvider"])
prefill, step = session("prefill"), session("step")
def run(session, inputs):
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs)))
out = run(prefill, {"tokens": arrays["tokens"], "positions": arrays["positions"], **state})
state = {name: out[name + "_out"] for name in state}
after = run(step, {"tokens": arrays["tokens"][:, :1], **state})
np.savez(folder + "/answers.npz", prefill=out["logits"], **after)
print(onnxruntime.__version__)
"""


def interpreters():
    folders = os.environ.get("RWKV_ONNXRUNTIMES", "")
    return [Path(f) / "bin" / "python" for f in folders.split(os.pathsep) if f]


@pytest.fixture(scope="module", params=["scan", "linear_attention"])
def folder(request, tmp_path_factory):
    """Return an exported folder with inputs, and what the installed onnxruntime answers."""
    import torch

    torch.manual_seed(0)
    config = TextConfig(dim=64, depth=2, mixer_options={"head_dim": 32})
    model = checkpoint.build("text", config)
    perturb(model, 0.05)
    folder = tmp_path_factory.mktemp("runtimes") / "out"
    rwkv_export.export(model, folder, steps=(1, 16), lane=request.param)
    runtime = rwkv_export.load(folder)
    tokens = np.random.default_rng(0).integers(256, size=(2, 37))
    inputs = {"tokens": tokens, "positions": np.arange(37)}
    state = runtime.initial_state("prefill", 2)
    out = runtime("prefill", {**inputs, **state})
    expected = {"prefill": out.pop("logits")}
    after = runtime("step", {"tokens": tokens[:, :1], **out})
    expected |= {n if n == "logits" else f"{n}_out": x for n, x in after.items()}
    np.savez(folder / "inputs.npz", **inputs, **state)
    return folder, expected


@pytest.mark.slow
def test_the_same_file_runs_on_every_onnxruntime_since_1_18(folder):
    folder, expected = folder
    found = [python for python in interpreters() if python.exists()]
    if not found:
        pytest.skip("RWKV_ONNXRUNTIMES names no virtual environments with older versions")
    seen = []
    for python in found:
        command = [str(python), "-c", ANSWER, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{python}\n{done.stderr}"
        seen.append(done.stdout.strip())
        answers = np.load(folder / "answers.npz")
        for name, array in expected.items():
            bound = 1e-5 * max(1.0, float(np.abs(array).max()))
            np.testing.assert_allclose(answers[name], array, rtol=0, atol=bound, err_msg=seen[-1])
    assert len(set(seen)) == len(found), seen
    print(*seen)
