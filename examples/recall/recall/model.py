"""The model: an embedding, the trunk, a head."""

import numpy as np
from torch import nn

from rwkv_core.backbone import Backbone
from rwkv_core.graphs import StepGraph, recurrent_spec


class RecallModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.emb = nn.Embedding(24, config.dim)
        options = {"mixer": config.mixer, "mixer_options": config.mixer_options}
        self.backbone = Backbone(config.dim, config.depth, **options)
        self.head = nn.Linear(config.dim, 24, bias=False)

    def forward(self, tokens):
        return self.head(self.backbone(self.emb(tokens))[0])

    def spec(self):
        def sample(rng, sizes):
            return {"tokens": rng.integers(24, size=(sizes["batch"], 1))}

        step, first = (
            StepGraph(self.emb, self.backbone, self.head),
            {"tokens": np.zeros((1, 1), int)},
        )
        return recurrent_spec("step", step, inputs=first, outputs=("logits",), sample=sample)
