"""The causal language model: embedding, trunk, head."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from rwkv_core import checkpoint
from rwkv_core.adapter import ExportSpec
from rwkv_core.backbone import Backbone, Block
from rwkv_core.errors import CheckpointError
from rwkv_core.graphs import SequenceGraph, StepGraph, recurrent_spec
from rwkv_core.mixers.base import Linear
from rwkv_core.run import TorchRun
from rwkv_core.state import State
from rwkv_text import host
from rwkv_text.config import TextConfig
from rwkv_text.vocabulary import kind_of

__all__ = ["CausalLM", "LMOutput", "load"]


class LMOutput(NamedTuple):
    """Logits [B, T, V] of the token after each position, and the state after the last one."""

    logits_BTV: Tensor
    state: State


class CausalLM(nn.Module):
    """An RWKV language model of any generation.

    Args:
        config: sizes, mixer and tokenizer.
    """

    adapter = "text"

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.emb = nn.Embedding(config.vocab_size, config.dim)
        self.backbone = Backbone(
            config.dim, config.depth, mixer=config.mixer, mixer_options=config.mixer_options
        )
        self.head = Linear(config.dim, config.vocab_size)
        self.fingerprint = _fingerprint(config)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the ends; the mixers look after themselves.

        emb     uniform ±1e-4: the first LayerNorm scales it up
        head    orthogonal, gain 0.5·√(V/D) if V > D else 0.5
        """
        nn.init.uniform_(self.emb.weight, -1e-4, 1e-4)
        ratio = self.config.vocab_size / self.config.dim
        nn.init.orthogonal_(self.head.weight, gain=0.5 * math.sqrt(max(ratio, 1.0)))

    def init_state(self, batch: int = 1) -> State:
        """Return the state before the first token of ``batch`` sequences."""
        weight = self.emb.weight
        layers = self.backbone.init_state(batch, device=weight.device, dtype=weight.dtype)
        return State(layers, 0, self.fingerprint)

    def forward(self, tokens_BT: Tensor, state: State | None = None) -> LMOutput:
        """Read tokens [B, T]; ``state`` None is a document's start. Any T, trained on or not.

        Raises:
            CheckpointError: the state belongs to another model.
        """
        if state is None:
            state = self.init_state(tokens_BT.shape[0])
        elif state.model != self.fingerprint:
            raise CheckpointError(
                f"the state belongs to another model: it has fingerprint {state.model}, this model "
                f"has {self.fingerprint}"
            )
        x_BTD, layers = self.backbone(self.emb(tokens_BT), state.layers, tokens_BT)
        position = state.position + tokens_BT.shape[1]
        return LMOutput(self.head(x_BTD), State(layers, position, self.fingerprint))

    def generate(
        self,
        prompt: str = "",
        *,
        max_tokens: int = 100,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        vocabulary: str | None = None,
        stream: bool = False,
    ) -> str | Iterator[str]:
        """Return the continuation of a prompt, or with ``stream`` an iterator over its pieces.

        Settings as in :func:`rwkv_text.host.generate`.
        """
        run = TorchRun(self, [step_spec(self), prefill_spec(self)], self.metadata())
        pieces = host.generate(
            run, prompt, max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k,
            seed=seed, vocabulary=vocabulary or self.config.tokenizer,
        )  # fmt: skip
        return pieces if stream else "".join(pieces)

    def metadata(self) -> dict[str, str | int]:
        """Return what a host of this model needs to know beside its graphs."""
        config = self.config
        return {
            "tokenizer": kind_of(config.tokenizer),
            "vocab_size": config.vocab_size,
            "model": self.fingerprint,
        }


def step_spec(model: CausalLM) -> ExportSpec:
    """Return the recurrent step as a graph: tokens [B, 1] to logits [B, V]."""

    def sample(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {"tokens": rng.integers(model.config.vocab_size, size=(sizes["batch"], 1))}

    return recurrent_spec(
        "step",
        StepGraph(model.emb, model.backbone, model.head),
        inputs={"tokens": np.zeros((1, 1), np.int64)},
        outputs=("logits",),
        sample=sample,
    )


def prefill_spec(model: CausalLM) -> ExportSpec:
    """Return the pass over a sequence as a graph: tokens [B, T] to logits [B, R, V].

    ``positions`` [R] are those whose logits are wanted, from 0 to T - 1.
    """

    def sample(rng: np.random.Generator, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
        shape = sizes["batch"], sizes["time"]
        tokens = rng.integers(model.config.vocab_size, size=shape)
        return {"tokens": tokens, "positions": np.arange(sizes["time"])[-sizes["rows"] :]}

    return recurrent_spec(
        "prefill",
        SequenceGraph(model.emb, model.backbone, model.head),
        inputs={"tokens": np.zeros((1, 5), np.int64), "positions": np.arange(3)},
        outputs=("logits",),
        sample=sample,
        dynamic={"tokens": {0: "batch", 1: "time"}, "positions": {0: "rows"}},
        sizes=(
            {"batch": 1, "time": 64, "rows": 64},
            {"batch": 1, "time": 1, "rows": 1},
            {"batch": 3, "time": 7, "rows": 2},
            {"batch": 2, "time": 100, "rows": 1},
        ),
    )


def load(path: str | Path) -> CausalLM:
    """Return the language model at ``path``, in fp32 and evaluation mode, laid out for decoding.

    Args:
        path: a checkpoint's folder or a run's; an official ``.pth``; a ggmf file of rwkv.cpp, also
            quantised; safetensors; a Hugging Face folder of fla, rwkv7-hf or transformers' Rwkv; or
            ``owner/name``, a Hugging Face repository, if nothing on disk has that name.

    Raises:
        CheckpointError: nothing that can be read, a damaged file, or a model of another domain.
    """
    model = cast(CausalLM, checkpoint.load(path, "text"))
    for block in model.backbone.blocks:
        # what a squared ReLU feeds: of one token, more than half of the columns need not be read
        value = getattr(cast(Block, block).channel_mix, "value", None)
        if isinstance(value, Linear):
            value.lay_by_columns()
    return model


def _fingerprint(config: TextConfig) -> str:
    """Return 16 hexadecimal digits of the architecture; data and batch size play no part."""
    shape = {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if f.name not in ("data", "context", "batch_size")
    }
    shape["tokenizer"] = kind_of(config.tokenizer)  # wherever its file is
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
