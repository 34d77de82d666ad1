"""Vision-RWKV beside timm's ViT of the same width and depth: images per second and peak memory.

`vrwkv_tiny_patch16_224` and `deit_tiny_patch16_224` have 12 layers of width 192 and patches of 16
× 16 pixels; random weights, 1,000 classes, fp32, in torch and as ONNX in onnxruntime. They are
different models, so there are no answers to compare. Memory is what one forward pass of one picture
adds to a fresh process, in torch after one of a small picture, in onnxruntime to the open file.

    pip install timm torchvision onnx onnxruntime onnxscript     (`make bench` has them)
    python benchmarks/vision.py [--quick]
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import race
import torch
from torch import nn

SHAPES = [(8, 224), (2, 512), (1, 1024), (1, 2048)]  # pictures, and pixels of a side
TRAINED = 512  # pixels of a side, at most
ONCE = 2048  # pixels of a side at which one pass takes a minute, and there is one
QUICK = [(2, 224)]
OURS, THEIRS = "ours, VRWKV-T", "timm, DeiT-Ti"
MODELS = {OURS: "vrwkv_tiny_patch16_224", THEIRS: "deit_tiny_patch16_224"}
FORWARD, BOTH, ONNX = "forward", "forward+backward", "onnxruntime"
COLUMNS = {
    heading: form
    for task in (FORWARD, BOTH, ONNX)
    for heading, form in ((task, ".2f"), (f"best {task}", ".2f"), (f"ours/this {task}", ".2f"))
} | {"memory MB": ".0f", f"{ONNX} MB": ".0f", "parameters": ",d"}


def main() -> None:
    parser = race.arguments(__doc__)
    parser.add_argument("--memory", nargs="+", metavar=("NAME SIDE", "FILE"), help="one pass, here")
    args = parser.parse_args()
    race.prepare(args.threads)
    if args.memory:
        name, side, *file = args.memory
        added = onnx_memory(Path(file[0]), int(side)) if file else added_memory(name, int(side))
        print(json.dumps(added))
        return
    rounds = args.rounds or (2 if args.quick else 5)
    rows: list[race.Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for shape in QUICK if args.quick else SHAPES:
            turns = 1 if shape[1] >= ONCE else rounds
            found = one_shape(shape, turns, Path(folder))
            print(f"\nimages/s, {shape[0]} of {shape[1]} × {shape[1]} pixels, {turns} rounds")
            print(race.table(found, COLUMNS), flush=True)
            rows += found
    name = race.name("vision", args)
    race.write(name, rows, {"rounds": rounds})
    drawn = [{**row, "name": f"{row['name']}, {row['shape'][1]}"} for row in rows]
    race.plot(name, race.bars(drawn, [FORWARD, BOTH, ONNX]))


def one_shape(shape: tuple[int, int], rounds: int, folder: Path) -> list[race.Row]:
    count, side = shape
    present, rows = race.line_up({name: lambda name=name: network(name, side) for name in MODELS})
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    runs: dict[tuple[str, str], Callable[[], object]] = {}
    files: dict[str, Path] = {}
    for name, net in present.items():
        runs[name, FORWARD] = lambda net=net: forward(net, images)
        if side <= TRAINED:
            runs[name, BOTH] = lambda net=net: both(net, images)
        files[name] = write_onnx(net, images, folder / f"{MODELS[name]}-{side}.onnx")
        runs[name, ONNX] = opened(files[name], images)
    times = race.interleave(runs, rounds, warm_up=side < ONCE)
    for name, net in present.items():
        row = {"name": name, "parameters": sum(p.numel() for p in net.parameters())}
        measure = functools.partial(race.in_a_process_of_its_own, __file__, "--memory", name, side)
        row["memory MB"], row[f"{ONNX} MB"] = measure(), measure(files[name])
        for task in (FORWARD, BOTH, ONNX):
            if (name, task) not in times:
                continue
            time = times[name, task]
            row[f"{task} seconds"] = [time.median, time.minimum]
            row[task] = count / time.median
            row[f"best {task}"] = count / time.minimum
            row[f"ours/this {task}"] = time.median / times[OURS, task].median
        rows.append(row)
    return [{**row, "shape": shape} for row in rows]


def network(name: str, side: int) -> nn.Module:
    race.installed("timm")
    import timm

    import rwkv_vision  # noqa: F401 - registers our models

    torch.manual_seed(0)
    return timm.create_model(MODELS[name], img_size=side)


@torch.no_grad()
def forward(net: nn.Module, images: torch.Tensor) -> None:
    net.eval()(images)


def both(net: nn.Module, images: torch.Tensor) -> None:
    net.zero_grad(set_to_none=True)
    net.train()(images).sum().backward()


def write_onnx(net: nn.Module, images: torch.Tensor, path: Path) -> Path:
    race.installed("onnxruntime")
    from rwkv_export.fuse import fuse  # as `rwkv export` does; it finds nothing in the ViT

    torch._dynamo.reset()
    program = torch.onnx.export(net.eval(), (images,), dynamo=True, opset_version=20, verbose=False)
    assert program is not None
    fuse(program.model)
    program.save(path)
    return path


def opened(path: Path, images: torch.Tensor) -> Callable[[], object]:
    """Return a function that runs the pictures through onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def onnx_memory(path: Path, side: int) -> float:
    """Return the megabytes that a pass in onnxruntime adds at its peak."""
    return race.added_megabytes(opened(path, torch.randn(1, 3, side, side)))


def added_memory(name: str, side: int) -> float:
    """Return the megabytes that a forward pass adds at its peak, after one of a small picture."""
    small, net = network(name, 64), network(name, side)
    forward(small, torch.randn(1, 3, 64, 64))  # libraries are loaded
    images = torch.randn(1, 3, side, side)
    return race.added_megabytes(lambda: forward(net, images))


if __name__ == "__main__":
    main()
