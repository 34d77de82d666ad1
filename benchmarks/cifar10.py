"""VRWKV beside timm's ViT of the same size, trained from nothing on CIFAR-10 and MNIST.

Three layers of width 32, patches of 4 × 4 pixels: 45 thousand parameters, so that ten epochs are
minutes of one core. Every model gets the same script: pictures, order, augmentation (a random crop
after padding by an eighth, mirroring but for digits), smoothed labels, AdamW, warm-up and cosine.
The learning rate of each, and what the ViT pools and starts from, are chosen on training pictures
held out; test pictures are looked at once, at the end of a run. The pictures are read from PNG or
JPEG files, ``train/CLASS/`` and ``test/CLASS/``. The models are in ``image_models.py``.

    python benchmarks/cifar10.py --data CIFAR10 [--mnist MNIST] [--quick] [--out FOLDER]
    python benchmarks/cifar10.py --into docs/vision.md [--out FOLDER]      what is finished, as text

Every finished run is a line of ``FOLDER/runs.jsonl`` and is not repeated; one that was interrupted
goes on from its last epoch. The table is printed after each, most valuable runs first; pictures of
the parts' worth and of receptive fields are drawn where there is matplotlib.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import race
import torch
import torch.nn.functional as F
from image_models import ABLATION, DEPTH, DIM, OURS, PARTS, SCANS, THEIRS, make
from torch import Tensor, nn

from rwkv_core.train.config import TrainSettings
from rwkv_core.train.optim import optimizer
from rwkv_core.train.schedule import official_schedule
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.pictures import draw_fields
from rwkv_vision.receptive import receptive_field
from rwkv_vision.sources import open_split

BATCH, SWEEP_EPOCHS, PART_EPOCHS = 125, 2, 5
RATES = (1e-3, 2e-3, 4e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's pictures")
    parser.add_argument("--mnist", type=Path, help="folder of MNIST's pictures")
    parser.add_argument("--out", type=Path, default=race.RESULTS / "cifar10")
    parser.add_argument("--quick", action="store_true", help="500 pictures: does it run?")
    parser.add_argument("--into", type=Path, help="write tables between the marks in this file")
    args = parser.parse_args()
    if args.into:
        rows = Study(args.out, None).rows
        args.into.write_text(filled(args.into.read_text(), rows))
        return draw(rows, args.out)
    race.prepare()
    if args.data is None:
        print("nothing to train on: --data FOLDER, CIFAR-10 as train/CLASS/*.jpg, test/CLASS/*.jpg")
        return
    study = Study(args.out / "quick" if args.quick else args.out, 500 if args.quick else None)
    folders = {"cifar10": args.data, "mnist": args.mnist}
    for run in plan(study, [name for name, folder in folders.items() if folder]):
        study.finish(run, folders[run.data])
        print(f"\n{table(study.rows)}", flush=True)
    name = race.name("cifar10", args)
    race.write(name, summary(study.rows), {"batch": BATCH, "dim": DIM, "depth": DEPTH})
    draw(study.rows, study.folder)


@dataclass(frozen=True)
class Run:
    """One training run; ``held_out`` learns without, and is judged by, some training pictures."""

    data: str
    model: str
    epochs: int
    seed: int
    lr: float
    held_out: bool = False

    @property
    def name(self) -> str:
        """Return what tells it from the others, as a file's name."""
        judged = "-held-out" if self.held_out else ""
        model = self.model.replace(" ", "_").replace(",", "")
        return f"{self.data}-{model}-{self.epochs}-{self.seed}-{self.lr:g}{judged}"


