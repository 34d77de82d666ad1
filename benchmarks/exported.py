"""An exported RWKV-7 in onnxruntime, whole and quantised, beside llama.cpp and rwkv.cpp.

One file of random weights, 12 layers × 768, vocabulary 65,536, goes to every engine: speeds of that
shape; what quantisation costs in quality is measured by ``quantisation.py`` on a trained model.
Engines in fp32 are compared with our torch model's logits first. All take turns, and with them a
plain pass over memory: the weights that a token needs cannot be read faster, and ``of reading`` is
the share of that bound.

    pip install gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36
    RWKV_CPP=path/of/a/built/checkout/of/rwkv.cpp
    python benchmarks/exported.py [--quick] [--models FOLDER]    (making them takes ten minutes)
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import engines
import numpy as np
import race
import torch
from engines import Engine
from text_inference import ANY, FP32, LARGE, QUICK, answers

from rwkv_text import TextConfig

SCHEMES = ("int8", "int8-dynamic", "int4")
KINDS = ("F32", "Q8_0", "Q4_0", "Q4_1")  # of llama.cpp
READ = 512 << 20  # bytes, more than any cache holds
COLUMNS = {
    "MB": ".0f", "|Δ logit|": ".1e", "decode tok/s": ".1f", "best decode": ".1f",
    "of reading": ".0%", "prefill tok/s": ".0f", "best prefill": ".0f",
}  # fmt: skip


def main() -> None:
    parser = race.arguments(__doc__)
    parser.add_argument("--models", type=Path, help="folder of the models, made where missing")
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded per round")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt")
    args = parser.parse_args()
    race.prepare(args.threads)
    rounds = args.rounds or (2 if args.quick else 5)
    config = TextConfig(**(QUICK if args.quick else LARGE), mixer="rwkv7")
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        rows = compete(config, args.models or Path(name), rounds, args.decode, args.prefill)
    print(race.table(rows, COLUMNS))
    settings = {"rounds": rounds, "decode": args.decode, "prefill": args.prefill}
    name = race.name("exported", args)
    race.write(name, rows, settings)
    race.plot(name, race.bars(rows, ["decode tok/s", "prefill tok/s"]))
    race.finish(rows)


def contestants(folder: Path) -> dict[str, tuple[float, Callable[[], Engine], Path]]:
    """Return by name: how far logits may be from ours, the maker, and the file of the weights."""
    onnx = {"fp32": folder / "onnx", **{scheme: folder / scheme for scheme in SCHEMES}}
    found = {
        f"ours, {name}": (FP32 if name == "fp32" else ANY,
                          partial(engines.ours_onnx, folder, name), path / "weights.bin")
        for name, path in onnx.items()
    }  # fmt: skip
    for kind in KINDS:
        limit = FP32 if kind == "F32" else ANY
        make = partial(engines.llama_cpp, folder, kind)
        found[f"llama.cpp, {kind}"] = limit, make, folder / f"{kind}.gguf"
    for kind in ("FP32", "Q4_0"):
        limit = FP32 if kind == "FP32" else ANY
        make = partial(engines.rwkv_cpp, folder, "7", kind)
        found[f"rwkv.cpp, {kind}"] = limit, make, folder / f"rwkv_cpp_{kind}.bin"
    return found


def compete(
    config: TextConfig, folder: Path, rounds: int, decode: int, prefill: int
) -> list[race.Row]:
    if not (folder / engines.MODEL).exists():
        engines.write(config, folder)
    tokens = np.random.default_rng(0).integers(1, config.vocab_size, max(decode, prefill)).tolist()
    expected = answers(engines.ours(folder), tokens)

    def enter(limit: float, make: Callable[[], Engine]) -> tuple[Engine, float]:
        engine = make()
        worst = float(np.abs(answers(engine, tokens) - expected).max())
        return engine, race.compare(worst, limit)

    makers = contestants(folder)
    present, rows = race.line_up({n: partial(enter, *maker[:2]) for n, maker in makers.items()})
    memory = torch.zeros(READ // 4)
    runs: dict[tuple[str, str], Callable[[], object]] = {("memory", "read"): memory.sum}
    for who, (engine, _) in present.items():
        runs[who, "prefill"] = partial(engine, tokens[:prefill], True)
        runs[who, "decode"] = lambda e=engine: [e([token], False) for token in tokens[:decode]]
    times = race.interleave(runs, rounds)
    rate = READ / times["memory", "read"].median
    found: dict[str, race.Row] = {row["name"]: row for row in rows}
    for who, (_, worst) in present.items():
        size = makers[who][2].stat().st_size
        a_token = size * (1 - config.vocab_size * config.dim / parameters(folder))  # no embedding
        found[who] = {
            "name": who,
            "MB": size / 1e6,
            "|Δ logit|": worst,
            "of reading": a_token * decode / times[who, "decode"].median / rate,
        }
        for task, n in (("decode", decode), ("prefill", prefill)):
            time = times[who, task]
            found[who] |= {f"{task} tok/s": n / time.median, f"best {task}": n / time.minimum}
    read = {"name": f"memory, {rate / 1e9:.1f} GB/s", "MB": READ / 1e6}
    return [*(found[name] for name in makers), read]


def parameters(folder: Path) -> int:
    """Return how many weights the model has."""
    tensors = torch.load(folder / engines.MODEL, weights_only=True, mmap=True)
    return sum(tensor.numel() for tensor in tensors.values())


if __name__ == "__main__":
    main()
