"""Exported folders in other languages' hosts: the same tokens, text and classes as in Python."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import rwkv_export
import torch
from PIL import Image
from rwkv_export import web
from rwkv_export.gate import ANYTHING

from rwkv_core import checkpoint
from rwkv_core.cli import main
from rwkv_core.testing import perturb
from rwkv_text import TextConfig, host
from rwkv_text.sampling import Sampler
from rwkv_text.tokenizer import tokenizer
from rwkv_text.vocabulary import package_file
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.host import FILTERS, decode, preprocess

pytestmark = pytest.mark.slow

RUNTIMES = Path(__file__).parents[1] / "export" / "runtimes"
PROMPT = "The state is a matrix: größer, 状態, 🙂.  1,024\t"
TOKENS = 64


def greedy(folder: Path, count: int = TOKENS) -> list[int]:
    """Return what Python's runtime writes greedily after the prompt."""
    runtime = rwkv_export.load(folder, threads=1)
    name, rows = runtime.metadata["tokenizer"], runtime.metadata["vocab_size"]
    tok = tokenizer(name, beside=folder, rows=rows)
    known = tok.byte_lengths() > 0
    known[0] = True
    sampler = Sampler(temperature=0)
    return list(host.stream_tokens(runtime, tok.encode(PROMPT), sampler, count, known))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a language model over bytes, its weights numbers of 16 bits."""
    torch.manual_seed(1)
    config = TextConfig(dim=64, depth=2, mixer_options={"head_dim": 32})
    model = checkpoint.build("text", config)
    perturb(model, 0.3)
    model.half().float()
    return checkpoint.save(model, tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def texts(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return exported language models by what is special about them."""
    folder = tmp_path_factory.mktemp("texts")
    model = checkpoint.load(saved)
    lanes = {"bytes": "web", "phone": "mobile"}
    for name, lane in lanes.items():
        rwkv_export.export(model, folder / name, steps=(1, 16), lane=lane)
    made = {name: folder / name for name in lanes}
    if vocabulary := package_file():
        path = shutil.copy(vocabulary, folder / "rwkv_vocab_v20230424.txt")
        config = TextConfig(
            dim=32, depth=1, tokenizer=str(path), vocab_size=65536, mixer_options={"head_dim": 32}
        )
        torch.manual_seed(1)
        model = checkpoint.build("text", config)
        perturb(model, 0.3)
        rwkv_export.export(model, folder / "world", steps=(1, 16), lane="chunk")
        made["world"] = folder / "world"
    made["half"] = half(folder)
    return made


