"""Bytes, quality and speed of a quantised language model: a table, JSON and a picture.

    python benchmarks/quantisation.py runs/text out/

The folder gets the model as it is and in every scheme, ``curve.json`` and ``curve.png``. Quality
is measured on the model's held-out data, so it has to be a trained one. Speeds are tokens per
second of processor time with one thread: medians of rounds in which all folders take turns.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import rwkv_export
from rwkv_export.gate import ANYTHING, compare_answers
from rwkv_export.heldout import held_out
from rwkv_export.quantize import SCHEMES

from rwkv_core import checkpoint

ROUNDS, TOKENS, PROMPT = 5, 32, 256


def speeds(runtimes):
    from rwkv_export.bench import jobs

    made = {name: jobs(runtime, TOKENS, PROMPT) for name, runtime in runtimes.items()}
    seen = {(name, graph): [] for name, graphs in made.items() for graph in graphs}
    for name, graph in [*seen] * (ROUNDS + 1):  # in turns; the first warms up
        call, n = made[name][graph]
        began = time.process_time()
        call()
        seen[name, graph].append(n / (time.process_time() - began))
    return {key: statistics.median(rates[1:]) for key, rates in seen.items()}


def draw(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for row in rows[1:]:
        label = f"{row['scheme']}, {row['decode']:.0f} tokens/s"
        axes.scatter(row["bytes"] / 1e6, row["kl"], s=60, zorder=3, label=label)
    label = f"fp32, {rows[0]['decode']:.0f} tokens/s"
    axes.axvline(rows[0]["bytes"] / 1e6, color="grey", linestyle=":", label=label)
    axes.legend(loc="center right")
    axes.set(yscale="log", xlabel="weights, MB", ylabel="KL from fp32, nats", xlim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint or a run")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    args = parser.parse_args()
    model = checkpoint.load(args.model)
    data, _ = held_out(model)
    rwkv_export.export(model, args.out / "fp32", steps=(1, 16, 64))
    for scheme in SCHEMES:
        rwkv_export.compress(
            args.out / "fp32", args.out / scheme, scheme, data, bounds=ANYTHING, threads=1
        )
    names = ["fp32", *SCHEMES]
    runtimes = {name: rwkv_export.load(args.out / name, threads=1) for name in names}
    rates = speeds(runtimes)
    rows, unseen = [], data[len(data) // 2 :]  # int4 is rounded by the rows before
    for name in names:
        quality = compare_answers(runtimes["fp32"], runtimes[name], unseen)
        rows.append({
            "scheme": name,
            "bytes": (args.out / name / "weights.bin").stat().st_size,
            "kl": quality.kl,
            "perplexity_ratio": quality.perplexity_ratio,
            "top1": quality.top1,
            "greedy": quality.greedy,
            "worst_logit": quality.worst_logit,
            "decode": rates[name, "step"],
            "prefill": rates[name, "prefill"],
        })  # fmt: skip
    (args.out / "curve.json").write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows, args.out / "curve.png")
    print("| scheme | MB | KL | perplexity | top-1 | greedy | worst logit | decode | prefill |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['scheme']} | {row['bytes'] / 1e6:.2f} | {row['kl']:.1e} | "
            f"× {row['perplexity_ratio']:.4f} | {row['top1']:.1%} | {row['greedy']:.1%} | "
            f"{row['worst_logit']:.2g} | {row['decode']:.0f} | {row['prefill']:.0f} |"
        )


if __name__ == "__main__":
    run()
