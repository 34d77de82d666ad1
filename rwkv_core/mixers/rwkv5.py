r"""RWKV-5 "Eagle": time mixing with one matrix of memory per head and a static decay.

Paper: arXiv 2404.05892, section 3; code of reference: BlinkDL/RWKV-LM, RWKV-v5/src/model.py and
RWKV-v4neo. Parameter names are theirs.

    symbol   meaning                               shape          computed as
    x, x⁻    token and its predecessor             [B, T, D]      token shift
    x_□      share of the token in the mixture     [B, T, D]      x μ_□ + x⁻ (1 - μ_□), □ in r k v g
    r k v    receptance, key, value                [B, T, H, K]   linear maps of x_r x_k x_v
    g        gate                                  [B, T, D]      silu(linear map of x_g)
    w        log-decay, < 0, one for all tokens    [H, K]         -exp(time_decay)
    u        bonus of the current token            [H, K]         time_faaaa
    S        state                                 [B, H, K, V]   ops/wkv6, of which this is a case

Three releases bear this number. The options tell them apart (official name, and rwkv.cpp's):

    release            ``per_channel``   ``gate``   ``exp_bonus``
    5.0 ("5.1")        False: w, u [H]   False      True: u = exp(time_first)
    5.1 ("5.2")        False: w, u [H]   True       False: u = time_faaaa
    5.2 ("5.2")        True: [H, K]      True       False: u = time_faaaa      every World model

B batch, T time, D width, H heads, K key dim = V value dim = head size. Names that begin after B and
T (``x_D``, ``r_H1K``) belong to code that both paths use: a sequence brings [B, T, ...], one step
[1, B, ...].
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
from rwkv_core.mixers.rwkv4 import ChannelMix4
from rwkv_core.ops.shift import token_shift
from rwkv_core.ops.wkv6 import wkv6, wkv6_step

__all__ = ["RWKV5", "ChannelMix5", "Projections5", "TimeMix5"]


class Projections5(NamedTuple):
    """What the recurrence and the finish need of every token; vectors of a head are rows."""

    r_H1K: Tensor
    k_H1K: Tensor
    v_H1V: Tensor
    g_D: Tensor | None


class TimeMix5(Mixer):
    """Time mixing of RWKV-5: shift → project → recurrence → finish.

    Args:
        dim: width D, a multiple of ``head_dim``.
        head_dim: head size, K = V.
        layer: index of this layer.
        depth: number of layers, for the initialisation.
        per_channel: decay and bonus per channel of a head [H, K]; else per head [H].
        gate: multiply the output by a gate.
        exp_bonus: the bonus is ``exp(time_first)``; else ``time_faaaa`` as it is.
        norm_eps: eps of the per-head norm.
        impl: implementation of the op, as in :func:`rwkv_core.ops.wkv6`.
    """

    lr_scales = {"time_decay": 2.0, "time_first": 3.0}  # noqa: RUF012 - constants of the recipe
    official_rows = frozenset(f"time_mix_{c}" for c in "kvrg")
    full_precision = frozenset(("time_decay", "time_first", "time_faaaa"))
    fp16_scaled = ("output",)
    state_type = MatrixState

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        layer: int = 0,
        depth: int = 12,
        per_channel: bool = True,
        gate: bool = True,
        exp_bonus: bool = False,
        norm_eps: float = 64e-5,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, head_dim)
        self.dim, self.head_dim, self.layer, self.depth = dim, head_dim, layer, depth
        self.impl = impl
        heads = dim // head_dim
        shape = (heads, head_dim) if per_channel else (heads,)
        self.time_decay = nn.Parameter(torch.empty(shape))
        self.bonus_name = "time_first" if exp_bonus else "time_faaaa"
        self.register_parameter(self.bonus_name, nn.Parameter(torch.empty(shape)))
        self.time_mix_k = nn.Parameter(torch.empty(dim))
        self.time_mix_v = nn.Parameter(torch.empty(dim))
        self.time_mix_r = nn.Parameter(torch.empty(dim))
        self.time_mix_g = nn.Parameter(torch.empty(dim)) if gate else None
        self.receptance = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.gate = Linear(dim, dim) if gate else None
        self.output = Linear(dim, dim)
        self.ln_x = HeadNorm(dim, norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        With n the channel, s = n/D, l = n/(D-1) (where decay and bonus are per head: the head over
        the number of heads less one), ρ = layer/(depth-1), ρ' = 1 - layer/depth:

            time_decay                  -6 + 5 l^(0.7 + 1.3 ρ)
            time_faaaa                  ρ (1 - l), per channel + 0.1 ((n + 1) mod 3 - 1)
            time_first                  -3
            time_mix_k, _v, _r and _g   s^ρ', s^ρ' + 0.3 ρ, s^(0.5 ρ')
            receptance, value           orthogonal, gain 1
            key, gate                   orthogonal, gain 0.1
            output                      0: a block is the identity at the start
            ln_x                        weight ((1 + layer)/depth)^0.7, bias 0
        """
        rho = self.layer / max(self.depth - 1, 1)
        rest = 1 - self.layer / self.depth
        decay, bonus = self.time_decay, getattr(self, self.bonus_name)
        n = torch.arange(decay.numel())
        linear = n / max(decay.numel() - 1, 1)
        decay.copy_((-6 + 5 * linear ** (0.7 + 1.3 * rho)).view_as(decay))
        zigzag = 0.1 * ((n + 1) % 3 - 1) if decay.ndim == 2 else 0
        raw = (rho * (1 - linear) + zigzag).view_as(bonus)
        bonus.copy_(torch.full_like(bonus, -3) if self.bonus_name == "time_first" else raw)
        s = torch.arange(self.dim) / self.dim
        self.time_mix_k.copy_(s**rest)
        self.time_mix_v.copy_(s**rest + 0.3 * rho)
        self.time_mix_r.copy_(s ** (0.5 * rest))
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.orthogonal_(self.value.weight)
        if self.gate is not None and self.time_mix_g is not None:
            self.time_mix_g.copy_(self.time_mix_r)
            nn.init.orthogonal_(self.gate.weight, gain=0.1)
        nn.init.zeros_(self.output.weight)
        self.ln_x.weight.fill_(((1 + self.layer) / self.depth) ** 0.7)
        self.ln_x.bias.zero_()

    def init_state(
        self, batch: int, *, device: Any = None, dtype: torch.dtype = torch.float32
    ) -> MatrixState:
        """Return the state before the first token: zeros."""
        return MatrixState.zeros(batch, self.dim, self.head_dim, device=device, dtype=dtype)

    def forward(
        self, x_BTD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        previous_BTD, last_BD = token_shift(x_BTD, state.att_shift_BD)
        mix_4D = self.shift_mix()[:, None, None]
        p = self.project(torch.addcmul(previous_BTD, x_BTD - previous_BTD, mix_4D).unbind())
        r, k, v = (row.squeeze(-2) for row in p[:3])
        w_H1K, u_H1K = self.decay_and_bonus()
        w_BTHK = w_H1K.squeeze(-2).expand_as(k)
        y_BTHV, wkv_BHKV = wkv6(r, w_BTHK, k, v, u_H1K.squeeze(-2), state.wkv_BHKV, impl=self.impl)
        state = state._replace(att_shift_BD=last_BD, wkv_BHKV=wkv_BHKV)
        return self.finish(y_BTHV[..., None, :], p.g_D), state, shared

    def step(
        self, x_1BD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        previous_1BD, mix_4D = state.att_shift_BD, self.shift_mix()[:, None]
        p = self.project(torch.addcmul(previous_1BD, x_1BD - previous_1BD, mix_4D).split(1))
        w, u = self.decay_and_bonus()
        wkv_BHKV = state.wkv_BHKV
        r, k, v, u = (x.to(wkv_BHKV.dtype) for x in (*p[:3], u))
        y_1BH1V, wkv_BHKV = wkv6_step(r, w, k, v, u, wkv_BHKV)
        state = state._replace(att_shift_BD=x_1BD, wkv_BHKV=wkv_BHKV)
        return self.finish(y_1BH1V.to(x_1BD.dtype), p.g_D), state, shared

    def shift_mix(self) -> Tensor:
        """Return the share of the token in each input [3 or 4, D]: r k v and perhaps g."""
        mix: list[Tensor] = [self.time_mix_r, self.time_mix_k, self.time_mix_v]
        if self.time_mix_g is not None:
            mix.append(self.time_mix_g)
        return torch.stack(mix)

    def project(self, mixed: Sequence[Tensor]) -> Projections5:
        """Compute what the recurrence reads from the shifted inputs [..., D] (r k v, perhaps g)."""
        r, k, v = self.receptance(mixed[0]), self.key(mixed[1]), self.value(mixed[2])
        r, k, v = (x.unflatten(-1, (-1, 1, self.head_dim)) for x in (r, k, v))
        return Projections5(r, k, v, None if self.gate is None else F.silu(self.gate(mixed[3])))

    def decay_and_bonus(self) -> tuple[Tensor, Tensor]:
        """Return w (< 0, in fp64) and u as rows [H, 1, K].

        A decay is the same at every step: were it one rounding away from what another library makes
        of the same parameter, a memory of thousands of tokens would be thousands of roundings away.
        """
        rows = (-1, 1, self.head_dim if self.time_decay.ndim == 2 else 1)
        w_H1K = -self.time_decay.double().exp().view(rows)
        u_H1K = getattr(self, self.bonus_name).view(rows)
        if self.bonus_name == "time_first":
            u_H1K = u_H1K.exp()
        return w_H1K.expand(-1, 1, self.head_dim), u_H1K.expand(-1, 1, self.head_dim)

    def finish(self, y_H1V: Tensor, g_D: Tensor | None) -> Tensor:
        """Normalise each head, gate, and project out."""
        y_D = self.ln_x(y_H1V).flatten(-3)
        return self.output(y_D if g_D is None else y_D * g_D)


class ChannelMix5(ChannelMix4):
    """Channel mixing of RWKV-5: that of RWKV-4 with another inner width and gain.

    Args:
        dim: width D.
        layer: index of this layer.
        depth: number of layers.
        hidden_dim: inner width; None is 3.5·D down to a multiple of 32, as in 5.2.
    """

    def __init__(
        self, dim: int, *, layer: int = 0, depth: int = 12, hidden_dim: int | None = None
    ) -> None:
        super().__init__(dim, layer=layer, depth=depth, hidden_dim=hidden_dim or hidden_width(dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as RWKV-4's, but ``key`` orthogonal with gain 1."""
        super().reset_parameters()
        nn.init.orthogonal_(self.key.weight)


def hidden_width(dim: int) -> int:
    """Return the official inner width of generations 5.2 and 6, at least 32."""
    return max(32, int(3.5 * dim) // 32 * 32)


RWKV5 = Generation(TimeMix5, ChannelMix5)