def half(folder: Path) -> Path:
    """Return an exported model whose states are fp16, one of them tuned."""
    options = {"head_dim": 32, "tuned_state": True}
    torch.manual_seed(1)
    model = checkpoint.build("text", TextConfig(dim=64, depth=2, mixer_options=options))
    perturb(model, 0.3)
    rwkv_export.export(model, folder / "tuned", steps=(1, 16), lane="web")
    tokens = np.arange(60).reshape(2, 30)
    rwkv_export.compress(
        folder / "tuned", folder / "half", "fp16", tokens, bounds=ANYTHING, half_states=True
    )
    return folder / "half"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return pictures of several kinds: colour, transparent, grey, of a phone held sideways."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(3)
    color = rng.integers(0, 256, (37, 50, 3), np.uint8)
    Image.fromarray(color).save(folder / "color.png")
    clear = rng.integers(0, 256, (14, 31, 4), np.uint8)
    Image.fromarray(clear).save(folder / "clear.png")
    Image.fromarray(color[..., 0]).save(folder / "grey.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(color).save(folder / "turned.png", exif=turned)
    return [folder / f"{name}.png" for name in ("color", "clear", "grey", "turned")]


@pytest.fixture(scope="module")
def classifiers(
    paint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Return exported classifiers: one in colour and bicubic, one in grey and bilinear."""
    folder = tmp_path_factory.mktemp("classifiers")
    data = paint(folder / "colors")
    kinds = {"color": (3, "bicubic"), "grey": (1, "bilinear")}
    for name, (channels, interpolation) in kinds.items():
        config = ClassifyConfig(
            model="test_vrwkv",
            model_options={"embed_dim": 16, "depth": 1, "patch_size": 4},
            data=str(data),
            image_size=(12, 16),
            channels=channels,
            interpolation=interpolation,
            mean=(0.4, 0.5, 0.6)[:channels],
            std=(0.2, 0.25, 0.3)[:channels],
        )
        model = checkpoint.build("classify", config)
        perturb(model, 0.3)
        lane = {"color": "web", "grey": "scan"}[name]
        rwkv_export.export(model.eval(), folder / name, lane=lane)
    return {name: folder / name for name in kinds}


@pytest.fixture(scope="module")
def node() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return ``node(*arguments)``, which runs Node in the folder of the desktop host."""
    folder = RUNTIMES / "node"
    if not (program := shutil.which("node")):
        pytest.skip("Node.js is not installed")
    if not (folder / "node_modules").is_dir():
        pytest.skip(f"run `npm ci` in {folder}, or `make test-web`")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        result = subprocess.run([program, *arguments], cwd=folder, capture_output=True, timeout=120)
        # as it is: text mode would make one newline of each kind
        return subprocess.CompletedProcess(
            result.args, result.returncode, result.stdout.decode(), result.stderr.decode()
        )

    return run


def script(node: Callable[..., subprocess.CompletedProcess[str]], code: str, *given: object) -> str:
    """Return what a module prints that finds ``given`` in ``given``."""
    code = f"const given = {json.dumps(given)};\n{code}"
    result = node("--input-type=module", "--eval", code)
    assert result.returncode == 0, result.stderr
    return result.stdout


TOKENS_IN_NODE = """
import { open } from './model.mjs';
const [folder, prompt, maxTokens] = given;
const model = await open(folder, { threads: 1 });
const ids = [];
for await (const id of model.tokens(prompt, { temperature: 0, maxTokens })) ids.push(id);
console.log(JSON.stringify(ids));
"""


@pytest.mark.parametrize("name", ["bytes", "world", "phone", "half"])
def test_node_writes_the_tokens_that_python_writes(texts, node, name):
    if name not in texts:
        pytest.skip("the World vocabulary is not installed: pip install 'rwkv-toolkit[world]'")
    expected = greedy(texts[name])
    assert len(expected) == TOKENS
    assert len(set(expected)) > 4  # no constant answer
    assert json.loads(script(node, TOKENS_IN_NODE, str(texts[name]), PROMPT, TOKENS)) == expected
    arguments = ["--temperature", "0", "--max-tokens", str(TOKENS), "--threads", "1"]
    result = node("main.mjs", str(texts[name]), PROMPT, *arguments)
    runtime = rwkv_export.load(texts[name], threads=1)
    text = "".join(runtime.generate(PROMPT, temperature=0, max_tokens=TOKENS))
    assert result.stdout == text + "\n", result.stderr


@pytest.mark.parametrize("name", ["color", "grey"])
def test_node_sees_the_pixels_and_names_the_class_that_python_does(
    classifiers, pictures, node, name
):
    folder = classifiers[name]
    runtime = rwkv_export.load(folder, threads=1)
    result = node("main.mjs", str(folder), *map(str, pictures))
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    expected = [runtime.predict([path])[0] for path in pictures]
    assert [row[:2] for row in rows] == [
        [str(path), p.label] for path, p in zip(pictures, expected, strict=True)
    ], result.stderr
    confidences = [float(row[2]) for row in rows]
    np.testing.assert_allclose(confidences, [p.confidence for p in expected], atol=1e-4)


PIXELS_IN_NODE = """
import { fromRgba, preprocess } from '../common/vision.mjs';
const [pictures, metadata] = given;
console.log(JSON.stringify(pictures.map(([width, height, rgba]) => {
  const picture = fromRgba(Uint8Array.from(rgba), width, height, metadata.channels);
  return [...preprocess(picture, metadata).data];
})));
"""


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(12, 16), (41, 100), (37, 9)])
def test_the_hosts_resize_as_pillow_does_to_the_byte(pictures, node, interpolation, size):
    metadata = {
        "image_size": size,
        "interpolation": interpolation,
        "channels": 3,
        "mean": [0.4, 0.5, 0.6],
        "std": [0.2, 0.25, 0.3],
    }
    raw = [Image.open(path).convert("RGBA") for path in pictures[:3]]
    given = [[*p.size, np.asarray(p).ravel().tolist()] for p in raw]
    got = json.loads(script(node, PIXELS_IN_NODE, given, metadata))
    for path, values in zip(pictures[:3], got, strict=True):
        # Pillow chooses which axis comes first, for a last bit; the hosts begin with the rows
        picture = decode(path, 3)
        rows = picture.resize((size[1], picture.height), FILTERS[interpolation])
        expected = preprocess(rows, metadata)
        assert np.array_equal(np.array(values, np.float32), expected.ravel()), path


