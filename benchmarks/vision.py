"""Vision-RWKV beside timm's ViT of the same width and depth: images per second.

`vrwkv_tiny_patch16_224` and `deit_tiny_patch16_224` have 12 layers of width 192 and patches of 16
× 16 pixels; random weights, 1,000 classes, fp32. They are different models, so there are no answers
to compare.

    pip install timm torchvision     (`make bench` has them)
    python benchmarks/vision.py [--quick]
"""

from collections.abc import Callable

import race
import torch
from torch import nn

SHAPES = [(8, 224), (2, 512)]  # pictures, and pixels of a side
QUICK = [(2, 224)]
OURS, THEIRS = "vrwkv_tiny_patch16_224", "deit_tiny_patch16_224"
FORWARD, BOTH = "forward", "forward+backward"
COLUMNS = {
    "forward": ".1f", "best forward": ".1f", "ours/this forward": ".2f",
    "forward+backward": ".1f", "best forward+backward": ".1f", "ours/this forward+backward": ".2f",
    "parameters": ",d",
}  # fmt: skip


def main() -> None:
    args = race.arguments(__doc__).parse_args()
    race.prepare()
    rounds = args.rounds or (2 if args.quick else 5)
    rows: list[race.Row] = []
    for shape in QUICK if args.quick else SHAPES:
        found = one_shape(shape, rounds)
        print(f"\nimages/s, {shape[0]} of {shape[1]} × {shape[1]} pixels")
        print(race.table(found, COLUMNS), flush=True)
        rows += found
    name = race.name("vision", args)
    race.write(name, rows, {"rounds": rounds})
    drawn = [{**row, "name": f"{row['name']}, {row['shape'][1]}"} for row in rows]
    race.plot(name, race.bars(drawn, [FORWARD, BOTH]))


def one_shape(shape: tuple[int, int], rounds: int) -> list[race.Row]:
    count, side = shape
    present, rows = race.line_up(
        {
            "ours, VRWKV-T": lambda: network(OURS, side),
            "timm, DeiT-Ti": lambda: network(THEIRS, side),
        }
    )
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    for name, net in present.items():
        runs[name, FORWARD] = lambda net=net: forward(net, images)
        runs[name, BOTH] = lambda net=net: both(net, images)
    times = race.interleave(runs, rounds)
    for name, net in present.items():
        row = {"name": name, "parameters": sum(p.numel() for p in net.parameters())}
        for task in (FORWARD, BOTH):
            time = times[name, task]
            row[f"{task} seconds"] = [time.median, time.minimum]
            row[task] = count / time.median
            row[f"best {task}"] = count / time.minimum
            row[f"ours/this {task}"] = time.median / times["ours, VRWKV-T", task].median
        rows.append(row)
    return [{**row, "shape": shape} for row in rows]


def network(name: str, side: int) -> nn.Module:
    race.installed("timm")
    import timm

    import rwkv_vision  # noqa: F401 - registers our models

    torch.manual_seed(0)
    return timm.create_model(name, img_size=side)


@torch.no_grad()
def forward(net: nn.Module, images: torch.Tensor) -> None:
    net.eval()(images)


def both(net: nn.Module, images: torch.Tensor) -> None:
    net.zero_grad(set_to_none=True)
    net.train()(images).sum().backward()


if __name__ == "__main__":
    main()
