"""Decoding and prefill of every generation beside the engines that run the same weights.

One file of random weights goes to every engine. Their logits are compared with ours first, token by
token and after a prompt read at once; then they take turns. Each case is a process of its own. The
last one is an RWKV-7 of 191 million parameters, 12 layers × 768, vocabulary 65,536, low ranks
64, 64, 32 and 128, where llama.cpp and 16-bit weights come in; Q8_0 is there for information.

    pip install rwkv==0.8.32 transformers==5.23.0 gguf
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install llama-cpp-python==0.3.36
    RWKV_CPP=path/of/a/built/checkout/of/rwkv.cpp    (pip install rwkv_cpp_python is RWKV-4 alone)
    python benchmarks/text_inference.py [--quick] [--case 4 5.0 5.1 5.2 6 7 191M]
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import numpy as np
import race
import torch
from engines import Engine

from rwkv_text import TextConfig

Maker = Callable[[Path], Engine]
MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "4": ("rwkv4", {}),
    "5.0": ("rwkv5", {"per_channel": False, "gate": False, "exp_bonus": True}),
    "5.1": ("rwkv5", {"per_channel": False}),
    "5.2": ("rwkv5", {}),
    "6": ("rwkv6", {}),
    "7": ("rwkv7", {}),
    "191M": ("rwkv7", {}),
}
SMALL = {"dim": 512, "depth": 6, "vocab_size": 1024}
LARGE = {"dim": 768, "depth": 12, "vocab_size": 65536}
QUICK = {"dim": 256, "depth": 2, "vocab_size": 1024}
FP32, HALF, ANY = 1e-3, 0.2, float("inf")  # how far a logit may be from ours in fp32
OURS = "ours, fp32"
COLUMNS = {
    "|Δ logit|": ".1e", "decode tok/s": ".1f", "best decode": ".1f", "ours/this decode": ".2f",
    "prefill tok/s": ".0f", "best prefill": ".0f", "ours/this prefill": ".2f",
}  # fmt: skip


def main() -> None:
    parser = race.arguments(__doc__)
    parser.add_argument("--case", nargs="+", choices=list(MIXERS), default=list(MIXERS))
    parser.add_argument("--decode", type=int, default=32, help="tokens decoded per round")
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--child", action="store_true", help="one case, in this process")
    args = parser.parse_args()
    rounds = args.rounds or (2 if args.quick else 5)
    if args.child:
        lengths = args.decode, args.prefill
        rows = one_case(args.case[0], args.quick, rounds, *lengths, args.threads)
        print(json.dumps(rows))
        return
    rows: list[race.Row] = []
    for case in args.case:
        command = [sys.executable, __file__, "--child", "--case", case, "--rounds", str(rounds)]
        command += ["--decode", str(args.decode), "--prefill", str(args.prefill)]
        command += ["--threads", str(args.threads)]
        command += ["--quick"] if args.quick else []
        # `rwkv` chooses its class and its kernels from these, when it is imported
        env = {**os.environ, "RWKV_V7_ON": "1" if MIXERS[case][0] == "rwkv7" else "0",
               "RWKV_JIT_ON": "1", "RWKV_CUDA_ON": "0", "OMP_NUM_THREADS": str(args.threads),
               "PYTHONWARNINGS": "ignore::FutureWarning"}  # fmt: skip
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:  # an engine may take the process along
            why = f"the process ended with status {done.returncode}"
            found = [{"case": case, "name": "all", "disqualified": why}]
        else:
            found = json.loads(done.stdout.splitlines()[-1])
        print(f"\nRWKV-{case}, {found[0].get('sizes', '')}")
        print(race.table(found, COLUMNS), flush=True)
        rows += found
    settings = {"rounds": rounds, "decode": args.decode, "prefill": args.prefill}
    name = race.name("text_inference", args)
    race.write(name, rows, settings)
    last = [row for row in rows if row["case"] == args.case[-1]]
    race.plot(name, race.bars(last, ["decode tok/s", "prefill tok/s"]))
    race.finish(rows)


def contestants(case: str) -> dict[str, tuple[float, Maker]]:
    """Return the rivals of our fp32: by name, how far their logits may be, and the maker."""
    version = "7" if case == "191M" else case
    found: dict[str, tuple[float, Maker]] = {
        "rwkv, fp32": (FP32, engines.rwkv_pip),
    }
    if case == "4":
        found["transformers, fp32"] = (FP32, engines.transformers_rwkv4)
    found["rwkv.cpp, fp32"] = (FP32, lambda f: engines.rwkv_cpp(f, version))
    if case == "191M":
        found["ours, bf16"] = (HALF, lambda f: engines.ours(f, torch.bfloat16))
        found["ours, ONNX fp32"] = (FP32, engines.ours_onnx)
        found["rwkv.cpp, fp16"] = (HALF, lambda f: engines.rwkv_cpp(f, version, "FP16"))
        for kind, limit in (("F32", FP32), ("F16", HALF), ("Q8_0", ANY)):
            found[f"llama.cpp, {kind}"] = (limit, lambda f, k=kind: engines.llama_cpp(f, k))
    return found


def one_case(
    case: str, quick: bool, rounds: int, decode: int, prefill: int, threads: int
) -> list[race.Row]:
    race.prepare(threads)
    mixer, options = MIXERS[case]
    sizes = QUICK if quick else LARGE if case == "191M" else SMALL
    config = TextConfig(**sizes, mixer=mixer, mixer_options=options)
    length = {"decode": decode, "prefill": prefill}
    tokens = np.random.default_rng(0).integers(1, sizes["vocab_size"], max(length.values()))
    tokens = tokens.tolist()
    # what peers print belongs to the log; the last line of stdout is the result
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        engines.write(config, folder)
        ours = engines.ours(folder)
        expected = answers(ours, tokens)

        def enter(limit: float, make: Maker) -> tuple[Engine, float]:
            engine = make(folder)
            worst = float(np.abs(answers(engine, tokens) - expected).max())
            return engine, race.compare(worst, limit)

        makers = {n: lambda c=c: enter(*c) for n, c in contestants(case).items()}
        present, rows = race.line_up({OURS: lambda: (ours, 0.0), **makers})
        runs: dict[tuple[str, str], Callable[[], object]] = {}
        for who, (engine, _) in present.items():
            runs[who, "prefill"] = lambda e=engine: e(tokens[:prefill], True)
            runs[who, "decode"] = lambda e=engine: [e([t], False) for t in tokens[:decode]]
        times = race.interleave(runs, rounds)
    found: dict[str, race.Row] = {row["name"]: row for row in rows}
    for who, (_, worst) in present.items():
        found[who] = {"name": who, "|Δ logit|": worst}
    for (who, task), time in times.items():
        found[who] |= {
            f"{task} seconds": [time.median, time.minimum],
            f"{task} tok/s": length[task] / time.median,
            f"best {task}": length[task] / time.minimum,
            f"ours/this {task}": time.median / times[OURS, task].median,
        }
    about = {"case": case, "sizes": ", ".join(f"{k} {v}" for k, v in sizes.items())}
    return [{**about, **found[who]} for who in (OURS, *makers)]


def answers(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Return the logits after each of 16 tokens read singly, and after the others read at once."""
    one_by_one = [engine([token], i == 0) for i, token in enumerate(tokens[:16])]
    return np.stack([*one_by_one, engine(tokens[16:], False)])


if __name__ == "__main__":
    main()
