"""Folders for browsers: built once, whole or not at all, served so that pages get threads."""

import functools
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from threading import Thread

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from rwkv_export import web

from rwkv_core import checkpoint
from rwkv_core.cli import main
from rwkv_core.errors import ExportError
from rwkv_text import TextConfig

NODE = '#!/bin/sh\necho "${NODE_SAYS:-v22.1.0}"\n'
NPM = """#!/bin/sh
echo "$@" >> "$CALLS"
[ "$1" = "$NPM_FAILS_AT" ] && { echo "npm error: no network"; exit 1; }
[ "$1" = run ] || exit 0
mkdir dist && cp index.html dist
"""


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Return a folder of programs that stand for Node's; nothing else but the shell's is found."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {"node": NODE, "npm": NPM}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/bin")
    monkeypatch.setenv("RWKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return folder


def test_a_page_is_built_once_for_the_same_sources(tools, tmp_path, monkeypatch):
    page = web.page()
    assert (page / "index.html").read_text() == (web._sources() / "web/index.html").read_text()
    assert web.page() == page
    assert (tmp_path / "calls").read_text().split("\n") == ["ci", "run build", ""]
    monkeypatch.setattr(web, "SOURCES", ("web",))
    assert web._digest(web._sources()) != page.name


def test_what_npm_made_in_a_checkout_is_no_source():
    parts = {part for f in web._files(web._sources()) for part in f.parts}
    assert {"package-lock.json", ".npmrc", "main.ts", "text.mjs"} <= parts
    assert not {"node_modules", "dist"} & parts


@pytest.mark.parametrize("program", ["node", "npm"])
def test_a_missing_program_is_named(tools, monkeypatch, program):
    (tools / program).unlink()
    monkeypatch.setenv("PATH", str(tools))
    with pytest.raises(ExportError, match=f"there is no {program} on the PATH; install"):
        web.page()


@pytest.mark.parametrize("said", ["v20.18.3", "v8.0.0", "nonsense"])
def test_an_old_node_is_refused(tools, monkeypatch, said):
    monkeypatch.setenv("NODE_SAYS", said)
    with pytest.raises(ExportError, match=f"Node.js ≥ 20.19, but node --version says '{said}'"):
        web.page()


@pytest.mark.parametrize("step", ["ci", "run"])
def test_what_npm_said_is_passed_on_and_nothing_stays(tools, tmp_path, monkeypatch, step):
    monkeypatch.setenv("NPM_FAILS_AT", step)
    out = tmp_path / "site"
    with pytest.raises(ExportError, match=rf"npm {step}.* failed(.|\n)*npm error: no network"):
        web.site(out).__enter__()
    assert not out.exists()
    assert not (tmp_path / "cache").exists()


def test_the_command_ends_before_it_exports(tools, tmp_path, capsys, monkeypatch):
    (tools / "npm").unlink()
    monkeypatch.setenv("PATH", str(tools))
    config = TextConfig(dim=32, depth=1, mixer_options={"head_dim": 16})
    saved = str(checkpoint.save(checkpoint.build("text", config), tmp_path / "model"))
    assert main(["export", saved, str(tmp_path / "site"), "--web"]) == 2
    assert "there is no npm on the PATH" in capsys.readouterr().err
    assert main(["export", saved, str(tmp_path / "site"), "--web", "--mobile"]) == 2
    assert "--web chooses the graphs itself" in capsys.readouterr().err
    assert main(["export", saved, saved, "--web"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("scheme", "webgpu", "wasm"),
    [
        (None, "fp32", "fp32"),
        ("fp16", "fp16", "fp16"),
        ("int8-dynamic", "fp32", "int8-dynamic"),
        ("int4", "int4", "fp32"),
        ("int8", "int8", "fp32"),
    ],
)
def test_a_scheme_goes_where_it_runs_well(tmp_path, scheme, webgpu, wasm):
    for name in {"fp32", scheme} - {None}:
        (tmp_path / name).mkdir()
    web.assign(tmp_path, scheme)
    models = json.loads((tmp_path / web.MODELS).read_text())
    assert models == {"webgpu": webgpu, "wasm": wasm}
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {webgpu, wasm}


def test_tables_that_webgpu_does_not_read_are_refused(tmp_path):
    table = numpy_helper.from_array(np.zeros((4, 2), np.int8), "embed.8")
    node = helper.make_node("Gather", ["embed.8", "tokens"], ["y"])
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT32, [1])
    y = helper.make_tensor_value_info("y", TensorProto.INT8, [1, 2])
    for name in ("fp32", "int8"):
        (tmp_path / name).mkdir()
    model = helper.make_model(helper.make_graph([node], "g", [tokens], [y], [table]))
    onnx.save(model, tmp_path / "int8" / "step.onnx")
    with pytest.raises(ExportError, match=r"int8 stores embed\.8 in 8 bits.*--keep embed"):
        web.assign(tmp_path, "int8")
    assert not (tmp_path / web.MODELS).exists()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "index.html").write_text("a page")
    (tmp_path / "a.mjs").write_text("")
    (tmp_path / "a.wasm").write_text("")
    return tmp_path


def test_a_page_may_have_threads_and_no_file_is_served_stale(folder):
    with web.server(folder, 0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        types = {"": "text/html", "a.mjs": "text/javascript", "a.wasm": "application/wasm"}
        for name, kind in types.items():
            with urllib.request.urlopen(f"{address}/{name}") as answer:
                assert answer.headers["Content-Type"] == kind
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
                assert answer.headers["Cache-Control"] == "no-cache"
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address}/../{folder.name}/index.html/x")
        error.value.close()
        with pytest.raises(ExportError, match=r"cannot be used: .*--port"):
            web.server(folder, server.server_address[1])
        server.shutdown()


def test_a_folder_without_a_page_is_refused(tmp_path, capsys):
    assert main(["demo", "--web", str(tmp_path)]) == 2
    assert (
        "holds no page; write one with: rwkv export MODEL FOLDER --web" in capsys.readouterr().err
    )


def test_the_command_serves_until_ctrl_c(folder):
    command = [sys.executable, "-m", "rwkv_core.cli", "demo", "--web", str(folder), "--port", "0"]
    # what a shell starts in the background ignores Ctrl-C, and so would its children
    hears = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=hears, **pipes) as p:
        try:
            address = p.stdout.readline().strip()
            with urllib.request.urlopen(address, timeout=20) as answer:
                assert answer.read() == b"a page"
            p.send_signal(signal.SIGINT)
            _, errors = p.communicate(timeout=20)
        finally:
            p.kill()
    assert p.returncode == 0
    assert errors == ""
