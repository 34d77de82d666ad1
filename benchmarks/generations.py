"""Train every generation on the same text for the same number of steps: held-out bits per byte.

python benchmarks/generations.py [--quick] [--steps 700] [--seeds 0 1]

Writes ``benchmarks/results/generations.json``.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import mean

from rwkv_core.config import override
from rwkv_core.registry import MIXERS, RECIPES
from rwkv_core.train import train
from rwkv_text.baselines import ngram_bits_per_byte, xz_bits_per_byte
from rwkv_text.data import split_documents
from rwkv_text.recipes import with_mixer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed: does it run?")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS))
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds = 10, [0]
    rows = []
    for mixer in args.mixers:
        config = with_mixer(RECIPES["pydoc"](), mixer)
        for name, value in (("steps", args.steps), ("threads", args.threads)):
            config = override(config, f"train.{name}={value}")
        bits, seconds = [], []
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                result = train(override(config, f"train.seed={seed}"), Path(folder) / "run")
            bits.append(result.metrics["bits_per_byte"])
            seconds.append(result.seconds)
            print(f"{mixer} seed {seed}: {bits[-1]:.4f} bits/byte, {seconds[-1]:.0f} s", flush=True)
        n = sum(p.numel() for p in result.model.parameters())
        rows.append({"mixer": mixer, "parameters": n, "bits_per_byte": bits, "seconds": seconds})
    name = "generations-quick.json" if args.quick else "generations.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"steps": args.steps, "rows": rows}, indent=2) + "\n")
    learned, held_out = (split_documents(config.task.data, split) for split in ("train", "eval"))
    print(f"\n{'mixer':<8}{'parameters':>12}  bits/byte on held-out text, {args.steps} steps")
    for row in rows:
        each = "  ".join(f"{b:.3f}" for b in row["bits_per_byte"])
        print(
            f"{row['mixer']:<8}{row['parameters']:>12,}  {mean(row['bits_per_byte']):.3f} ({each})"
        )
    print(f"{'5-gram':<20}  {ngram_bits_per_byte(learned, held_out):.3f}")
    print(f"{'xz -9e':<20}  {xz_bits_per_byte(held_out):.3f}")


if __name__ == "__main__":
    main()
