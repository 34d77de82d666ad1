"""Overwrite recall: a stream writes values to keys, overwrites them, and asks for the latest.

Eight keys (0-7), eight values (8-15), and for each key a question (16-23) whose answer follows.
"""

from dataclasses import dataclass, field

import numpy as np

from rwkv_core.train.config import TrainConfig, TrainSettings


@dataclass(frozen=True, kw_only=True)
class RecallConfig:
    dim: int = 32
    depth: int = 2
    mixer: str = "rwkv7"
    mixer_options: dict = field(default_factory=lambda: {"head_dim": 16})
    events: int = 48
    batch_size: int = 64


def stream(rng, config):
    """Return tokens [B, 2·events]: writes (key, value) and questions (question, answer)."""
    rows = []
    for _ in range(config.batch_size):
        memory, row = {}, []
        for _ in range(config.events):
            if memory and rng.random() < 0.5:
                key = rng.choice(list(memory))
                row += [16 + key, memory[key]]
            else:
                key = rng.integers(8)
                memory[key] = rng.integers(8, 16)
                row += [key, memory[key]]
        rows.append(row)
    return np.array(rows)


class RecallAdapter:
    Config = RecallConfig

    def build(self, config):
        from recall.model import RecallModel

        return RecallModel(config)

    def data(self, config, split, *, start=0, seed=0):
        import torch

        for step in range(start, 2**31 if split == "train" else 4):
            rng = np.random.default_rng([split == "eval", seed, step])
            yield torch.from_numpy(stream(rng, config))

    def loss(self, model, batch, rng):
        from torch.nn.functional import cross_entropy

        asked = batch[:, :-1] >= 16
        logits, answers = model(batch[:, :-1])[asked], batch[:, 1:][asked]
        loss, n = cross_entropy(logits, answers), len(answers)
        right = (logits.argmax(-1) == answers).sum()
        return loss, {"nats": loss.detach() * n, "right": right, "answers": n}

    def metrics(self, config, sums):
        n = sums["answers"]
        return {"accuracy": sums["right"] / n, "loss": sums["nats"] / n}

    def predict(self, run, inputs):
        """Return the likeliest token after each token of ``inputs`` [T]; no torch."""
        state, out = run.initial_state("step", 1), []
        for token in inputs:
            state = run("step", {"tokens": np.array([[token]]), **state})
            out.append(int(state.pop("logits").argmax()))
        return out

    def exports(self, model):
        return [model.spec()]

    def metadata(self, model):
        return {"keys": 8}


adapter = RecallAdapter()


def recipe():
    """``rwkv train recall``: accuracy 0.99 or more after 120 steps, 20 s on one core."""
    train = TrainSettings(steps=120, lr=5e-3, lr_final=1e-6, warmup_steps=0, weight_decay=0.1)
    return TrainConfig(adapter="recall", task=RecallConfig(), train=train)