HALVES_IN_NODE = """
import { readFileSync, writeFileSync } from 'node:fs';
import { fromHalves, toHalf } from '../common/halves.mjs';
const read = (array, name) => new array(readFileSync(`${given[0]}/${name}`).buffer);
writeFileSync(`${given[0]}/halves`, Uint16Array.from(read(Float32Array, 'numbers'), toHalf));
writeFileSync(`${given[0]}/back`, fromHalves(read(Uint16Array, 'every')));
"""


@np.errstate(over="ignore")
def test_node_rounds_to_halves_as_numpy_does(node, tmp_path):
    every = np.arange(1 << 16, dtype=np.uint16)
    halves = every.view(np.float16).astype(np.float32)
    whole = np.sort(halves[np.isfinite(halves)])
    middle = np.append((whole[1:] + whole[:-1]) / 2, np.array([-65520, 65520], np.float32))
    around = [np.nextafter(middle, np.float32(to)) for to in (-np.inf, np.inf)]
    extremes = np.array([1e-45, -1e-30, 1e38], np.float32)
    numbers = np.concatenate([halves, middle, *around, extremes])
    every.tofile(tmp_path / "every")
    numbers.tofile(tmp_path / "numbers")
    script(node, HALVES_IN_NODE, str(tmp_path))
    got = np.fromfile(tmp_path / "halves", np.uint16)
    is_nan = np.isnan(numbers)
    assert np.array_equal(got[~is_nan], numbers[~is_nan].astype(np.float16).view(np.uint16))
    assert np.isnan(got[is_nan].view(np.float16)).all()
    back = np.fromfile(tmp_path / "back", np.float32)
    np.testing.assert_array_equal(back, halves)
    assert np.array_equal(np.signbit(back[back == 0]), np.signbit(halves[halves == 0]))


STATE_IN_NODE = """
import { readFile } from 'node:fs/promises';
import { fromHalves } from '../common/halves.mjs';
import { initialState, readManifest } from '../common/manifest.mjs';
const read = (name) => readFile(`${given[0]}/${name}`);
const { graphs } = await readManifest(read);
graphs.step.state.push({ name: 'tenth', dtype: 'float16', shape: [2, 'batch'], initial: 0.1 });
const state = await initialState(graphs.step, read);
console.log(JSON.stringify(Object.entries(state).map(
  ([name, { type, data, dims }]) => [name, type, [...fromHalves(data)], dims],
)));
"""


def test_node_begins_with_states_in_half(texts, node):
    state = rwkv_export.load(texts["half"], threads=1).initial_state("step", 1)
    assert state["wkv"].any()
    assert {values.dtype for values in state.values()} == {np.dtype(np.float16)}
    expected = {**state, "tenth": np.full((2, 1), 0.1, np.float16)}
    got = json.loads(script(node, STATE_IN_NODE, str(texts["half"])))
    assert [name for name, *_ in got] == list(expected)
    for name, dtype, values, shape in got:
        assert dtype == "float16"
        np.testing.assert_array_equal(np.reshape(values, shape), expected[name], err_msg=name)


