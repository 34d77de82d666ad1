r"""RWKV-6 "Finch": time mixing with a decay and a token shift that depend on the data.

Paper: arXiv 2404.05892, section 4; code of reference: BlinkDL/RWKV-LM, RWKV-v5/src/model.py (x060).
Parameter names are theirs.

    symbol   meaning                               shape          computed as
    x, x⁻    token and its predecessor             [B, T, D]      token shift
    h        what the shift looks at               [B, T, 5, R]   tanh((x + (x⁻ - x) maa_x) maa_w1)
    x_□      x + (x⁻ - x)(maa_□ + h_□ maa_w2_□)    [B, T, D]      □ in w k v r g, in this order
    r k v    receptance, key, value                [B, T, H, K]   linear maps of x_r x_k x_v
    g        gate                                  [B, T, D]      silu(linear map of x_g)
    d        raw decay                             [B, T, D]      time_decay + low-rank map of x_w
    w        log-decay, < 0                        [B, T, H, K]   -exp(d)
    u        bonus of the current token            [H, K]         time_faaaa
    S        state                                 [B, H, K, V]   ops/wkv6

B batch, T time, D width, H heads, K key dim = V value dim = head size, R rank of the shift. Names
that begin after B and T (``x_D``, ``r_H1K``) belong to code that both paths use: a sequence brings
[B, T, ...], one step [1, B, ...].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rwkv_core.mixers.base import (
    Generation,
    HeadNorm,
    Linear,
    MatrixState,
    Mixer,
    Shared,
    check_heads,
)  # fmt: skip
from rwkv_core.mixers.rwkv5 import hidden_width
from rwkv_core.ops._common import state_dtype
from rwkv_core.ops.shift import token_shift
from rwkv_core.ops.squared_relu import squared_relu
from rwkv_core.ops.wkv6 import wkv6, wkv6_step

__all__ = ["RWKV6", "ChannelMix6", "Projections6", "TimeMix6"]


class Projections6(NamedTuple):
    """What the recurrence and the finish need of every token; vectors of a head are rows."""

    r_H1K: Tensor
    w_H1K: Tensor
    k_H1K: Tensor
    v_H1V: Tensor
    g_D: Tensor


class TimeMix6(Mixer):
    """Time mixing of RWKV-6: shift → project → recurrence → finish.

    Args:
        dim: width D, a multiple of ``head_dim``.
        head_dim: head size, K = V.
        layer: index of this layer.
        depth: number of layers, for the initialisation.
        mix_rank: rank R of the data-dependent shift; None is 32, or 64 from D = 4096 on.
        decay_rank: rank of the data-dependent decay; None is 64, or 128 from D = 4096 on.
        stabilize_key: scale keys by exp(min(d, 0)), which the official trainer recommends against
            loss spikes. It changes the function, so a model keeps it for life.
        norm_eps: eps of the per-head norm.
        tuned_state: learn the state before the first token, ``time_state`` [H, K, V].
        impl: implementation of the op, as in :func:`rwkv_core.ops.wkv6`.

    A domain recombines the pieces: its own shift before :meth:`shifted`, its own recurrence between
    :meth:`project` and :meth:`finish`.
    """

    lr_scales = {"time_decay": 2.0}  # noqa: RUF012 - a constant of the recipe
    official_rows = frozenset(("time_decay", *(f"time_maa_{c}" for c in "xwkvrg")))
    full_precision = frozenset(("time_decay", "time_faaaa", "time_state"))
    fp16_scaled = ("output",)
    state_type = MatrixState

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        layer: int = 0,
        depth: int = 12,
        mix_rank: int | None = None,
        decay_rank: int | None = None,
        stabilize_key: bool = False,
        norm_eps: float = 64e-5,
        tuned_state: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, head_dim)
        self.dim, self.head_dim, self.layer, self.depth = dim, head_dim, layer, depth
        self.stabilize_key, self.impl = stabilize_key, impl
        heads, large = dim // head_dim, 2 if dim >= 4096 else 1
        mix_rank, decay_rank = mix_rank or 32 * large, decay_rank or 64 * large

        def tensor(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape or (dim,)))

        self.time_maa_x, self.time_maa_w, self.time_maa_k = tensor(), tensor(), tensor()
        self.time_maa_v, self.time_maa_r, self.time_maa_g = tensor(), tensor(), tensor()
        self.time_maa_w1, self.time_maa_w2 = tensor(dim, 5 * mix_rank), tensor(5, mix_rank, dim)
        self.time_decay = tensor()
        self.time_decay_w1, self.time_decay_w2 = tensor(dim, decay_rank), tensor(decay_rank, dim)
        self.time_faaaa = tensor(heads, head_dim)
        self.time_state = tensor(heads, head_dim, head_dim) if tuned_state else None
        self.receptance = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.gate = Linear(dim, dim)
        self.output = Linear(dim, dim)
        self.ln_x = HeadNorm(dim, norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        With n the channel, s = n/D, l = n/(D-1), ρ = layer/(depth-1), ρ' = 1 - layer/depth:

            time_maa_x, _w, _k           1 - s^ρ'
            time_maa_v                   1 - (s^ρ' + 0.3 ρ)
            time_maa_r, _g               1 - s^(0.5 ρ')
            time_decay                   -6 + 5 l^(0.7 + 1.3 ρ)
            time_faaaa                   ρ (1 - l) + 0.1 ((n + 1) mod 3 - 1)
            time_maa_w1, time_decay_w1   0
            time_maa_w2, time_decay_w2   uniform ±0.01
            receptance, value            orthogonal, gain 1
            key, gate                    orthogonal, gain 0.1
            output                       0: a block is the identity at the start
            ln_x                         weight ((1 + layer)/depth)^0.7, bias 0
            time_state                   0, where there is one
        """
        self.reset_channels()
        for name in ("maa", "decay"):
            nn.init.zeros_(getattr(self, f"time_{name}_w1"))
            nn.init.uniform_(getattr(self, f"time_{name}_w2"), -0.01, 0.01)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.zeros_(self.output.weight)
        self.ln_x.weight.fill_(((1 + self.layer) / self.depth) ** 0.7)
        self.ln_x.bias.zero_()
        if self.time_state is not None:
            self.time_state.zero_()

    def reset_channels(self) -> None:
        """Initialise what is one number per channel: interpolation, decay and bonus."""
        rho = self.layer / max(self.depth - 1, 1)
        rest = 1 - self.layer / self.depth
        n = torch.arange(self.dim)
        s, linear = n / self.dim, n / max(self.dim - 1, 1)
        for name in "xwk":
            getattr(self, f"time_maa_{name}").copy_(1 - s**rest)
        self.time_maa_v.copy_(1 - (s**rest + 0.3 * rho))
        self.time_maa_r.copy_(1 - s ** (0.5 * rest))
        self.time_maa_g.copy_(self.time_maa_r)
        self.time_decay.copy_(-6 + 5 * linear ** (0.7 + 1.3 * rho))
        bonus = rho * (1 - linear) + 0.1 * ((n + 1) % 3 - 1)
        self.time_faaaa.copy_(bonus.view_as(self.time_faaaa))

    def init_state(
        self, batch: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> MatrixState:
        """Return the state before the first token: zeros, or the tuned matrices."""
        state = MatrixState.zeros(batch, self.dim, self.head_dim, device=device, dtype=dtype)
        return state if self.time_state is None else state.tuned(self.time_state)

    def forward(
        self, x_BTD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        previous_BTD, last_BD = token_shift(x_BTD, state.att_shift_BD)
        p = self.project(self.shifted(x_BTD, previous_BTD))
        r, w, k, v = (row.squeeze(-2) for row in p[:4])
        y_BTHV, wkv_BHKV = wkv6(r, w, k, v, self.time_faaaa, state.wkv_BHKV, impl=self.impl)
        state = state._replace(att_shift_BD=last_BD, wkv_BHKV=wkv_BHKV)
        return self.finish(y_BTHV[..., None, :], p.g_D), state, shared

    def step(
        self, x_1BD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        d_1BD = state.att_shift_BD - x_1BD
        mix_5BD = self.shift_mix(x_1BD, d_1BD)
        p = self.project(torch.addcmul(x_1BD, d_1BD, mix_5BD).split(1))
        wkv_BHKV = state.wkv_BHKV
        u_H1K = self.time_faaaa[:, None]
        r, w, k, v, u = (x.to(wkv_BHKV.dtype) for x in (*p[:4], u_H1K))
        y_1BH1V, wkv_BHKV = wkv6_step(r, w, k, v, u, wkv_BHKV)
        state = state._replace(att_shift_BD=x_1BD, wkv_BHKV=wkv_BHKV)
        return self.finish(y_1BH1V.to(x_1BD.dtype), p.g_D), state, shared

    def shifted(self, x_BTD: Tensor, previous_BTD: Tensor) -> Sequence[Tensor]:
        """Return the five inputs of :meth:`project`: tokens interpolated with their neighbours."""
        d_BTD = previous_BTD - x_BTD
        mix_5BTD = self.shift_mix(x_BTD, d_BTD).view(5, *x_BTD.shape)
        return torch.addcmul(x_BTD, d_BTD, mix_5BTD).unbind()

    def project(self, mixed: Sequence[Tensor]) -> Projections6:
        """Compute what the recurrence reads from the five shifted inputs [..., D] (w k v r g)."""
        x_w, x_k, x_v, x_r, x_g = mixed
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        raw_D = self.time_decay + torch.tanh(x_w @ self.time_decay_w1) @ self.time_decay_w2
        raw_D = raw_D.to(state_dtype(raw_D))  # half precision has too few digits near 1
        if self.stabilize_key:
            k = k * raw_D.clamp_max(0).exp().to(k.dtype)
        g_D = F.silu(self.gate(x_g))
        r, w, k, v = (x.unflatten(-1, (-1, 1, self.head_dim)) for x in (r, -raw_D.exp(), k, v))
        return Projections6(r, w, k, v, g_D)

    def shift_mix(self, x_D: Tensor, d_D: Tensor) -> Tensor:
        """Return the share of the previous token in the five inputs [5, N, D], w k v r g."""
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        h_R = torch.tanh(torch.addcmul(x_D, d_D, self.time_maa_x) @ self.time_maa_w1)
        h_5NR = h_R.flatten(0, 1).unflatten(-1, (5, -1)).transpose(0, 1)
        return torch.stack(maa)[:, None] + h_5NR @ self.time_maa_w2

    def finish(self, y_H1V: Tensor, g_D: Tensor) -> Tensor:
        """Normalise each head, gate, and project out."""
        return self.output(self.ln_x(y_H1V).flatten(-3) * g_D)


class ChannelMix6(Mixer):
    """Channel mixing of RWKV-6: token shift, expansion, squared ReLU, receptance.

    Args:
        dim: width D.
        layer: index of this layer.
        depth: number of layers.
        hidden_dim: inner width; None is 3.5·D down to a multiple of 32.
    """

    official_rows = frozenset(("time_maa_k", "time_maa_r"))
    fp16_scaled = ("value",)

    def __init__(
        self, dim: int, *, layer: int = 0, depth: int = 12, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        self.layer, self.depth = layer, depth
        hidden_dim = hidden_dim or hidden_width(dim)
        self.time_maa_k = nn.Parameter(torch.empty(dim))
        self.time_maa_r = nn.Parameter(torch.empty(dim))
        self.key = Linear(dim, hidden_dim)
        self.receptance = Linear(dim, dim)
        self.value = Linear(hidden_dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        time_maa_k, _r       1 - (n/D)^(ρ'^3), with ρ' = 1 - layer/depth
        key                  orthogonal, gain 1
        receptance, value    0: a block is the identity at the start
        """
        dim = len(self.time_maa_k)
        power = (1 - self.layer / self.depth) ** 3
        self.time_maa_k.copy_(1 - (torch.arange(dim) / dim) ** power)
        self.time_maa_r.copy_(self.time_maa_k)
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.value.weight)

    def forward(
        self, x_BTD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        previous_BTD, last_BD = token_shift(x_BTD, state.ffn_shift_BD)
        return self.mix(x_BTD, previous_BTD), state._replace(ffn_shift_BD=last_BD), shared

    def step(
        self, x_1BD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        y_1BD = self.mix(x_1BD, state.ffn_shift_BD)
        return y_1BD, state._replace(ffn_shift_BD=x_1BD), shared

    def mix(self, x_D: Tensor, previous_D: Tensor) -> Tensor:
        """Expand the interpolated token [..., D], square, project back, gate by the receptance."""
        d_D = previous_D - x_D
        hidden = squared_relu(self.key(torch.addcmul(x_D, d_D, self.time_maa_k)))
        receptance_D = self.receptance(torch.addcmul(x_D, d_D, self.time_maa_r))
        return torch.sigmoid(receptance_D) * self.value(hidden)


RWKV6 = Generation(TimeMix6, ChannelMix6)
