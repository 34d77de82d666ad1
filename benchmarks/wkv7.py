"""WKV-7: the implementations against each other and causal attention of the same shape.

One thread, processor time, interleaved A B A B, medians and least of all; what each keeps for the
backward pass, its inputs among it, in MB. Prints a table and writes
``benchmarks/results/wkv7.json``. Times are only comparable within one run. "Chunked, traced" are
the plain operations that compilers and exporters see, differentiated by autograd.
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
from rwkv_core.ops.native.library import available
from rwkv_core.ops.wkv7.chunked import wkv7_chunked

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


def traced(r, w, k, v, a, b):
    B, _, H, K = r.shape
    return wkv7_chunked(r, w, k, v, a, b, r.new_zeros(B, H, K, v.shape[-1]))[0]


def megabytes_kept(op: Callable[..., torch.Tensor], x: list[torch.Tensor]) -> float:
    seen: dict[int, int] = {}

    def note(kept: torch.Tensor) -> torch.Tensor:
        seen[kept.untyped_storage().data_ptr()] = kept.untyped_storage().nbytes()
        return kept

    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept):
        y = op(*x)
    del y
    return sum(seen.values()) / 1e6


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
            "wkv7 chunked, traced": traced,
            "causal attention": attention,
        }
        if available():
            contestants["wkv7 native"] = lambda *x: wkv7(*x, impl="native").y_BTHV
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
            least = tuple(min(t) for t in zip(*pairs, strict=True))
            kept = megabytes_kept(contestants[name], x)
            row = {"shape": shape, "op": name, "forward": forward, "forward+backward": both}
            rows.append(row | {"least": least, "kept": kept})
            text = f"{forward:9.1f} ms {both:9.1f} ms  least {least[0]:8.1f} {least[1]:8.1f}"
            print(f"{shape!s:<18} {name:<21} {text}  kept {kept:7.1f} MB", flush=True)
    result = {"torch": torch.__version__, "machine": platform.processor(), "rows": rows}
    path = Path(__file__).parent / "results" / "wkv7.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