ENCODE_IN_NODE = """
import { readFileSync } from 'node:fs';
import { PileTokenizer } from '../common/pile.mjs';
const [path, texts] = given;
const tokenizer = new PileTokenizer(readFileSync(path, 'utf8'));
console.log(JSON.stringify(texts.map((text) => tokenizer.encode(text))));
"""


def test_node_reads_byte_level_bpe_as_tokenizers_does(node, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator([Path(__file__).read_text()], trainer)
    bpe.add_tokens(["  ", "    "])
    path = tmp_path / "20B_tokenizer.json"
    bpe.save(str(path))
    given = [
        PROMPT,
        "it's we'll    def f(x):\n\n    return  x",
        "e\u0301t\u00e9 \u00bd\u00a0\n",
        "",
    ]
    expected = [bpe.encode(text, add_special_tokens=False).ids for text in given]
    assert json.loads(script(node, ENCODE_IN_NODE, str(path), given)) == expected


@pytest.mark.parametrize("file", ["weights.bin", "step.onnx"])
def test_node_refuses_a_folder_that_was_edited_by_a_byte(texts, node, tmp_path, file):
    folder = shutil.copytree(texts["bytes"], tmp_path / "edited")
    content = bytearray((folder / file).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / file).write_bytes(content)
    result = node("main.mjs", str(folder), "x")
    assert result.returncode == 1
    assert f"{file} is not the file that was exported" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], "usage: node main.mjs FOLDER"),
        (["missing", "x"], "this is not an exported model"),
        (["FOLDER", "a\0b"], "NUL"),
        (["FOLDER", "x", "--top-p", "0"], r"top-p must be in (0, 1], got 0"),
        (["FOLDER", "x", "--seed", "s"], "--seed takes a number, got s"),
        (["FOLDER", "x", "--sed", "1"], "Unknown option '--sed'"),
    ],
)
def test_node_says_what_is_wrong(texts, node, arguments, error):
    if any("\0" in argument for argument in arguments):
        code = "import('./model.mjs').then(async (m) => { for await (const _ of (await m.open("
        code += f"{json.dumps(str(texts['bytes']))})).tokens('a\\0b')); }})"
        result = node("--eval", code)
    else:
        given = [str(texts["bytes"]) if a == "FOLDER" else a for a in arguments]
        result = node("main.mjs", *given)
    assert result.returncode == 1
    assert error in result.stderr


