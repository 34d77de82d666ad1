"""Every generation beside the packages that run it: equal logits first, then tokens per second.

python benchmarks/peers_text.py [--dim 512] [--depth 6]

One thread, one process per generation, the same random weights, turns taken, medians. The peers are
``rwkv`` (pip) through a ``.pth`` and transformers' ``RwkvForCausalLM`` through its own layout; one
that is not installed is a gap in the table. Writes ``benchmarks/results/peers_text.json``.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from rwkv_core import checkpoint
from rwkv_core.formats.convert import convert
from rwkv_core.testing import perturb
from rwkv_text import CausalLM, TextConfig, load

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "4": ("rwkv4", {}),
    "5.0": ("rwkv5", {"per_channel": False, "gate": False, "exp_bonus": True}),
    "5.1": ("rwkv5", {"per_channel": False}),
    "5.2": ("rwkv5", {}),
    "6": ("rwkv6", {}),
    "7": ("rwkv7", {}),
}
VOCAB, LENGTH, DECODE, PREFILL, ROUNDS = 1024, 512, 64, 256, 5
Feed = Callable[[list[int], Any], tuple[torch.Tensor, Any]]  # logits of the last token, and state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--case", choices=list(CASES), help="one generation, in this process")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(race(args.case, args.dim, args.depth)))
        return
    rows = []
    print(f"{'':<5}{'peer':<14}{'|Δ logit|':>10}{'decode tok/s':>22}{'prefill tok/s':>22}")
    for case in CASES:
        command = [sys.executable, __file__, "--case", case]
        command += ["--dim", str(args.dim), "--depth", str(args.depth)]
        env = {**os.environ, "RWKV_V7_ON": "1" if case == "7" else "0", "RWKV_CUDA_ON": "0"}
        done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows += found
        for row in found:
            if "error" in row:
                print(f"{case:<5}{row['peer']:<14} {row['error']}", flush=True)
                continue
            speeds = "".join(
                f"{row['ours'][k]:>8.0f} /{row['theirs'][k]:>5.0f}{row['ratio'][k]:>6.2f}×"
                for k in ("decode", "prefill")
            )
            print(f"{case:<5}{row['peer']:<14}{row['difference']:>10.1e}{speeds}", flush=True)
    result = {"torch": torch.__version__, "machine": platform.processor(), "rows": rows}
    path = Path(__file__).parent / "results" / "peers_text.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


def race(case: str, dim: int, depth: int) -> list[dict[str, Any]]:
    """Return one row per peer of a generation."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    mixer, options = CASES[case]
    config = TextConfig(
        dim=dim,
        depth=depth,
        vocab_size=VOCAB,
        mixer=mixer,
        mixer_options=options,
        tokenizer="bytes",
    )
    model = CausalLM(config)
    perturb(model, 0.02)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        saved = checkpoint.save(model, Path(folder) / "ours")
        convert(saved, Path(folder) / "model.pth", "official")
        ours = our_model(Path(folder) / "model.pth")
        contestants = {"rwkv": rwkv_package}
        if case == "4":
            convert(saved, Path(folder) / "hf", "hf")
            contestants["transformers"] = transformers_model
        for name, make in contestants.items():
            row: dict[str, Any] = {"case": case, "peer": name}
            try:
                row["version"] = version(name)
                with contextlib.redirect_stdout(io.StringIO()):
                    theirs = make(Path(folder))
                row |= compare(ours, theirs)
            except PackageNotFoundError:
                row["error"] = "not installed"
            rows.append(row)
    return rows


def our_model(path: Path) -> Feed:
    model = load(path)

    @torch.inference_mode()
    def feed(tokens: list[int], state: Any) -> tuple[torch.Tensor, Any]:
        out = model(torch.tensor([tokens]), state)
        return out.logits_BTV[0, -1], out.state

    return feed


def rwkv_package(folder: Path) -> Feed:
    from rwkv.model import RWKV

    model = RWKV(model=str(folder / "model"), strategy="cpu fp32")

    @torch.inference_mode()
    def feed(tokens: list[int], state: Any) -> tuple[torch.Tensor, Any]:
        return model.forward(tokens, state)

    return feed


def transformers_model(folder: Path) -> Feed:
    from transformers import RwkvForCausalLM

    model = RwkvForCausalLM.from_pretrained(folder / "hf").eval()

    @torch.inference_mode()
    def feed(tokens: list[int], state: Any) -> tuple[torch.Tensor, Any]:
        out = model(torch.tensor([tokens]), state=state, use_cache=True)
        return out.logits[0, -1], out.state

    return feed


def compare(ours: Feed, theirs: Feed) -> dict[str, Any]:
    """Feed both 512 tokens one by one and compare every logit; then take turns at speed."""
    tokens = torch.randint(1, VOCAB, (LENGTH,)).tolist()
    worst, a, b = 0.0, None, None
    for token in tokens:
        x, a = ours([token], a)
        y, b = theirs([token], b)
        worst = max(worst, (x - y).abs().max().item())
    if not worst <= 1e-4:
        raise SystemExit(f"the logits differ by {worst:.2g}: their speeds say nothing")
    seconds: dict[str, dict[str, list[float]]] = {
        who: {"decode": [], "prefill": []} for who in ("ours", "theirs")
    }
    for _ in range(ROUNDS):
        for who, feed in (("ours", ours), ("theirs", theirs)):
            began = time.process_time()
            state = feed(tokens[:PREFILL], None)[1]
            middle = time.process_time()
            for token in tokens[:DECODE]:
                state = feed([token], state)[1]
            seconds[who]["prefill"].append((middle - began) / PREFILL)
            seconds[who]["decode"].append((time.process_time() - middle) / DECODE)
    speed = {
        who: {k: 1 / statistics.median(v) for k, v in times.items()}
        for who, times in seconds.items()
    }
    ratio = {k: speed["ours"][k] / speed["theirs"][k] for k in ("decode", "prefill")}
    return {"difference": worst, **speed, "ratio": ratio}


if __name__ == "__main__":
    main()
