"""The native CPU ops against their torch forms, attention of the same shape, and this core's GEMM.

One thread, processor time, interleaved A B A B, medians; prints a table and writes
``benchmarks/results/native.json``. Times are only comparable within one run. The share of the GEMM
rate counts 9·K·V operations per token and head of wkv7, 5·K·V of wkv6.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.ops import bi_wkv, wkv4, wkv6, wkv7
from rwkv_core.ops.native.build import build
from rwkv_core.ops.native.library import loaded

ROUNDS = 7
CAUSAL = [(2, 1024, 6, 64), (1, 1024, 3, 128), (4, 1024, 12, 32)]
CHANNELS = [(2, 1024, 384)]  # wkv4, which has no heads; attention has C / 64 of them
IMAGES = [(8, 196, 192), (2, 1024, 192), (1, 4096, 192)]
FLOPS = {"wkv7": 9, "wkv6": 5}  # per token, head, key and value of a forward pass


def milliseconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return 1e3 * (time.process_time() - began)


def causal_inputs(op: str, B: int, T: int, H: int, K: int) -> list[Tensor]:
    r, k, v = (torch.randn(B, T, H, K) for _ in range(3))
    keys = F.normalize(torch.randn(B, T, H, K), dim=-1)
    w = -0.6065 * torch.sigmoid(torch.randn(B, T, H, K))
    more = [-keys, keys * torch.sigmoid(torch.randn(B, T, H, K))]
    return [r, w, k, v, *(more if op == "wkv7" else [torch.randn(H, K)])]


def contestants(shape: tuple[int, ...]) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    if len(shape) == 4:
        found: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {}
        for name, op in (("wkv7", wkv7), ("wkv6", wkv6)):
            x = causal_inputs(name, *shape)
            for impl in ("native", "chunked"):
                found[f"{name} {impl}"] = (lambda *x, o=op, i=impl: o(*x, impl=i)[0], x)
        B, T, H, K = shape
        heads = [torch.randn(B, H, T, K) for _ in range(3)]
        found["attention"] = (lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), heads)
        return found
    B, T, C = shape
    x = [torch.randn(C), torch.randn(C), torch.randn(B, T, C), torch.randn(B, T, C)]
    heads = [torch.randn(B, C // 64, T, 64) for _ in range(3)]
    linear = [torch.randn(B * T, C), torch.randn(C, C)]
    if shape in CHANNELS:
        x[0] = -x[0].exp()
        return {
            "wkv4 native": (lambda *x: wkv4(*x, impl="native")[0], x),
            "wkv4 scan": (lambda *x: wkv4(*x, impl="scan")[0], x),
            "attention": (lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), heads),
            "linear": (F.linear, linear),
        }
    return {
        "bi_wkv native": (lambda *x: bi_wkv(*x, impl="native"), x),
        "bi_wkv prefix": (lambda *x: bi_wkv(*x, impl="prefix"), x),
        "attention": (F.scaled_dot_product_attention, heads),
        "linear": (F.linear, linear),
    }


def main() -> None:
    torch.set_num_threads(1)
    build()
    print(f"instruction set {loaded().isa}")
    square = torch.randn(512, 512)
    rows: list[dict[str, Any]] = []
    for shape in CAUSAL + CHANNELS + IMAGES:
        entries = contestants(shape)
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in entries}
        gemm = []
        for _ in range(ROUNDS):
            gemm.append(milliseconds(lambda: [torch.mm(square, square) for _ in range(5)]) / 5)
            for name, (run, inputs) in entries.items():
                leaves = [x.detach().requires_grad_() for x in inputs]
                # three calls of the short ones: the clock's own error is 10 µs
                with torch.no_grad():
                    forward = milliseconds(lambda r=run, x=inputs: [r(*x) for _ in range(3)]) / 3
                both = milliseconds(lambda r=run, x=leaves: r(*x).sum().backward())
                times[name].append((forward, both))
        rate = 2 * 512**3 / statistics.median(gemm) / 1e6
        print(f"{shape}: GEMM of 512³ at {rate:.1f} GFLOP/s")
        medians = {
            name: tuple(statistics.median(t) for t in zip(*pairs, strict=True))
            for name, pairs in times.items()
        }
        other = medians["attention"]
        for name, (forward, both) in medians.items():
            row = {"shape": shape, "op": name, "forward": forward, "forward+backward": both}
            row |= {"attention/forward": other[0] / forward, "attention/both": other[1] / both}
            text = f"{forward:8.2f} ms {both:8.2f} ms  attention/this {other[0] / forward:6.1f} "
            text += f"{other[1] / both:6.1f}"
            op = name.partition(" ")[0]
            if op in FLOPS:
                B, T, H, K = shape
                reached = FLOPS[op] * B * T * H * K * K / forward / 1e6
                row["share of GEMM"] = reached / rate
                text += f"  {reached:5.1f} GFLOP/s = {100 * reached / rate:.0f} %"
            rows.append(row)
            print(f"  {name:<14} {text}", flush=True)
    result = {
        "torch": torch.__version__, "machine": platform.machine(), "isa": loaded().isa, "rows": rows
    }  # fmt: skip
    path = Path(__file__).parent / "results" / "native.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
