"""A third party's domain: installed from examples/, trained, exported and run without torch."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "recall"


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """Return a folder with the example installed into it."""
    site = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
            "--disable-pip-version-check", "--no-index", "--target", str(site), str(EXAMPLE),
        ],
        check=True,
        cwd=site,
    )  # fmt: skip
    return site


def test_the_example_is_under_100_lines_of_code():
    lines = [
        line
        for file in (EXAMPLE / "recall").glob("*.py")
        for line in file.read_text().splitlines()
        if line.strip()
    ]
    assert len(lines) < 100


def test_it_keeps_the_contract_trains_exports_and_runs_without_torch(plugin, run_python):
    head = f"import sys; sys.path.insert(0, {str(plugin)!r})\n"
    run_python(
        head
        + """
import torch; torch.set_num_threads(1)
from rwkv_core.cli import main
from rwkv_core.registry import ADAPTERS
from rwkv_core.testing import check_adapter
assert "recall" in ADAPTERS and "recall" not in sys.modules
check_adapter("recall", ADAPTERS["recall"].Config(events=8, batch_size=4), onnx=False)  # below
small = ["--set", "train.steps=3", "--set", "task.batch_size=4", "--set", "train.threads=1"]
assert main(["train", "recall", "--out", "run", *small]) == 0
assert main(["eval", "run"]) == 0
assert main(["export", "run", "out", "--steps", "16"]) == 0
""",
        block=(),
    )
    out = run_python(
        head
        + """
import rwkv_export
print(rwkv_export.load("out").predict([1, 9, 17]))
assert "torch" not in sys.modules
"""
    )
    assert len(eval_list(out)) == 3


def eval_list(text: str) -> list[int]:
    return [int(item) for item in text.strip().strip("[]").split(",")]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_recall_needs_the_delta_rule(plugin, seed, tmp_path, run_python):
    """RWKV-7 overwrites what a key holds; the same model without the delta term cannot."""
    code = f"""
import sys; sys.path.insert(0, {str(plugin)!r})
import torch; torch.set_num_threads(1)
from dataclasses import replace
from rwkv_core.mixers import rwkv7
from rwkv_core.registry import MIXERS, RECIPES
from rwkv_core.train import train

class NoDelta(rwkv7.TimeMix7):
    def project(self, mixed, shared):
        p, shared = super().project(mixed, shared)
        return p._replace(b_H1K=torch.zeros_like(p.b_H1K)), shared

MIXERS.register("nodelta", rwkv7.Generation(NoDelta, rwkv7.ChannelMix7))
config = RECIPES["recall"]()
config = replace(config, train=replace(config.train, seed={seed}, threads=1))
for mixer in ("rwkv7", "nodelta"):
    run = replace(config, task=replace(config.task, mixer=mixer))
    print(train(run, mixer).metrics["accuracy"])
"""
    with_delta, without = map(float, run_python(code, block=()).split())
    assert with_delta >= 0.99
    assert without <= 0.96
