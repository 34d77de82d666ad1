"""The text domain: what the toolkit needs to train, evaluate and export language models.

Torch is imported where it is used, because exported models are predicted with where it is not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_core.adapter import ExportSpec, Run
from rwkv_text import host, vocabulary
from rwkv_text.config import TextConfig

if TYPE_CHECKING:
    import torch

    from rwkv_core.formats import Architecture
    from rwkv_text.data import TextBatch
    from rwkv_text.model import CausalLM

__all__ = ["TextAdapter", "adapter"]

SEGMENT = 4096  # tokens of one forward pass; longer documents carry the state on


class TextAdapter:
    """Causal language modelling; implements :class:`rwkv_core.adapter.Adapter`."""

    Config = TextConfig

    def build(self, config: TextConfig) -> CausalLM:
        """Return a new language model."""
        from rwkv_text.model import CausalLM

        return CausalLM(config)

    def data(
        self, config: TextConfig, split: str, *, start: int = 0, seed: int = 0
    ) -> Iterator[TextBatch]:
        """Yield windows of the training text, or the held-out documents one by one."""
        from rwkv_text.data import batches

        return batches(config, split, start=start, seed=seed)

    def loss(
        self, model: CausalLM, batch: TextBatch, rng: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return next-token cross entropy with the official trainer's hold on large logits.

        The regulariser adds 0.5e-4 · mean(max logit²): the gradient of its L2Wrap, in a form that
        also scales with accumulation. The sums leave it out.
        """
        import torch
        import torch.nn.functional as F

        inputs, targets = batch.tokens_BT[:, :-1], batch.tokens_BT[:, 1:]
        nats, hold = torch.zeros(()), torch.zeros(())
        state = None
        for at in range(0, inputs.shape[1], SEGMENT):
            out = model(inputs[:, at : at + SEGMENT], state)
            state = out.state
            target = targets[:, at : at + SEGMENT].flatten()
            nats = nats + F.cross_entropy(out.logits_BTV.flatten(0, 1), target, reduction="sum")
            hold = hold + out.logits_BTV.amax(-1).square().sum()
        n = targets.numel()
        sums: dict[str, torch.Tensor | float] = {
            "nats": nats.detach(),
            "tokens": float(n),
            "bytes": float(batch.n_bytes),
        }
        return (nats + 0.5e-4 * hold) / n, sums

    def metrics(self, config: TextConfig, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the loss in nats per token and the size a perfect coder would reach."""
        return {
            "loss": sums["nats"] / sums["tokens"],
            "bits_per_byte": sums["nats"] / math.log(2) / max(sums["bytes"], 1.0),
        }

    def predict(self, run: Run, inputs: Sequence[int]) -> np.ndarray:
        """Return the logits [T, V] after each token id of ``inputs``."""
        return host.feed(run, inputs)[0]

    def generate(self, run: Run, prompt: str = "", **settings: Any) -> Iterator[str]:
        """Yield the continuation of a prompt; settings as in :func:`rwkv_text.host.generate`."""
        return host.generate(run, prompt, **settings)

    def exports(self, model: CausalLM) -> list[ExportSpec]:
        """Return the recurrent step, and the pass over a sequence that hands over its state."""
        from rwkv_text.model import prefill_spec, step_spec

        return [step_spec(model), prefill_spec(model)]

    def metadata(self, model: CausalLM) -> dict[str, Any]:
        """Return tokenizer, vocabulary size and fingerprint."""
        return model.metadata()

    def portable(self, config: TextConfig) -> tuple[TextConfig, dict[str, bytes]]:
        """Return the configuration with the tokenizer's name, and its vocabulary file."""
        name = vocabulary.kind_of(config.tokenizer)
        files = vocabulary.carried_files(config.tokenizer)
        return dataclasses.replace(config, tokenizer=name), files

    def foreign(self, architecture: Architecture) -> TextConfig:
        """Return the configuration of a model read from official weights.

        The rows of the embedding tell the vocabulary: 65536 for World, 50277 (50304 when padded)
        for Pile, and bytes otherwise.
        """
        a = architecture
        return TextConfig(
            dim=a.dim,
            depth=a.depth,
            mixer=a.mixer,
            mixer_options=dict(a.options),
            vocab_size=a.vocab_size,
            tokenizer={65536: "world", 50277: "20B", 50304: "20B"}.get(a.vocab_size, "bytes"),
        )

    def located(self, config: TextConfig, folder: Path) -> TextConfig:
        """Return the configuration with the path of the vocabulary, if it is in ``folder``."""
        path = vocabulary.locate(config.tokenizer, folder)
        return dataclasses.replace(config, tokenizer=path)


adapter = TextAdapter()
