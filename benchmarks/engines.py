"""Language models to race: one file of random weights, read by ours and by every peer's engine.

An engine is a function of tokens: ``read(tokens, fresh)`` feeds them at once, after those before or
with ``fresh`` from a document's start, and returns the logits [V] after the last one. Each maker
takes the folder that :func:`write` filled and raises :class:`race.Gap` where its engine cannot run.
"""

import contextlib
import ctypes
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_file
import numpy as np
import race
import torch

from rwkv_core import checkpoint
from rwkv_core.formats.convert import convert
from rwkv_core.precision import cast
from rwkv_core.testing import perturb
from rwkv_text import CausalLM, TextConfig, load

Engine = Callable[[list[int], bool], np.ndarray]
MODEL = "model.pth"  # under the official names, fp32


def write(config: TextConfig, folder: Path) -> None:
    """Write a model of random weights as ``model.pth`` in the official layout."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = CausalLM(config)
    perturb(model, 0.02)  # what starts at zero would hide a fault
    convert(checkpoint.save(model, folder / "ours"), folder / MODEL, "official")


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Engine:
    model = load(folder / MODEL)
    model = model if dtype == torch.float32 else cast(model, dtype)
    state = None

    @torch.inference_mode()
    def read(tokens: list[int], fresh: bool) -> np.ndarray:
        nonlocal state
        state = None if fresh else state
        tokens_BT = torch.tensor([tokens])
        if len(tokens) == 1:
            out = model(tokens_BT, state)
            state = out.state
            return out.logits_BTV[0, 0].float().numpy()
        # the head for the last token alone, as the peers do it
        state = model.init_state() if state is None else state
        x_BTD, layers = model.backbone(model.emb(tokens_BT), state.layers, tokens_BT)
        state = type(state)(layers, state.position + len(tokens), state.model)
        return model.head(x_BTD[0, -1]).float().numpy()

    return read


def ours_onnx(folder: Path, scheme: str = "fp32") -> Engine:
    """Our exported graphs in onnxruntime, their weights as they are or quantised."""
    race.installed("onnxruntime")
    import rwkv_export
    from rwkv_export.gate import ANYTHING

    whole = folder / "onnx"
    if not whole.exists():
        rwkv_export.export(load(folder / MODEL), whole, steps=(1, 8))
    if scheme != "fp32" and not (folder / scheme).exists():
        few = np.zeros((2, 8), np.int64)  # random weights have no quality to lose
        rwkv_export.compress(whole, folder / scheme, scheme, few, bounds=ANYTHING)
    runtime = rwkv_export.load(folder / scheme if scheme != "fp32" else whole,
                               threads=torch.get_num_threads())  # fmt: skip
    stream = runtime.stream(runtime.initial_state("step", 1))

    def read(tokens: list[int], fresh: bool) -> np.ndarray:
        nonlocal stream
        if fresh:
            stream = runtime.stream(runtime.initial_state("step", 1))
        if len(tokens) == 1:
            return stream("step", {"tokens": np.array([tokens])})["logits"][0].copy()
        inputs = {"tokens": np.array([tokens]), "positions": np.array([len(tokens) - 1])}
        return stream("prefill", inputs)["logits"][0, 0].copy()

    return read


def rwkv_pip(folder: Path) -> Engine:
    race.installed("rwkv")
    with contextlib.redirect_stdout(io.StringIO()):
        from rwkv.model import RWKV

        model = RWKV(model=str((folder / MODEL).with_suffix("")), strategy="cpu fp32")
    state: Any = None

    @torch.inference_mode()
    def read(tokens: list[int], fresh: bool) -> np.ndarray:
        nonlocal state
        logits, state = model.forward(tokens, None if fresh else state)
        return logits.float().numpy()

    return read


def transformers_rwkv4(folder: Path) -> Engine:
    race.installed("transformers")
    from transformers import RwkvForCausalLM

    if not (folder / "hf").exists():
        convert(folder / "ours", folder / "hf", "hf")
    model = RwkvForCausalLM.from_pretrained(folder / "hf").eval()
    state: Any = None

    @torch.inference_mode()
    def read(tokens: list[int], fresh: bool) -> np.ndarray:
        nonlocal state
        out = model(torch.tensor([tokens]), state=None if fresh else state, use_cache=True)
        state = out.state
        return out.logits[0, -1].numpy()

    return read


def rwkv_cpp(folder: Path, version: str, dtype: str = "FP32") -> Engine:
    """Run rwkv.cpp: a built checkout named by ``RWKV_CPP``, else the package of RWKV-4's days."""
    checkout = os.environ.get("RWKV_CPP")
    if checkout:
        home, modules = Path(checkout), Path(checkout, "python", "rwkv_cpp")
        script, kind = home / "python" / "convert_pytorch_to_ggml.py", dtype
    else:
        if version != "4":
            raise race.Gap("no package runs this generation: build a checkout, set RWKV_CPP to it")
        race.installed("rwkv_cpp_python")
        import importlib.util

        found = importlib.util.find_spec("rwkv_cpp")
        home = modules = Path(found.submodule_search_locations[0])
        script, kind = (
            home / "convert_pytorch_to_ggml.py",
            {"FP32": "float32"}.get(dtype, "float16"),
        )
    libraries = sorted(home.rglob("librwkv.*"))
    if not libraries:
        raise race.Gap(f"{home} holds no librwkv: build it")
    path = folder / f"rwkv_cpp_{dtype}.bin"
    command = [sys.executable, str(script), str(folder / MODEL), str(path), kind]
    subprocess.run(command, check=True, capture_output=True)
    sys.path.insert(0, str(modules))
    from rwkv_cpp_model import RWKVModel
    from rwkv_cpp_shared_library import RWKVSharedLibrary

    model = RWKVModel(
        RWKVSharedLibrary(str(libraries[0])), str(path), thread_count=torch.get_num_threads()
    )
    state: Any = None

    def read(tokens: list[int], fresh: bool) -> np.ndarray:
        nonlocal state
        state = None if fresh else state
        if len(tokens) > 1 and hasattr(model, "eval_sequence_in_chunks"):
            logits, state = model.eval_sequence_in_chunks(tokens, state)
        else:
            for token in tokens:
                logits, state = model.eval(token, state)
        return logits.numpy()

    return read


def llama_cpp(folder: Path, kind: str = "F32") -> Engine:
    """Run llama.cpp through its C interface; ``kind`` is F32, F16 Q8_0, Q4_0 or Q4_1."""
    race.installed("llama-cpp-python", "pip install --no-binary=:all: llama-cpp-python")
    race.installed("gguf")
    import llama_cpp as lib

    path = folder / f"{kind}.gguf"
    if not path.exists():
        gguf_file.write(folder / MODEL, path, kind)
    _quiet(lib)
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(os.fsencode(path), lib.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {path}")
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = lib.llama_init_from_model(model, settings)
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def read(tokens: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            lib.llama_memory_clear(lib.llama_get_memory(context), True)
        array = (lib.llama_token * len(tokens))(*tokens)  # the batch is a view of it
        if lib.llama_decode(context, lib.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")
        logits = lib.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(logits, (size,)).copy()

    return read


def _quiet(lib: Any) -> None:
    def ignore(level: int, text: bytes, data: ctypes.c_void_p) -> None:
        pass

    _quiet.callback = lib.llama_log_callback(ignore)  # C holds no reference to it
    lib.llama_log_set(_quiet.callback, ctypes.c_void_p(0))
