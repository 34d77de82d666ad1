"""WKV-7: the implementations against each other and causal attention of the same shape.

One thread, processor time, interleaved A B A B, medians; prints a table and writes
``benchmarks/results/wkv7.json``. Times are only comparable within one run.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from rwkv_core.ops import wkv7

SHAPES = [(2, 256, 6, 64), (2, 1024, 6, 64), (1, 4096, 6, 64)]
ROUNDS = 5


def inputs(B: int, T: int, H: int, K: int) -> list[torch.Tensor]:
    r, k, v = (torch.randn(B, T, H, K) for _ in range(3))
    keys = F.normalize(torch.randn(B, T, H, K), dim=-1)
    w = -0.6065 * torch.sigmoid(torch.randn(B, T, H, K))
    tensors = [r, w, k, v, -keys, keys * torch.sigmoid(torch.randn(B, T, H, K))]
    return [x.requires_grad_() for x in tensors]


def attention(r, w, k, v, a, b):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (r, k, v)), is_causal=True)


def milliseconds(run: Callable[[], object]) -> float:
    began = time.process_time()
    run()
    return 1e3 * (time.process_time() - began)


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for shape in SHAPES:
        x = inputs(*shape)
        contestants: dict[str, Callable[..., torch.Tensor]] = {
            "wkv7 chunked": lambda *x: wkv7(*x, impl="chunked").y_BTHV,
            "causal attention": attention,
        }
        if shape[1] <= 256:
            contestants["wkv7 reference"] = lambda *x: wkv7(*x, impl="reference").y_BTHV
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, op in contestants.items():
                with torch.no_grad():
                    forward = milliseconds(lambda op=op, x=x: op(*x))
                both = milliseconds(lambda op=op, x=x: op(*x).sum().backward())
                times[name].append((forward, both))
        for name, pairs in times.items():
            forward, both = (statistics.median(t) for t in zip(*pairs, strict=True))
            rows.append({"shape": shape, "op": name, "forward": forward, "forward+backward": both})
            print(f"{shape!s:<20} {name:<18} {forward:9.1f} ms {both:9.1f} ms", flush=True)
    result = {"torch": torch.__version__, "machine": platform.processor(), "rows": rows}
    path = Path(__file__).parent / "results" / "wkv7.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
