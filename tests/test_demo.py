"""The demo, shortened: both models trained, exported, proven, and run without torch."""

import pytest

from rwkv_core.cli import main


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_shows_what_it_made(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--seconds", "5"]) == 0
    printed = capsys.readouterr().out
    for row in (
        "parameters", "training", "held-out bits/byte", "xz -9e", "5-gram", "export",
        "worst disagreement", "tokens/s PyTorch", "tokens/s onnxruntime", "test accuracy",
        "nearest neighbours", "pictures/s PyTorch", "pictures/s onnxruntime",
    ):  # fmt: skip
        assert row in printed, row
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {
        "text/onnx/step.onnx", "text/onnx/parity.json", "text/onnx/manifest.json",
        "digits/onnx/image.onnx", "digits/onnx/parity.json", "pictures/confusion.png",
        "pictures/predictions.png", "pictures/text-loss.png", "pictures/digits-loss.png",
        "text/sample.txt",
    } <= made  # fmt: skip
    assert main(["demo", "--out", str(out)]) == 2
