"""WKV-7 beside `rwkv-ops` and attention of the same shape: forward pass of one operator.

The same random tensors go to every implementation, and its output and last state are compared with
our time loop before anything is timed. `rwkv-ops` runs its own CPU form, a loop in Keras over
torch. Attention computes something else; it is what a transformer would spend.

    pip install rwkv-ops==0.11.3
    python benchmarks/ops.py [--quick]
"""

import os
from collections.abc import Callable

import race
import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.ops import wkv7

SHAPES = [(1, 256, 6, 64), (1, 1024, 6, 64)]
QUICK = [(1, 64, 6, 64)]
LIMIT = 1e-5  # relative to the largest value
COLUMNS = {"|Δ|": ".1e", "median ms": ".2f", "minimum ms": ".2f", "this / ours": ".1f"}
Op = Callable[[list[Tensor]], tuple[Tensor, ...]]  # r, w, k, v, a, b to output and state


def main() -> None:
    args = race.arguments(__doc__).parse_args()
    race.prepare(args.threads)
    rows = []
    rounds = args.rounds or (3 if args.quick else 7)
    for shape in QUICK if args.quick else SHAPES:
        found = one_shape(shape, rounds)
        print(f"\nwkv7, (B, T, H, K) = {shape}, forward")
        print(race.table(found, COLUMNS))
        rows += found
    name = race.name("ops", args)
    race.write(name, rows, {"rounds": rounds})
    race.plot(name, race.bars([r for r in rows if r["shape"] == shape], ["median ms"]))
    race.finish(rows)


@torch.inference_mode()
def one_shape(shape: tuple[int, int, int, int], rounds: int) -> list[race.Row]:
    x = inputs(*shape)
    expected = ours("reference")(x)

    def enter(make: Callable[[], Op]) -> tuple[Op, float]:
        op = make()
        return op, race.compare(difference(op(x), expected), LIMIT)

    present, missing = race.line_up({n: lambda m=m: enter(m) for n, m in MAKERS.items()})
    runs: dict[str, Callable[[], object]] = {}
    for name, (op, _) in present.items():
        runs[name] = lambda op=op: op(x)
    heads = [t.transpose(1, 2).contiguous() for t in x[:3]]
    runs["attention"] = lambda: F.scaled_dot_product_attention(*heads, is_causal=True)
    times = race.interleave(runs, rounds)
    rows = [
        {
            "name": name,
            "|Δ|": present[name][1] if name in present else None,
            "time": time,
            "median ms": 1e3 * time.median,
            "minimum ms": 1e3 * time.minimum,
            "this / ours": time.median / times["ours, auto"].median,
        }
        for name, time in times.items()
    ]
    return [{**row, "shape": shape} for row in rows + missing]


def inputs(B: int, T: int, H: int, K: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(B, T, H, K, generator=generator)

    r, k, v = normal(), normal(), normal()
    keys, rate = F.normalize(normal(), dim=-1), torch.sigmoid(normal())
    return [r, -0.6065 * torch.sigmoid(normal()), k, v, -keys, keys * rate]


def ours(impl: str) -> Op:
    return lambda x: tuple(wkv7(*x, impl=impl))


def rwkv_ops() -> Op:
    race.installed("rwkv-ops")
    os.environ.setdefault("KERAS_BACKEND", "torch")
    os.environ.setdefault("KERNEL_TYPE", "native")  # its CUDA and Triton forms need a GPU
    try:
        from rwkv_ops import generalized_delta_rule
    except ImportError as error:
        raise race.Gap(f"cannot be imported: {error}") from error

    def op(x: list[Tensor]) -> tuple[Tensor, Tensor]:
        r, w, k, v, a, b = x
        y_BTHV, state_BHVK = generalized_delta_rule(r, (-w).log(), k, v, a, b)
        return y_BTHV, state_BHVK.transpose(-1, -2)

    return op


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference of output and state, relative to their largest value."""
    pairs = list(zip(found, expected, strict=True))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


MAKERS: dict[str, Callable[[], Op]] = {
    "ours, auto": lambda: ours("auto"),
    "ours, chunked": lambda: ours("chunked"),
    "ours, the time loop": lambda: ours("reference"),
    "rwkv-ops": rwkv_ops,
}

if __name__ == "__main__":
    main()
