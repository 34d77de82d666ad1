r"""RWKV-4: time mixing by a decaying average per channel, channel mixing with squared ReLU.

Paper: arXiv 2305.13048; code of reference: BlinkDL/RWKV-LM, RWKV-v4/src/model.py. Parameter names
are theirs.

    symbol   meaning                               shape        computed as
    x, x⁻    token and its predecessor             [B, T, D]    token shift
    x_□      share of the token in the mixture     [B, T, D]    x μ_□ + x⁻ (1 - μ_□), □ in k v r
    r        receptance                            [B, T, D]    σ(linear map of x_r)
    k v      key (an exponent) and value           [B, T, D]    linear maps of x_k x_v
    w        log-decay, < 0                        [D]          -exp(time_decay)
    u        bonus of the current token            [D]          time_first
    S        two sums and their scale              3 × [B, D]   ops/wkv4

B batch, T time, D width. Names that begin after B and T (``x_D``) belong to code that both paths
use: a sequence brings [B, T, ...], one step [1, B, ...].
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_core.mixers.base import Generation, Linear, Mixer, Shared
from rwkv_core.ops._common import state_dtype
from rwkv_core.ops.shift import token_shift
from rwkv_core.ops.squared_relu import squared_relu
from rwkv_core.ops.wkv4 import WKV4State, wkv4, wkv4_step

__all__ = ["RWKV4", "ChannelMix4", "LayerState4", "TimeMix4"]


class LayerState4(NamedTuple):
    """What one layer remembers: two last tokens in the dtype of the activations, sums in fp32.

    The sums stand for ``wkv_num·e^wkv_max`` and ``wkv_den·e^wkv_max``.
    """

    att_shift_BD: Tensor
    wkv_num_BD: Tensor
    wkv_den_BD: Tensor
    wkv_max_BD: Tensor
    ffn_shift_BD: Tensor

    def mix(self, other: "LayerState4", weight: float) -> "LayerState4":
        """Return ``(1 - weight)·self + weight·other`` of what the sums stand for."""
        top = torch.maximum(self.wkv_max_BD, other.wkv_max_BD)
        a, b = ((s.wkv_max_BD - top).exp() for s in (self, other))
        return LayerState4(
            torch.lerp(self.att_shift_BD, other.att_shift_BD, weight),
            torch.lerp(a * self.wkv_num_BD, b * other.wkv_num_BD, weight),
            torch.lerp(a * self.wkv_den_BD, b * other.wkv_den_BD, weight),
            top,
            torch.lerp(self.ffn_shift_BD, other.ffn_shift_BD, weight),
        )


class TimeMix4(Mixer):
    """Time mixing of RWKV-4: shift → project → recurrence → finish.

    Args:
        dim: width D.
        layer: index of this layer.
        depth: number of layers, for the initialisation.
        impl: implementation of the op, as in :func:`rwkv_core.ops.wkv4`.
    """

    lr_scales = {"time_decay": 2.0, "time_first": 3.0}  # noqa: RUF012 - constants of the recipe
    official_rows = frozenset(("time_mix_k", "time_mix_v", "time_mix_r"))
    full_precision = frozenset(("time_decay", "time_first"))
    fp16_scaled = ("output",)
    state_type = LayerState4

    def __init__(self, dim: int, *, layer: int = 0, depth: int = 12, impl: str = "auto") -> None:
        super().__init__()
        self.dim, self.layer, self.depth, self.impl = dim, layer, depth, impl
        self.time_decay = nn.Parameter(torch.empty(dim))
        self.time_first = nn.Parameter(torch.empty(dim))
        self.time_mix_k = nn.Parameter(torch.empty(dim))
        self.time_mix_v = nn.Parameter(torch.empty(dim))
        self.time_mix_r = nn.Parameter(torch.empty(dim))
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.receptance = Linear(dim, dim)
        self.output = Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        With n the channel, s = n/D, l = n/(D-1), ρ = layer/(depth-1), ρ' = 1 - layer/depth:

            time_decay              -5 + 8 l^(0.7 + 1.3 ρ)
            time_first              ln 0.3 + 0.5 ((n + 1) mod 3 - 1)
            time_mix_k, _v, _r      s^ρ', s^ρ' + 0.3 ρ, s^(0.5 ρ')
            value                   orthogonal, gain 1
            key, receptance         0
            output                  0: a block is the identity at the start
        """
        rho = self.layer / max(self.depth - 1, 1)
        rest = 1 - self.layer / self.depth
        n = torch.arange(self.dim)
        s, linear = n / self.dim, n / max(self.dim - 1, 1)
        self.time_decay.copy_(-5 + 8 * linear ** (0.7 + 1.3 * rho))
        self.time_first.copy_(math.log(0.3) + 0.5 * ((n + 1) % 3 - 1))
        self.time_mix_k.copy_(s**rest)
        self.time_mix_v.copy_(s**rest + 0.3 * rho)
        self.time_mix_r.copy_(s ** (0.5 * rest))
        nn.init.orthogonal_(self.value.weight)
        for linear_map in (self.key, self.receptance, self.output):
            nn.init.zeros_(linear_map.weight)

    def init_state(
        self, batch: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> LayerState4:
        """Return the state before the first token. ``dtype`` is that of the activations."""
        shift_BD = torch.zeros(batch, self.dim, device=device, dtype=dtype)
        sums = WKV4State.empty(shift_BD if dtype == torch.float64 else shift_BD.float())
        return LayerState4(shift_BD, *sums, shift_BD.clone())

    def forward(
        self, x_BTD: Tensor, state: LayerState4, shared: Shared
    ) -> tuple[Tensor, LayerState4, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        previous_BTD, last_BD = token_shift(x_BTD, state.att_shift_BD)
        mix_3D = self.shift_mix()[:, None, None]
        mixed = torch.addcmul(previous_BTD, x_BTD - previous_BTD, mix_3D).unbind()
        r, k, v = self.project(mixed)
        sums = WKV4State(state.wkv_num_BD, state.wkv_den_BD, state.wkv_max_BD)
        y_BTD, sums = wkv4(self.log_decay(), self.time_first, k, v, sums, impl=self.impl)
        return self.output(r * y_BTD), LayerState4(last_BD, *sums, state.ffn_shift_BD), shared

    def step(
        self, x_1BD: Tensor, state: LayerState4, shared: Shared
    ) -> tuple[Tensor, LayerState4, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        previous_1BD, mix_3D = state.att_shift_BD, self.shift_mix()[:, None]
        r, k, v = self.project(torch.addcmul(previous_1BD, x_1BD - previous_1BD, mix_3D).split(1))
        dtype = state.wkv_num_BD.dtype
        w, u, k, v = (x.to(dtype) for x in (self.log_decay(), self.time_first, k, v))
        y_1BD, sums = wkv4_step(w, u, k, v, (state.wkv_num_BD, state.wkv_den_BD, state.wkv_max_BD))
        y_1BD = self.output(r * y_1BD.to(x_1BD.dtype))
        return y_1BD, LayerState4(x_1BD, *sums, state.ffn_shift_BD), shared

    def shift_mix(self) -> Tensor:
        """Return the share of the token in each of the three inputs [3, D]: k v r."""
        return torch.stack([self.time_mix_k, self.time_mix_v, self.time_mix_r])

    def project(self, mixed: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return receptance, key and value of the three shifted inputs [..., D] (k v r)."""
        x_k, x_v, x_r = mixed
        return torch.sigmoid(self.receptance(x_r)), self.key(x_k), self.value(x_v)

    def log_decay(self) -> Tensor:
        """Return w [D], < 0, in fp32 at least."""
        return -self.time_decay.to(state_dtype(self.time_decay)).exp()


class ChannelMix4(Mixer):
    """Channel mixing of RWKV-4 and 5: token shift, expansion, squared ReLU, receptance.

    Args:
        dim: width D.
        layer: index of this layer.
        depth: number of layers.
        hidden_dim: inner width; None is 4·D.
    """

    official_rows = frozenset(("time_mix_k", "time_mix_r"))
    fp16_scaled = ("value",)

    def __init__(
        self, dim: int, *, layer: int = 0, depth: int = 12, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        self.layer, self.depth = layer, depth
        self.time_mix_k = nn.Parameter(torch.empty(dim))
        self.time_mix_r = nn.Parameter(torch.empty(dim))
        self.key = Linear(dim, hidden_dim or 4 * dim)
        self.receptance = Linear(dim, dim)
        self.value = Linear(hidden_dim or 4 * dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        time_mix_k, _r       (n/D)^ρ', with ρ' = 1 - layer/depth
        key                  orthogonal, gain √(hidden/D) if that is above 1
        receptance, value    0: a block is the identity at the start
        """
        dim, hidden = len(self.time_mix_k), self.key.out_features
        self.time_mix_k.copy_((torch.arange(dim) / dim) ** (1 - self.layer / self.depth))
        self.time_mix_r.copy_(self.time_mix_k)
        nn.init.orthogonal_(self.key.weight, gain=max(1.0, math.sqrt(hidden / dim)))
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(self, x_BTD: Tensor, state: Any, shared: Shared) -> tuple[Tensor, Any, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        previous_BTD, last_BD = token_shift(x_BTD, state.ffn_shift_BD)
        return self.mix(x_BTD, previous_BTD), state._replace(ffn_shift_BD=last_BD), shared

    def step(self, x_1BD: Tensor, state: Any, shared: Shared) -> tuple[Tensor, Any, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        y_1BD = self.mix(x_1BD, state.ffn_shift_BD)
        return y_1BD, state._replace(ffn_shift_BD=x_1BD), shared

    def mix(self, x_D: Tensor, previous_D: Tensor) -> Tensor:
        """Expand the interpolated token [..., D], square, project back, gate by the receptance."""
        d_D = x_D - previous_D
        x_k = torch.addcmul(previous_D, d_D, self.time_mix_k)
        x_r = torch.addcmul(previous_D, d_D, self.time_mix_r)
        hidden = squared_relu(self.key(x_k))
        return torch.sigmoid(self.receptance(x_r)) * self.value(hidden)


RWKV4 = Generation(TimeMix4, ChannelMix4)
