"""One token times one matrix: the rate at which weights are read, ours beside torch's.

The matrices are those of an RWKV of width 768 and its head, as many of each as the last cache does
not hold: decoding finds its weights in memory. GB/s are of the whole matrix; where columns are left
out because their input is 0, as after a squared ReLU, that is more than was read. Beside
it a prompt of 256 tokens, which torch multiplies whichever way the weights lie.

    python benchmarks/gemv.py [--quick]
"""

from collections.abc import Callable
from typing import NamedTuple

import race
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.ops.linear import linear

SHAPES = [(768, 768), (3072, 768), (768, 3072), (65536, 768)]  # out, in
QUICK = [(768, 3072)]
CACHE = 64 << 20  # bytes; no last cache is larger, or not by much
PROMPT = 256
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8}  # relative to the largest value
COLUMNS = {"|Δ|": ".1e", "GB/s": ".1f", "best GB/s": ".1f", "µs": ".0f", "F.linear/this": ".2f"}


class Entry(NamedTuple):
    """What runs, on which input, with which weights, and what it is held against."""

    run: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    weights: list[Tensor]
    beside: str


def main() -> None:
    args = race.arguments(__doc__).parse_args()
    race.prepare(args.threads)
    rounds = args.rounds or (3 if args.quick else 9)
    rows: list[race.Row] = []
    for shape in QUICK if args.quick else SHAPES:
        found = one_shape(*shape, rounds)
        print(f"\n[out, in] = {list(shape)}")
        print(race.table(found, COLUMNS), flush=True)
        rows += found
    name = race.name("gemv", args)
    race.write(name, rows, {"rounds": rounds})
    shown = [row for row in rows if row["shape"] == [768, 3072] and "GB/s" in row]
    race.plot(name, race.bars(shown, ["GB/s"]))
    race.finish(rows)


@torch.inference_mode()
def one_shape(rows: int, columns: int, rounds: int) -> list[race.Row]:
    entries = contestants(rows, columns)

    def enter(entry: Entry) -> float:
        expected = entry.x.double() @ entry.weights[0].double().mT
        difference = (entry.run(entry.x, entry.weights[0]) - expected).abs().max()
        return race.compare(float(difference / expected.abs().max()), LIMITS[entry.x.dtype])

    present, wrong = race.line_up({name: lambda e=e: enter(e) for name, e in entries.items()})
    runs: dict[str, Callable[[], object]] = {
        name: lambda e=entries[name]: [e.run(e.x, weight) for weight in e.weights]
        for name in present
    }
    times = race.interleave(runs, rounds)
    found = []
    for name, time in times.items():
        _, x, weights, beside = entries[name]
        row = {"name": name, "|Δ|": present[name], "time": time, "shape": [rows, columns]}
        row["µs"] = 1e6 * time.median / len(weights)
        row["F.linear/this"] = times[beside].median / time.median
        if len(x) == 1:
            size = weights[0].nbytes * len(weights)
            row |= {"GB/s": size / time.median / 1e9, "best GB/s": size / time.minimum / 1e9}
        found.append(row)
    return found + [{**row, "shape": [rows, columns]} for row in wrong]


def contestants(rows: int, columns: int) -> dict[str, Entry]:
    torch.manual_seed(0)
    token, prompt = torch.randn(1, columns), torch.randn(PROMPT, columns)
    found = {}
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        count = 1 + CACHE // (rows * columns * dtype.itemsize)
        by_rows = [torch.randn(rows, columns).to(dtype) for _ in range(count)]
        by_columns = [weight.mT.contiguous().mT for weight in by_rows]
        x, base = token.to(dtype), f"F.linear, by rows, {name}"
        found[base] = Entry(F.linear, x, by_rows, base)
        if dtype == torch.float32:
            found[f"F.linear, by columns, {name}"] = Entry(F.linear, x, by_columns, base)
        found[f"ours, by rows, {name}"] = Entry(linear, x, by_rows, base)
        found[f"ours, by columns, {name}"] = Entry(linear, x, by_columns, base)
        if rows < columns:  # the one that follows a squared ReLU
            for share in (0.5, 0.9):
                zeros = x * (torch.rand(columns) >= share)
                label = f"ours, by columns, {share:.0%} zeros, {name}"
                found[label] = Entry(linear, zeros, by_columns, base)
            read, base = prompt.to(dtype), f"F.linear, {PROMPT} tokens, by rows, {name}"
            found[base] = Entry(F.linear, read, by_rows[:1], base)
            label = f"F.linear, {PROMPT} tokens, by columns, {name}"
            found[label] = Entry(F.linear, read, by_columns[:1], base)
            found[f"ours, {PROMPT} tokens, by columns, {name}"] = Entry(
                linear, read, by_columns[:1], base
            )
    return found


if __name__ == "__main__":
    main()
