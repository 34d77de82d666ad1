"""Classify pictures of 512² to 8192² pixels in one fixed amount of memory.

`vrwkv_tiny_patch16_224` with random weights, 1,000 classes, fp32: stripe by stripe
(rwkv_vision/tiled.py), and for comparison as a whole. Every picture has a process of its own, on
one thread. In stripes it may take no more private memory than CAP beyond what it holds with the
model built (RLIMIT_DATA: asking for more fails); as a whole it may take what it needs. Peak is the
most that was resident, beyond what was with the model built. The picture is made as it is read,
and the features between two layers lie in a file. glibc is told to give back what is freed, so that
no holes are measured; by itself it is twice as fast. Linux.

    python benchmarks/big_pictures.py [--quick]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import race
import torch
from torch import Tensor

SIDES = [512, 1024, 2048, 4096, 8192]
QUICK = [512, 1024, 2048]
TILED, WHOLE = "ours, in stripes", "as a whole"
MODEL = "vrwkv_tiny_patch16_224"
WHOLE_TO = 4096
CAP = 128  # MiB
COLUMNS = {"patches": ",d", "peak MiB": ".0f", "seconds": ".1f", "µs/patch": ".0f", "apart": ".1e"}
LIMIT = 1e-5  # between the logits of either way


def main() -> None:
    parser = race.arguments(__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return one(args.one[0], int(args.one[1]))
    race.prepare(args.threads)
    rows: list[race.Row] = []
    for side in QUICK if args.quick else SIDES:
        tiled, whole = in_a_process(TILED, side), {"name": WHOLE, "side": side}
        if side > WHOLE_TO:
            whole["gap"] = "not run: it needs four times what it does at half the side"
        else:
            whole = in_a_process(WHOLE, side)
            if "disqualified" not in {**tiled, **whole}:
                a, b = torch.tensor(tiled["logits"]), torch.tensor(whole["logits"])
                tiled["apart"] = apart = ((a - b).abs().max() / b.abs().max()).item()
                if not apart <= LIMIT:
                    tiled["disqualified"] = f"logits {apart:.1e} apart, allowed {LIMIT:.0e}"
        for row in (tiled, whole):
            row.pop("logits", None)
        rows += [tiled, whole]
        print(f"\n{side} × {side} pixels")
        print(race.table([tiled, whole], COLUMNS), flush=True)
    race.write(race.name("big_pictures", args), rows, {"cap MiB": CAP, "model": MODEL})
    race.finish(rows)


def in_a_process(way: str, side: int) -> race.Row:
    """Return the row of one way with one picture."""
    command = [sys.executable, __file__, "--one", way, str(side)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    row: race.Row = {"name": way, "side": side, "patches": (side // 16) ** 2}
    if done.returncode:
        return {**row, "disqualified": (done.stderr.strip() or "killed").splitlines()[-1]}
    return {**row, **json.loads(done.stdout.splitlines()[-1])}


class Waves:
    """A picture whose rows are made when they are read."""

    def __init__(self, side: int) -> None:
        self.size = (side, side)

    def read(self, top: int, bottom: int) -> Tensor:
        """Return rows of pixels [1, 3, bottom - top, width]."""
        y, x = torch.arange(top, bottom)[:, None], torch.arange(self.size[1])
        waves = [torch.sin(y * 0.013 * (c + 1) + torch.sin(x * 0.31) + x * y * 1e-4)
                 for c in range(3)]  # fmt: skip
        return torch.stack(waves)[None]


@torch.no_grad()
def one(way: str, side: int) -> None:
    """Classify one picture and print what it took as JSON."""
    import resource

    import timm

    from rwkv_vision.tiled import tiled_logits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = timm.create_model(MODEL).eval()
    torch.nn.init.normal_(net.pos_embed, std=0.5)
    net(torch.zeros(1, 3, 64, 64))  # whatever is made at the first call
    resident = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    picture, began = Waves(side), time.process_time()
    if way == TILED:
        limit = status("VmData") + (CAP << 20)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        logits = tiled_logits(net, picture)
    else:
        logits = net(picture.read(0, side))
    seconds = time.process_time() - began
    peak = (status("VmHWM") - resident) / (1 << 20)
    row = {"peak MiB": peak, "seconds": seconds, "µs/patch": seconds / (side // 16) ** 2 * 1e6}
    print(json.dumps({**row, "logits": logits[0].tolist()}))


def status(field: str) -> int:
    """Return a figure of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
