"""A training step of RWKV-7 beside the equal GPT: tokens per second and peak memory by length.

Width 384, 6 layers, vocabulary 256, forward and backward without an optimiser, fp32. The GPT is
`gpt.py`. They are different models, so no answers are compared; that ours are right is what the
tests are for. Memory is what a step adds to a fresh process that holds the model already.

    python benchmarks/training.py [--quick] [--long]     (--long: on to 32,768 tokens, half an hour)
"""

import json
from collections.abc import Callable
from typing import Any

import race
import torch
import torch.nn.functional as F
from gpt import GPT
from torch import Tensor, nn

from rwkv_text import CausalLM, TextConfig

DIM, DEPTH, VOCAB = 384, 6, 256
SHAPES = [(4, 256), (1, 1024), (1, 4096)]
LONG = [(1, 8192), (1, 16384), (1, 32768)]
QUICK = [(4, 64), (1, 256)]
OURS, THEIRS = "ours, RWKV-7", "GPT"
COLUMNS = {"tokens/s": ".0f", "best": ".0f", "ours/this": ".2f", "memory MB": ".0f",
           "parameters": ",d"}  # fmt: skip


def main() -> None:
    parser = race.arguments(__doc__)
    parser.add_argument("--long", action="store_true", help="also 8,192 to 32,768 tokens")
    parser.add_argument("--memory", nargs=3, metavar=("NAME", "B", "T"), help="one step, here")
    args = parser.parse_args()
    race.prepare(args.threads)
    if args.memory:
        name, B, T = args.memory
        print(json.dumps(added_memory(name, int(B), int(T))))
        return
    rounds = args.rounds or (2 if args.quick else 4)
    rows: list[race.Row] = []
    for shape in QUICK if args.quick else SHAPES + (LONG if args.long else []):
        few = 1 if shape in LONG else rounds
        found = one_shape(shape, few)
        print(f"\n(B, T) = {shape}, {few} rounds\n{race.table(found, COLUMNS)}", flush=True)
        rows += found
    name = race.name("training", args)
    race.write(name, rows, {"rounds": rounds, "dim": DIM, "depth": DEPTH, "vocab": VOCAB})
    race.plot(name, lambda figure: draw(figure, rows))


def one_shape(shape: tuple[int, int], rounds: int) -> list[race.Row]:
    models = {name: make(shape[1]) for name, make in MODELS.items()}
    runs = {name: step(model, *shape) for name, model in models.items()}
    times = race.interleave(runs, rounds, warm_up=shape not in LONG)
    tokens = shape[0] * shape[1]
    return [
        {
            "name": name,
            "shape": shape,
            "time": time,
            "tokens/s": tokens / time.median,
            "best": tokens / time.minimum,
            "ours/this": time.median / times[OURS].median,
            "memory MB": race.in_a_process_of_its_own(__file__, "--memory", name, *shape),
            "parameters": sum(p.numel() for p in models[name].parameters()),
        }
        for name, time in times.items()
    ]


class Logits(nn.Module):
    """Our model without the state after the last token, which training does not use."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the logits [B, T, V]."""
        return self.model(tokens_BT).logits_BTV


def ours(context: int) -> nn.Module:
    torch.manual_seed(0)
    return Logits(CausalLM(TextConfig(dim=DIM, depth=DEPTH, vocab_size=VOCAB, mixer="rwkv7")))


def theirs(context: int) -> nn.Module:
    torch.manual_seed(0)
    return GPT(VOCAB, DIM, DEPTH, context=max(context, 4096))


MODELS: dict[str, Callable[[int], nn.Module]] = {OURS: ours, THEIRS: theirs}


def step(model: nn.Module, B: int, T: int) -> Callable[[], None]:
    """Return a function that computes the gradient of the loss on random tokens."""
    tokens = torch.randint(VOCAB, (B, T + 1), generator=torch.Generator().manual_seed(1))

    def run() -> None:
        model.zero_grad(set_to_none=True)
        logits_BTV = model(tokens[:, :-1])
        F.cross_entropy(logits_BTV.flatten(0, 1), tokens[:, 1:].flatten()).backward()

    return run


def added_memory(name: str, B: int, T: int) -> float:
    """Return the megabytes that a step adds at its peak, after one on a few tokens."""
    model = MODELS[name](T)
    step(model, 1, 16)()  # libraries are loaded and the gradients are there
    return race.added_megabytes(step(model, B, T))


def draw(figure: Any, rows: list[race.Row]) -> None:
    for axes, key in zip(figure.subplots(1, 2), ("tokens/s", "memory MB"), strict=True):
        for name in MODELS:
            mine = [row for row in rows if row["name"] == name and row["shape"][0] == 1]
            axes.plot([row["shape"][1] for row in mine], [row[key] for row in mine], "o-",
                      label=name)  # fmt: skip
        axes.set(xscale="log", xlabel="tokens of the one sequence", title=key)
        lengths = sorted({row["shape"][1] for row in rows if row["shape"][0] == 1})
        axes.minorticks_off()
        axes.set_ylim(0)
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.legend()


if __name__ == "__main__":
    main()
