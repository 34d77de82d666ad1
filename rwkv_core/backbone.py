"""The causal trunk: pre-norm residual blocks of one generation over [B, T, D]."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from rwkv_core.mixers.base import Generation, LayerState, Shared
from rwkv_core.registry import MIXERS
from rwkv_core.state import packed_names

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
        self, x_1BD: Tensor, state: LayerState, shared: Shared
    ) -> tuple[Tensor, LayerState, Shared]:
        """Map one token of each sequence, time first [1, B, D], in operations that export."""
        y_1BD, state, shared = self.time_mix.step(self.ln1(x_1BD), state, shared)
        x_1BD = x_1BD + y_1BD
        y_1BD, state, shared = self.channel_mix.step(self.ln2(x_1BD), state, shared)
        return x_1BD + y_1BD, state, shared


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
        self.state_type = generation.time_mix.state_type

    def init_state(
        self, batch: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> tuple[LayerState, ...]:
        """Return every layer's state before the first token."""
        mixers = (cast(Block, block).time_mix for block in self.blocks)
        return tuple(mixer.init_state(batch, device=device, dtype=dtype) for mixer in mixers)

    def forward(
        self,
        x_BTD: Tensor,
        state: tuple[LayerState, ...] | None = None,
        tokens_BT: Tensor | None = None,
    ) -> tuple[Tensor, tuple[LayerState, ...]]:
        """Map a sequence of embeddings [B, T, D]; ``state`` None is a document's start."""
        if state is None:
            state = self.init_state(x_BTD.shape[0], device=x_BTD.device, dtype=x_BTD.dtype)
        shared, after = Shared(tokens_BT), []
        x_BTD = self.ln_in(x_BTD)
        for block, before in zip(self.blocks, state, strict=True):
            x_BTD, layer_state, shared = block(x_BTD, before, shared)
            after.append(layer_state)
        return self.ln_out(x_BTD), tuple(after)

    def step(
        self, x_1BD: Tensor, packed: Mapping[str, Tensor], tokens_1B: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Map one token of each sequence, time first [1, B, D], in operations that export.

        ``packed`` holds the state as :meth:`rwkv_core.state.State.packed` does: [L, B, ...].
        """
        shared, after = Shared(tokens_1B), []
        x_1BD = self.ln_in(x_1BD)
        kind = self.state_type
        rows = zip(*(packed[name].split(1) for name in packed_names(kind).values()), strict=True)
        for block, row in zip(self.blocks, rows, strict=True):
            x_1BD, layer_state, shared = cast(Block, block).step(x_1BD, kind(*row), shared)
            after.append(layer_state)
        columns = zip(packed_names(kind).values(), zip(*after, strict=True), strict=True)
        return self.ln_out(x_1BD), {name: torch.cat(column) for name, column in columns}
