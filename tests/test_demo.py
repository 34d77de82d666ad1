"""The demo, shortened: both models trained, exported, proven, run without torch, and on a page."""

import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from urllib.parse import urljoin

import pytest

from rwkv_core._files import cache_folder
from rwkv_core.cli import main

# in place of Node's: the page is the one that was written, not built
TOOLS = {
    "node": "echo v22.1.0",
    "npm": '[ "$1" = ci ] || { mkdir dist && cp index.html dist; }',
}


@pytest.mark.slow
def test_the_demo_runs_end_to_end_and_shows_what_it_made(tmp_path, capsys):
    out, printed = tmp_path / "demo", []
    with start(tmp_path, "--web", "--out", out, "--seconds", "5", "--port", "0") as p:
        try:
            for line in p.stdout:
                printed.append(line)
                if line == "Ctrl-C stops\n":
                    break
            said = "".join(printed)
            pages = [line.strip() for line in printed if line.startswith("http://127.0.0.1:")]
            queries = [page.partition("?")[2] for page in pages]
            assert queries == ["model=text", "model=digits"], said
            for page in pages:
                assert b'<canvas id="state"' in read(page)
                check_served(urljoin(page, f"{page.partition('=')[2]}/"))
            p.send_signal(signal.SIGINT)
            assert p.communicate(timeout=20)[0].strip() == ""
        finally:
            p.kill()
    assert p.returncode == 0
    for row in (
        "parameters", "training", "held-out bits/byte", "xz -9e", "5-gram", "export",
        "worst disagreement", "tokens/s PyTorch", "tokens/s onnxruntime", "test accuracy",
        "nearest neighbours", "pictures/s PyTorch", "pictures/s onnxruntime",
    ):  # fmt: skip
        assert row in said, row
    made = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert {
        "text/onnx/step.onnx", "text/onnx/parity.json", "text/onnx/manifest.json",
        "digits/onnx/image.onnx", "digits/onnx/parity.json", "pictures/confusion.png",
        "pictures/predictions.png", "pictures/text-loss.png", "pictures/digits-loss.png",
        "text/sample.txt",
    } <= made  # fmt: skip
    assert main(["demo", "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err


def start(folder, *arguments):
    """Return ``rwkv demo`` started, with stand-ins for Node's programs."""
    (folder / "bin").mkdir()
    for name, text in TOOLS.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    (folder / "cache").mkdir()
    (folder / "cache" / "native").symlink_to(cache_folder("native"))
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "rwkv_core.cli", "demo", *map(str, arguments)],
        env={**os.environ, "PATH": path, "RWKV_CACHE": str(folder / "cache")},
        # what a shell starts in the background ignores Ctrl-C, and so would its children
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def check_served(model):
    """Check that a model's files are at the address ``model`` as the manifest there has them."""
    manifest = json.loads(read(urljoin(model, "manifest.json")))
    graphs = {graph["file"]: graph["sha256"] for graph in manifest["graphs"].values()}
    assert graphs
    for file, digest in {**manifest["files"], **graphs}.items():
        assert hashlib.sha256(read(urljoin(model, file))).hexdigest() == digest, file


def read(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        return answer.read()