def plan(study: "Study", data: list[str]) -> Iterator[Run]:
    """Yield the runs, the most valuable first; each is finished before the next is asked for."""

    def ours_and_theirs(
        epochs: int, seeds: tuple[int, ...], data: str = "cifar10"
    ) -> Iterator[Run]:
        for seed in seeds:
            for model in (OURS, study.best_vit()):
                yield Run(data, model, epochs, seed, study.best_rate(model))

    def others(epochs: int, seeds: tuple[int, ...], *models: str) -> Iterator[Run]:
        for seed in seeds:
            for model in models:
                yield Run("cifar10", model, epochs, seed, study.best_rate(OURS))

    yield from sweep(study, OURS)
    yield from sweep(study, "vit, mean")
    for model in ("vit", "vit, mean, fan-in", "vit, fan-in"):
        yield Run("cifar10", model, SWEEP_EPOCHS, 0, study.best_rate("vit, mean"), held_out=True)
    yield from sweep(study, study.best_vit(), [study.best_rate(study.best_vit())])
    yield from ours_and_theirs(10, (0,))
    if "mnist" in data:
        yield from ours_and_theirs(2, (0, 1, 2), "mnist")
    yield from others(PART_EPOCHS, (0,), OURS, "causal, previous", "causal, Q-Shift")
    yield from ours_and_theirs(10, (1, 2))
    yield from others(10, (0,), "causal, Q-Shift")
    yield from sweep(study, "vrwkv, σ 0.02", [study.best_rate(OURS)])
    yield Run("cifar10", "vrwkv, σ 0.02", PART_EPOCHS, 0, study.best_rate("vrwkv, σ 0.02"))
    yield from others(PART_EPOCHS, (0,), *SCANS, "vrwkv_2d")
    yield from sweep(study, "vrwkv7", [study.best_rate(OURS)])
    yield Run("cifar10", "vrwkv7", 10, 0, study.best_rate("vrwkv7"))
    yield from ours_and_theirs(30, (0,))
    yield from others(PART_EPOCHS, (0,), *ABLATION)
    yield from sweep(study, "vrwkv6", [study.best_rate(OURS)])
    yield Run("cifar10", "vrwkv6", 10, 0, study.best_rate("vrwkv6"))
    yield from others(PART_EPOCHS, (1, 2), OURS, "causal, previous", "causal, Q-Shift")
    yield from others(10, (1, 2), "causal, Q-Shift")
    yield from ours_and_theirs(30, (1, 2))
    yield from others(PART_EPOCHS, (1, 2), *SCANS, "vrwkv_2d", *ABLATION)
    for seed in (1, 2):
        yield Run("cifar10", "vrwkv, σ 0.02", PART_EPOCHS, seed, study.best_rate("vrwkv, σ 0.02"))
        for model in ("vrwkv7", "vrwkv6"):
            yield Run("cifar10", model, 10, seed, study.best_rate(model))


def sweep(study: "Study", model: str, start: Sequence[float] = RATES) -> Iterator[Run]:
    """Yield runs at rates a factor of 2 apart until the best has a worse one on either side."""
    known = [row["lr"] for row in study.rows if row["model"] == model and row["held_out"]]
    rates = sorted({*known, *start})
    for lr in rates:
        yield Run("cifar10", model, SWEEP_EPOCHS, 0, lr, held_out=True)
    while (best := study.best_rate(model)) in (min(rates), max(rates)) and len(rates) < 6:
        rates.append(best / 2 if best == min(rates) else best * 2)
        yield Run("cifar10", model, SWEEP_EPOCHS, 0, rates[-1], held_out=True)


# -- runs