@pytest.fixture(scope="module")
def browser(
    texts: dict[str, Path], classifiers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Return ``browser(query, isolated=True, **what to do) -> what the page showed``.

    The page is served with the exported folders beside it as ``text-*`` and ``image-*``; of those,
    WebGPU is given ``image-color`` and WebAssembly ``text-phone``.
    """
    folder = RUNTIMES / "test"
    programs = {name: shutil.which(name) for name in ("node", "npm", "chromium")}
    for name, program in programs.items():
        if not program:
            pytest.skip(f"{name} is not installed")
    if not (folder / "node_modules").is_dir():
        pytest.skip(f"run `npm ci` in {folder}, or `make test-web`")
    site = tmp_path_factory.mktemp("web") / "site"
    with web.site(site) as temporary:
        for kind, folders in {"text": texts, "image": classifiers}.items():
            for name, exported in folders.items():
                (temporary / f"{kind}-{name}").symlink_to(exported)
        models = {"webgpu": "image-color", "wasm": "text-phone"}
        (temporary / web.MODELS).write_text(json.dumps(models))
    plain = ThreadingHTTPServer(("127.0.0.1", 0), partial(Plain, directory=str(site)))
    servers = {True: web.server(site, 0), False: plain}
    for server in servers.values():
        Thread(target=server.serve_forever, daemon=True).start()

    def visit(
        query: str = "", *, isolated: bool = True, port: int = 0, **given: object
    ) -> dict[str, Any]:
        port = port or servers[isolated].server_address[1]
        given |= {"url": f"http://127.0.0.1:{port}/{query}", "chromium": programs["chromium"]}
        result = subprocess.run(
            [str(programs["node"]), "drive.mjs", json.dumps(given)],
            cwd=folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        assert not found["errors"]
        return found

    yield visit
    for server in servers.values():
        server.shutdown()
        server.server_close()


class Plain(SimpleHTTPRequestHandler):
    """What any static server does."""

    def log_message(self, *_: object) -> None:
        pass


Plain.extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}


def screenshot(name: str) -> str | None:
    """Return where to keep a picture of the page, if RWKV_SCREENSHOTS names a folder."""
    folder = os.environ.get("RWKV_SCREENSHOTS")
    return folder and f"{folder}/{name}.png"


@pytest.mark.parametrize(
    ("name", "isolated", "backend"),
    [("bytes", True, "wasm"), ("bytes", False, "wasm"), ("bytes", True, "webgpu"),
     ("world", True, "wasm"), ("phone", True, "wasm"), ("half", True, "wasm")],
)  # fmt: skip
def test_chromium_writes_the_tokens_that_python_writes(texts, browser, name, isolated, backend):
    if name not in texts:
        pytest.skip("the World vocabulary is not installed: pip install 'rwkv-toolkit[world]'")
    found = browser(
        f"?model=text-{name}&backend={backend}",
        isolated=isolated, webgpu=backend == "webgpu", prompt=PROMPT, maxTokens=TOKENS,
        screenshot=screenshot(f"{name}-{backend}"),
    )  # fmt: skip
    assert found["phase"] == "text", found["status"]
    assert found["isolated"] == isolated
    threads = "thread" if not isolated else "threads"
    assert found["status"].endswith("WebGPU" if backend == "webgpu" else threads), found["status"]
    assert found["tokens"] == greedy(texts[name]), found["speed"]
    runtime = rwkv_export.load(texts[name], threads=1)
    text = "".join(runtime.generate(PROMPT, temperature=0, max_tokens=TOKENS))
    assert found["text"] == text
    assert re.fullmatch(r"64 tokens · \d+\.\d tokens/s", found["speed"])
    assert_drawn(texts[name], found)


def assert_drawn(folder: Path, found: dict[str, Any]) -> None:
    """Check the picture of the last layer's matrices after the prompt and the tokens found."""
    runtime = rwkv_export.load(folder, threads=1)
    stream = runtime.stream(runtime.initial_state("step", 1))
    tok = tokenizer(runtime.metadata["tokenizer"], beside=folder)
    for token in [0, *tok.encode(PROMPT), *found["tokens"]]:
        stream("step", {"tokens": np.array([[token]])})
    wkv_HKV = stream.state["wkv"][-1, 0].astype(np.float32)
    # what is too small to be seen may be either
    negative = ((wkv_HKV < 0) & (np.abs(wkv_HKV) > 1e-4 * np.abs(wkv_HKV).max())).sum()
    assert abs(found["state"]["blue"] - negative) <= 0.02 * wkv_HKV.size
    assert wkv_HKV.size / 2 < found["state"]["drawn"] <= wkv_HKV.size


def test_the_page_draws_states_in_half_where_the_browser_has_no_such_array(texts, browser):
    query = "?model=text-half&backend=wasm"
    found = browser(query, prompt=PROMPT, maxTokens=8, without="Float16Array")
    assert found["phase"] == "text", found["status"]
    assert found["tokens"] == greedy(texts["half"], 8), found["speed"]
    assert_drawn(texts["half"], found)


@pytest.mark.parametrize("backend", ["wasm", "webgpu"])
def test_chromium_computes_the_logits_that_python_computes(texts, browser, backend):
    ids = [0, *PROMPT.encode()][:21]  # a chunk and some more
    runtime = rwkv_export.load(texts["bytes"], threads=1)
    stream = runtime.stream(runtime.initial_state("step", 1))
    for token in ids:
        logits = stream("step", {"tokens": np.array([[token]])})["logits"]
    found = browser(f"?model=text-bytes&backend={backend}", webgpu=backend == "webgpu", ids=ids)
    assert found["phase"] == "text", found["status"]
    for how, got in zip(("at once", "one by one"), found["logits"], strict=True):
        np.testing.assert_allclose(got, logits.ravel(), rtol=0, atol=1e-4, err_msg=how)


def test_each_backend_gets_its_model_and_webassembly_what_webgpu_refuses(browser, pictures):
    found = browser(webgpu=True, pictures=[str(pictures[0])])
    assert found["phase"] == "image", found["status"]
    assert found["status"].startswith("image-color"), found["status"]
    assert found["status"].endswith("WebGPU"), found["status"]
    assert browser()["status"].startswith("text-phone")
    # its free dimensions are computed on the processor
    assert browser("?model=image-grey", webgpu=True)["status"].endswith("threads")
    # SwiftShader has no fp16
    assert browser("?model=text-half", webgpu=True)["status"].endswith("threads")


@pytest.mark.parametrize("name", ["color", "grey"])
def test_chromium_names_the_class_that_python_does(classifiers, pictures, browser, name):
    runtime = rwkv_export.load(classifiers[name], threads=1)
    expected = [runtime.predict([path])[0] for path in pictures]
    found = browser(
        f"?model=image-{name}&backend=wasm",
        pictures=[*map(str, pictures)],
        screenshot=screenshot(f"image-{name}"),
    )
    assert found["phase"] == "image", found["status"]
    assert [label for label, _ in found["classes"]] == [p.label for p in expected]
    shares = [float(share.removesuffix(" %")) for _, share in found["classes"]]
    np.testing.assert_allclose(shares, [100 * p.confidence for p in expected], atol=0.25)


def test_the_page_looks_through_a_camera(browser):
    found = browser("?model=image-color&backend=wasm", camera=True)
    assert found["watching"] == "Stop"
    assert re.fullmatch(r"\d+ ms", found["note"])


def test_an_export_for_the_web_opens_by_itself(saved, texts, browser, tmp_path, capsys):
    site = tmp_path / "site"
    arguments = [str(saved), str(site), "--web", "--steps", "16", "--quantize", "fp16"]
    data = tmp_path / "text.txt"
    data.write_text("To be, or not to be, that is the question. " * 99)
    assert main(["export", *arguments, "--data", str(data)]) == 0, capsys.readouterr().err
    assert json.loads((site / web.MODELS).read_text()) == {"webgpu": "fp16", "wasm": "fp16"}
    server = web.server(site, 0)
    Thread(target=server.serve_forever, daemon=True).start()
    found = browser(port=server.server_address[1], prompt=PROMPT, maxTokens=8)
    server.shutdown()
    server.server_close()
    assert found["status"].startswith("fp16 · WebAssembly"), found["status"]
    assert found["tokens"] == greedy(texts["bytes"], 8)


@pytest.mark.parametrize(
    ("query", "error"),
    [
        ("?model=absent", "this is not an exported model: http"),
        ("?model=text-bytes&backend=webgpu", "this browser does not offer webgpu"),
    ],
)
def test_the_page_says_what_is_wrong(browser, query, error):
    found = browser(query, screenshot=screenshot("failed"))
    assert found["phase"] == "failed"
    assert found["status"].startswith(error)


def test_the_page_opens_a_folder_of_the_visitor(texts, browser):
    found = browser(folder=str(texts["bytes"]), prompt=PROMPT, maxTokens=8)
    assert found["phase"] == "text", found["status"]
    assert found["tokens"] == greedy(texts["bytes"], 8)


def test_the_page_refuses_a_folder_that_was_edited_by_a_byte(texts, browser, tmp_path):
    folder = shutil.copytree(texts["bytes"], tmp_path / "edited")
    content = bytearray((folder / "weights.bin").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "weights.bin").write_bytes(content)
    found = browser(folder=str(folder))
    assert found["phase"] == "failed"
    assert "weights.bin is not the file that was exported" in found["status"]
