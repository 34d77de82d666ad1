"""The causal trunk: pre-norm residual blocks of one generation over [B, T, D]."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_core.mixers.base import Generation, LayerState, Shared
from rwkv_core.registry import MIXERS

__all__ = ["Backbone", "Block"]

NORM_EPS = 1e-5


class Block(nn.Module):
    """Time mixing and channel mixing, each behind a LayerNorm and a residual."""

    def __init__(
        self,
        dim: int,
        *,
        layer: int,
        depth: int,
        generation: Generation,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(dim, NORM_EPS)
        self.ln2 = nn.LayerNorm(dim, NORM_EPS)
        self.time_mix, self.channel_mix = generation.build(
            dim, layer=layer, depth=depth, options=options
        )

    def forward(
        self, x_BTD: Tensor, state: LayerState, shared: Shared
    ) -> tuple[Tensor, LayerState, Shared]:
        """Map a sequence [B, T, D] and the layer's state."""
        y_BTD, state, shared = self.time_mix(self.ln1(x_BTD), state, shared)
        x_BTD = x_BTD + y_BTD
        y_BTD, state, shared = self.channel_mix(self.ln2(x_BTD), state, shared)
        return x_BTD + y_BTD, state, shared

    def step(
        self, x_B1D: Tensor, state: LayerState, shared: Shared
    ) -> tuple[Tensor, LayerState, Shared]:
        """Map one token [B, 1, D] and the layer's state, in operations that export."""
        y_B1D, state, shared = self.time_mix.step(self.ln1(x_B1D), state, shared)
        x_B1D = x_B1D + y_B1D
        y_B1D, state, shared = self.channel_mix.step(self.ln2(x_B1D), state, shared)
        return x_B1D + y_B1D, state, shared


class Backbone(nn.Module):
    """LayerNorm, ``depth`` blocks, LayerNorm: from embeddings to features [B, T, D].

    Args:
        dim: width D.
        depth: number of layers.
        mixer: name in the mixer registry, such as ``"rwkv7"``.
        mixer_options: keyword arguments of that generation's mixers, such as ``head_dim``.

    Raises:
        UnknownNameError: no mixer of that name.
        ConfigError: an option the mixers do not take.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        mixer: str = "rwkv7",
        mixer_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        generation = MIXERS[mixer]
        self.ln_in = nn.LayerNorm(dim, NORM_EPS)
        self.blocks = nn.ModuleList(
            Block(dim, layer=i, depth=depth, generation=generation, options=mixer_options or {})
            for i in range(depth)
        )
        self.ln_out = nn.LayerNorm(dim, NORM_EPS)

    def init_state(
        self, batch: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[LayerState, ...]:
        """Return every layer's state before the first token."""
        return tuple(b.time_mix.init_state(batch, device=device, dtype=dtype) for b in self.blocks)

    def forward(
        self,
        x_BTD: Tensor,
        state: tuple[LayerState, ...] | None = None,
        tokens_BT: Tensor | None = None,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Map a sequence of embeddings [B, T, D]; ``state`` None is a document's start."""
        if state is None:
            state = self.init_state(x_BTD.shape[0], device=x_BTD.device, dtype=x_BTD.dtype)
        return self._run(x_BTD, state, Shared(tokens_BT), "forward")

    def step(
        self,
        x_B1D: Tensor,
        state: tuple[LayerState, ...],
        tokens_B1: Tensor | None = None,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Map one embedding [B, 1, D], in operations that export."""
        return self._run(x_B1D, state, Shared(tokens_B1), "step")

    def _run(
        self, x_BTD: Tensor, state: tuple[LayerState, ...], shared: Shared, method: str
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        x_BTD = self.ln_in(x_BTD)
        after = []
        for block, layer_state in zip(self.blocks, state, strict=True):
            run = block if method == "forward" else block.step
            x_BTD, layer_state, shared = run(x_BTD, layer_state, shared)  # noqa: PLW2901
            after.append(layer_state)
        return self.ln_out(x_BTD), tuple(after)