class Study:
    """Finished runs, in a file; and what follows from them."""

    def __init__(self, folder: Path, n_pictures: int | None) -> None:
        self.folder, self.n_pictures = folder, n_pictures
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]
        self.pictures: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}

    def finish(self, run: Run, data: Path) -> None:
        """Train and judge, unless that is done, and write the figures down."""
        if any(row["name"] == run.name for row in self.rows):
            return
        row = {**asdict(run), "name": run.name, **self.train(run, data)}
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def best_rate(self, model: str) -> float:
        """Return the rate that did best on the pictures held out."""
        return self._best(row for row in self.rows if row["model"] == model)["lr"]

    def best_vit(self) -> str:
        """Return the ViT that did best on the pictures held out."""
        return self._best(row for row in self.rows if row["model"].startswith(THEIRS))["model"]

    def _best(self, rows: Any) -> dict[str, Any]:
        return max((row for row in rows if row["held_out"]), key=lambda row: row["accuracy"])

    def split(self, run: Run, data: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return pictures and classes to learn from, and those to be judged by."""
        pictures, targets = self.load(run.data, "train", data)
        if not run.held_out:
            return pictures, targets, *self.load(run.data, "test", data)
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(targets)))
        kept, learned = order[: len(order) // 10], order[len(order) // 10 :]
        return pictures[learned], targets[learned], pictures[kept], targets[kept]

    def load(self, name: str, part: str, data: Path) -> tuple[Tensor, Tensor]:
        """Return all pictures of a part as bytes [N, C, H, W], and their classes [N]."""
        if (name, part) not in self.pictures:
            # a folder's parts, without the toolkit's own share held out of the training part
            config = ClassifyConfig(data=str(data / part), channels=1 if name == "mnist" else 3)
            self.pictures[name, part] = read(config, self.n_pictures)
        return self.pictures[name, part]

    def train(self, run: Run, data: Path) -> dict[str, Any]:
        """Train from nothing, or from the last epoch that an interrupted run finished."""
        images, targets, judged, truth = self.split(run, data)
        torch.manual_seed(run.seed)
        net = make(run.model, tuple(images.shape[1:])).train()
        per_epoch = len(images) // BATCH
        steps = run.epochs * per_epoch
        settings = TrainSettings(
            steps=steps, lr=run.lr, lr_final=run.lr / 100, warmup_steps=steps // 20,
            weight_decay=0.05, beta2=0.999, eps=1e-8,
        )  # fmt: skip
        optim = optimizer(net, settings)
        set_rate = official_schedule(net, optim, settings)
        shift = images.float().mean((0, 2, 3))[:, None, None]
        scale = images.float().std((0, 2, 3))[:, None, None]
        left = self.folder / f"{run.name}.pt"
        first, losses, seconds = 0, [], 0.0
        if left.exists():
            state = torch.load(left, weights_only=True)
            net.load_state_dict(state["net"])
            optim.load_state_dict(state["optim"])
            first, losses, seconds = state["epoch"], state["losses"], state["seconds"]
        for epoch in range(first, run.epochs):
            began, total = time.process_time(), 0.0
            rng = np.random.default_rng([run.seed, epoch])
            torch.manual_seed(run.seed + epoch)
            order = torch.from_numpy(rng.permutation(len(images)))
            for i in range(per_epoch):
                chosen = order[i * BATCH : (i + 1) * BATCH]
                x_BCHW = augment(images[chosen], rng, mirror=run.data != "mnist")
                logits = net((x_BCHW - shift) / scale)
                loss = F.cross_entropy(logits, targets[chosen], label_smoothing=0.1)
                optim.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), settings.grad_clip)
                set_rate(epoch * per_epoch + i)
                optim.step()
                total += loss.item()
            seconds += time.process_time() - began
            losses.append(total / per_epoch)
            print(f"{run.name}: epoch {epoch + 1}, {losses[-1]:.3f}, {seconds:.0f} s", flush=True)
            state = {"net": net.state_dict(), "optim": optim.state_dict(), "epoch": epoch + 1}
            torch.save({**state, "losses": losses, "seconds": seconds}, left.with_suffix(".part"))
            os.replace(left.with_suffix(".part"), left)
        net.eval()
        with torch.no_grad():
            parts = zip(judged.split(500), truth.split(500), strict=True)
            right = sum(int((net((x - shift) / scale).argmax(1) == y).sum()) for x, y in parts)
        return {
            "accuracy": right / len(truth),
            "parameters": sum(p.numel() for p in net.parameters()),
            "losses": losses,
            "seconds": seconds,
            "images/s": run.epochs * per_epoch * BATCH / seconds,
        }


def read(config: ClassifyConfig, n_pictures: int | None) -> tuple[Tensor, Tensor]:
    """Return the pictures of a folder of classes as bytes [N, C, H, W], and their classes [N]."""
    rows, targets = [], []
    for split in ("train", "eval", "test"):
        pictures = open_split(config, split)
        step = 1 if n_pictures is None else -(-3 * len(pictures.targets) // n_pictures)
        for i in range(0, len(pictures.targets), step):
            pixels = np.asarray(pictures.load(i))
            rows.append(pixels.reshape(*pixels.shape[:2], -1))
            targets.append(int(pictures.targets[i]))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous(), torch.tensor(targets)


def augment(images_BCHW: Tensor, rng: np.random.Generator, *, mirror: bool) -> Tensor:
    """Crop at random after padding with black by an eighth of the side, and mirror every other."""
    B, _, H, W = images_BCHW.shape
    p = H // 8
    top, left = (torch.from_numpy(rng.integers(0, 2 * p + 1, B)) for _ in range(2))
    rows = (top[:, None] + torch.arange(H))[:, :, None]
    columns = left[:, None] + torch.arange(W)
    if mirror:
        mirrored = torch.from_numpy(rng.random(B) < 0.5)
        columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images_BCHW, (p, p, p, p))
    return padded[torch.arange(B)[:, None, None], :, rows, columns[:, None]].permute(0, 3, 1, 2)


# -- what came out


def summary(rows: list[dict[str, Any]]) -> list[race.Row]:
    """Return a row for each data, number of epochs and model: mean and deviation over seeds."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        if not row["held_out"]:
            groups.setdefault((row["data"], row["epochs"], row["model"]), []).append(row)
    found = []
    for (data, epochs, model), group in groups.items():
        scores = [100 * row["accuracy"] for row in group]
        found.append(
            {
                "name": f"{data}, {epochs} epochs, {model}",
                "data": data,
                "epochs": epochs,
                "model": model,
                "parameters": group[0]["parameters"],
                "lr": group[0]["lr"],
                "seeds": len(scores),
                "%": mean(scores),
                "±": stdev(scores) if len(scores) > 1 else None,
                "CPU s": mean(row["seconds"] for row in group),
            }
        )
    return sorted(found, key=lambda row: (row["data"], row["epochs"], -row["%"]))


def table(rows: list[dict[str, Any]]) -> str:
    """Return the summary, and the sweeps behind it, as text."""
    columns = {"parameters": ",d", "lr": "g", "seeds": "d", "%": ".2f", "±": ".2f", "CPU s": ".0f"}
    swept = [
        {"name": f"held out, {row['model']}", "lr": row["lr"], "%": 100 * row["accuracy"]}
        for row in rows
        if row["held_out"]
    ]
    return race.table([*summary(rows), *swept], columns)


SAID = {
    OURS: "VRWKV", "vrwkv, σ 0.02": "VRWKV, σ = 0.02", "vrwkv6": "VRWKV6", "vrwkv7": "VRWKV7",
    "vrwkv_2d": "VRWKV, distance in the plane", "vit": "ViT, class token",
    "vit, fan-in": "ViT, class token, σ = 1/√inputs",
    "vit, mean": "ViT, mean of tokens", "vit, mean, fan-in": "ViT, mean of tokens, σ = 1/√inputs",
    "none": "VRWKV without a recurrence", "zigzag": "VRWKV, zigzag",
    "rows, columns": "VRWKV, rows and columns in turn", "four ways": "VRWKV, four orders at once",
}  # fmt: skip
MARKS = "<!-- from benchmarks/cifar10.py -->", "<!-- to here -->"


def filled(text: str, rows: list[dict[str, Any]]) -> str:
    """Return a page with the tables of the study between its two marks."""
    before, mark, rest = text.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not (mark and end):
        raise SystemExit(f"no place for the tables: expected {MARKS[0]} and {MARKS[1]}")
    found = summary(rows)
    wholes = [("cifar10", 10), ("cifar10", 30), ("mnist", 2)]
    names: dict[str, race.Row] = {}  # the sizes on CIFAR-10, where there are runs on both
    for row in found:
        if (row["data"], row["epochs"]) in wholes:
            names.setdefault(row["model"], row)
    heads = ["CIFAR-10, 10 epochs", "30 epochs", "MNIST, 2 epochs"]
    lines = [f"| model | parameters | rate | CPU-s an epoch | {' | '.join(heads)} |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for model, row in names.items():
        cells = [score(found, model, *whole) for whole in wholes]
        per_epoch = row["CPU s"] / row["epochs"]
        lines += [f"| {SAID.get(model, model)} | {row['parameters']:,} | {row['lr']:g} "
                  f"| {per_epoch:.0f} | {' | '.join(cells)} |"]  # fmt: skip
    parts = [row for row in found if (row["data"], row["epochs"]) == ("cifar10", PART_EPOCHS)]
    lines += ["", f"| CIFAR-10, {PART_EPOCHS} epochs | rate | right |", "|---|---|---|"]
    for row in parts:
        cell = score(found, row["model"], "cifar10", PART_EPOCHS)
        lines += [f"| {SAID.get(row['model'], row['model'])} | {row['lr']:g} | {cell} |"]
    swept: dict[str, dict[float, float]] = {}
    for row in rows:
        if row["held_out"]:
            swept.setdefault(row["model"], {})[row["lr"]] = 100 * row["accuracy"]
    lines += ["", f"| held out, {SWEEP_EPOCHS} epochs | % at each rate |", "|---|---|"]
    for model, scores in swept.items():
        each = ", ".join(f"{scores[lr]:.1f} at {lr:g}" for lr in sorted(scores))
        lines += [f"| {SAID.get(model, model)} | {each} |"]
    table = "\n".join(lines)
    return f"{before}{mark}\n\n{table}\n\n{end}{after}"


def score(found: list[race.Row], model: str, data: str, epochs: int) -> str:
    """Return mean, deviation and seeds of one kind of run, as text; empty without a run."""
    for row in found:
        if (row["model"], row["data"], row["epochs"]) == (model, data, epochs):
            if row["seeds"] == 1:
                return f"{row['%']:.1f} % (1 seed)"
            return f"{row['%']:.1f} ± {row['±']:.1f} % ({row['seeds']} seeds)"
    return ""


def draw(rows: list[dict[str, Any]], folder: Path) -> None:
    """Draw what recurrence and neighbours are worth, and what the nets see of a picture."""
    scores = {row["model"]: row["%"] for row in summary(rows) if row["epochs"] == PART_EPOCHS}
    shown = [{"name": model, "right, %": scores[model]} for model in PARTS if model in scores]
    if shown:
        race.plot("ablation", race.bars(shown, ["right, %"]), folder)
    fields = {}
    x_BCHW = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for row in rows:
        left = folder / f"{row['name']}.pt"
        if row["held_out"] or row["data"] != "cifar10" or row["seed"] or not left.exists():
            continue
        if row["epochs"] in (PART_EPOCHS, 10) and row["model"] not in fields:
            net = make(row["model"], (3, 32, 32))
            net.load_state_dict(torch.load(left, weights_only=True)["net"])
            fields[SAID.get(row["model"], row["model"])] = receptive_field(net, x_BCHW)
    if fields:
        draw_fields(fields, folder / "receptive.png")


if __name__ == "__main__":
    main()
