"""A block like RWKV-7's without the recurrence: the row of a table that tells what it is worth.

A token sees itself and its predecessor. Where this row does as well as the others, the task needs
no memory.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_core.mixers.base import (
    Generation,
    HeadNorm,
    Linear,
    Mixer,
    Shared,
    check_heads,
    lora_rank,
)  # fmt: skip
from rwkv_core.mixers.rwkv7 import ChannelMix7
from rwkv_core.ops.shift import token_shift

__all__ = ["NONE", "LayerStateNone", "TimeMixNone"]


class LayerStateNone(NamedTuple):
    """What one layer remembers: two last tokens."""

    att_shift_BD: Tensor
    ffn_shift_BD: Tensor

    def mix(self, other: "LayerStateNone", weight: float) -> "LayerStateNone":
        """Return ``(1 - weight)·self + weight·other``."""
        return LayerStateNone(*(torch.lerp(a, b, weight) for a, b in zip(self, other, strict=True)))


class TimeMixNone(Mixer):
    """Shift → value and gate → finish, as in RWKV-7, with nothing in between.

    Args:
        dim: width D, a multiple of ``head_dim``.
        head_dim: size of the groups that are normalised together.
        layer: index of this layer.
        depth: number of layers.
        norm_eps: eps of the per-head norm.
    """

    state_type = LayerStateNone

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        layer: int = 0,
        depth: int = 12,
        norm_eps: float = 64e-5,
    ) -> None:
        super().__init__()
        check_heads(dim, head_dim)
        self.dim, self.head_dim, self.layer, self.depth = dim, head_dim, layer, depth
        rank = lora_rank(dim, 5.0)
        self.x_v = nn.Parameter(torch.empty(dim))
        self.x_g = nn.Parameter(torch.empty(dim))
        self.g1 = nn.Parameter(torch.empty(dim, rank))
        self.g2 = nn.Parameter(torch.empty(rank, dim))
        self.value = Linear(dim, dim)
        self.output = Linear(dim, dim)
        self.ln_x = HeadNorm(dim, norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the parameters of the same names in RWKV-7.

        x_v, x_g         1 - (n/D)^(0.7 ρ'), 1 - (n/D)^(0.2 ρ'), with ρ' = 1 - layer/depth
        g1, g2           0; orthogonal, gain 0.1
        value, output    orthogonal, gain 1; 0
        ln_x             weight ((1 + layer)/depth)^0.7, bias 0
        """
        s = torch.arange(self.dim) / self.dim
        rest = 1 - self.layer / self.depth
        self.x_v.copy_(1 - s ** (0.7 * rest))
        self.x_g.copy_(1 - s ** (0.2 * rest))
        nn.init.zeros_(self.g1)
        nn.init.orthogonal_(self.g2, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.zeros_(self.output.weight)
        self.ln_x.weight.fill_(((1 + self.layer) / self.depth) ** 0.7)
        self.ln_x.bias.zero_()

    def init_state(
        self, batch: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> LayerStateNone:
        """Return the state before the first token: zeros."""
        zeros = torch.zeros(batch, self.dim, device=device, dtype=dtype)
        return LayerStateNone(zeros, zeros.clone())

    def forward(
        self, x_BTD: Tensor, state: LayerStateNone, shared: Shared
    ) -> tuple[Tensor, LayerStateNone, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        previous_BTD, last_BD = token_shift(x_BTD, state.att_shift_BD)
        return self.mix(x_BTD, previous_BTD), state._replace(att_shift_BD=last_BD), shared

    def step(
        self, x_1BD: Tensor, state: LayerStateNone, shared: Shared
    ) -> tuple[Tensor, LayerStateNone, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        y_1BD = self.mix(x_1BD, state.att_shift_BD)
        return y_1BD, state._replace(att_shift_BD=x_1BD), shared

    def mix(self, x_D: Tensor, previous_D: Tensor) -> Tensor:
        """Return the gated, normalised value of the interpolated token [..., D]."""
        d = previous_D - x_D
        v_D = self.value(x_D + d * self.x_v)
        gate_D = torch.sigmoid((x_D + d * self.x_g) @ self.g1) @ self.g2
        y_H1V = self.ln_x(v_D.unflatten(-1, (-1, 1, self.head_dim)))
        return self.output(y_H1V.flatten(-3) * gate_D)


NONE = Generation(TimeMixNone, ChannelMix7)
