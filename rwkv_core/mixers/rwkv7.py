r"""RWKV-7 "Goose": time mixing with the generalised delta rule, channel mixing with squared ReLU.

Paper: arXiv 2503.14456, section 4 and appendix; code of reference: BlinkDL/RWKV-LM,
RWKV-v7/train_temp/src/model.py. Parameter names are theirs.

    symbol   meaning                                   shape          computed as
    x, x⁻    token and its predecessor                 [B, T, D]      token shift
    x_□      x + (x⁻ - x)·x_□                          [B, T, D]      □ in r w k v a g
    r k v    receptance, key, value                    [B, T, H, K]   linear maps of x_r x_k x_v
    w        log-decay, in (-0.6065, 0)                [B, T, H, K]   σ(w0 + tanh(x_w w1) w2)·-e^-½
    α        in-context learning rate, in (0, 1)       [B, T, H, K]   σ(a0 + (x_a a1) a2)
    ν        share of the first layer's value          [B, T, D]      σ(v0 + (x_v v1) v2)
    g        gate                                      [B, T, D]      σ(x_g g1) g2
    κ̂        removal key, unit length per head         [B, T, H, K]   normalised k·k_k
    S        state                                     [B, H, K, V]   ops/wkv7

B batch, T time, D width, H heads, K key dim = V value dim = head size. Names that begin after B and
T (``x_D``, ``r_H1K``) belong to code that both paths use: a sequence brings [B, T, ...], one step
[1, B, ...].
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_core.mixers.base import (
    Generation,
    HeadNorm,
    Linear,
    MatrixState,
    Mixer,
    Shared,
    check_heads,
    lora_rank,
)  # fmt: skip
from rwkv_core.mixers.rwkv7_token import channel_mix_token, time_mix_token
from rwkv_core.ops._common import WKVOutput
from rwkv_core.ops.linear import product
from rwkv_core.ops.rwkv7_layer import finish7, gates7
from rwkv_core.ops.squared_relu import squared_relu
from rwkv_core.ops.token_mix import token_mix
from rwkv_core.ops.wkv7 import wkv7, wkv7_step

__all__ = ["RWKV7", "ChannelMix7", "Projections7", "TimeMix7"]


class Projections7(NamedTuple):
    """What the recurrence and the finish need of every token; vectors of a head are rows."""

    r_H1K: Tensor
    w_H1K: Tensor
    k_H1K: Tensor
    v_H1V: Tensor
    a_H1K: Tensor
    b_H1K: Tensor
    g_D: Tensor


class TimeMix7(Mixer):
    """Time mixing of RWKV-7: shift → project → recurrence → finish.

    Args:
        dim: width D, a multiple of ``head_dim``.
        head_dim: head size, K = V.
        layer: index of this layer; layer 0 provides the first value and mixes none in.
        depth: number of layers, for the initialisation.
        decay_rank, iclr_rank, value_rank, gate_rank: inner sizes of the low-rank maps of w, α, ν
            and g; None is the official rule.
        norm_eps: eps of the per-head norm.
        tuned_state: learn the state before the first token, ``time_state`` [H, K, V].
        impl: implementation of the op, as in :func:`rwkv_core.ops.wkv7`.

    A domain recombines the pieces: its own shift before :meth:`project`, its own scan in place of
    :meth:`recurrence`.
    """

    lr_scales = {"w0": 2.0}  # noqa: RUF012 - a constant of the recipe
    official_rows = frozenset(("w0", "a0", "v0", "k_k", "k_a", *(f"x_{c}" for c in "rwkvag")))
    full_precision = frozenset(("w0", "time_state"))
    state_type = MatrixState

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        layer: int = 0,
        depth: int = 12,
        decay_rank: int | None = None,
        iclr_rank: int | None = None,
        value_rank: int | None = None,
        gate_rank: int | None = None,
        norm_eps: float = 64e-5,
        tuned_state: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_heads(dim, head_dim)
        self.dim, self.head_dim, self.layer, self.depth = dim, head_dim, layer, depth
        self.impl = impl

        def vector(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape or (dim,)))

        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector() for _ in range(6))
        rank = decay_rank or lora_rank(dim, 2.5)
        self.w0, self.w1, self.w2 = vector(), vector(dim, rank), vector(rank, dim)
        rank = iclr_rank or lora_rank(dim, 2.5)
        self.a0, self.a1, self.a2 = vector(), vector(dim, rank), vector(rank, dim)
        if layer > 0:
            rank = value_rank or lora_rank(dim, 1.7)
            self.v0, self.v1, self.v2 = vector(), vector(dim, rank), vector(rank, dim)
        rank = gate_rank or lora_rank(dim, 5.0)
        self.g1, self.g2 = vector(dim, rank), vector(rank, dim)
        self.k_k, self.k_a = vector(), vector()
        self.r_k = vector(dim // head_dim, head_dim)
        self.time_state = vector(dim // head_dim, head_dim, head_dim) if tuned_state else None
        self.receptance = Linear(dim, dim)
        self.key = Linear(dim, dim)
        self.value = Linear(dim, dim)
        self.output = Linear(dim, dim)
        self.ln_x = HeadNorm(dim, norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        With n the channel, s = n/D, l = n/(D-1), ρ = layer/(depth-1), ρ' = 1 - layer/depth, and z
        the signed square of the position within the head, from -1 to 1:

            x_r, x_g                1 - s^(0.2 ρ')
            x_w, x_a                1 - s^(0.9 ρ')
            x_k, x_v                1 - s^(0.7 ρ')
            w0                      -5.5 + 6 l^(1 + ρ^0.3) + 2.5 z
            a0                      -0.19 + 0.3 z + 0.4 (l - 0.5)
            v0                      0.73 - 0.4 (l - 0.5)
            k_k                     0.71 - 0.1 (l - 0.5)
            k_a, r_k                1.02, -0.04
            w1, a1, v1, g1          0
            w2, a2, v2, g2          orthogonal, gain 0.1
            receptance, value       orthogonal, gain 1
            key                     orthogonal, gain 0.1
            output                  0: a block is the identity at the start
            ln_x                    weight ((1 + layer)/depth)^0.7, bias 0
            time_state              0, where there is one
        """
        D, N = self.dim, self.head_dim
        rho = self.layer / max(self.depth - 1, 1)
        rest = 1 - self.layer / self.depth
        n = torch.arange(D)
        s, linear = n / D, n / max(D - 1, 1)
        z = 2 * (n % N) / max(N - 1, 1) - 1
        z = z * z.abs()
        for names, power in (("rg", 0.2), ("wa", 0.9), ("kv", 0.7)):
            for name in names:
                getattr(self, f"x_{name}").copy_(1 - s ** (power * rest))
        self.w0.copy_(-5.5 + 6 * linear ** (1 + rho**0.3) + 2.5 * z)
        self.a0.copy_(-0.19 + 0.3 * z + 0.4 * (linear - 0.5))
        if self.layer > 0:
            self.v0.copy_(0.73 - 0.4 * (linear - 0.5))
        self.k_k.copy_(0.71 - 0.1 * (linear - 0.5))
        self.k_a.fill_(1.02)
        self.r_k.fill_(-0.04)
        for name in "wavg" if self.layer > 0 else "wag":
            nn.init.zeros_(getattr(self, f"{name}1"))
            nn.init.orthogonal_(getattr(self, f"{name}2"), gain=0.1)
        nn.init.orthogonal_(self.receptance.weight)
        nn.init.orthogonal_(self.value.weight)
        nn.init.orthogonal_(self.key.weight, gain=0.1)
        nn.init.zeros_(self.output.weight)
        self.ln_x.weight.fill_(((1 + self.layer) / self.depth) ** 0.7)
        self.ln_x.bias.zero_()
        if self.time_state is not None:
            self.time_state.zero_()

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
        if x_BTD.shape[:2] == (1, 1) and type(self) is TimeMix7:
            found = time_mix_token(self, x_BTD, state, shared.v_first)
            if found:
                y_BTD, wkv_BHKV, value = found
                state = state._replace(att_shift_BD=x_BTD[:, -1], wkv_BHKV=wkv_BHKV)
                if shared.v_first is None:
                    shared = shared._replace(v_first=value)
                return y_BTD, state, shared
        mixed, last_BD = token_mix(x_BTD, state.att_shift_BD, self.shift_mix())
        p, shared = self.project(mixed, shared)
        y_BTHV, wkv_BHKV = self.recurrence(p, state.wkv_BHKV)
        state = state._replace(att_shift_BD=last_BD, wkv_BHKV=wkv_BHKV)
        return self.finish(y_BTHV[..., None, :], p), state, shared

    def step(
        self, x_1BD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        mix_6D = self.shift_mix()[:, None]
        mixed = torch.addcmul(x_1BD, state.att_shift_BD - x_1BD, mix_6D).split(1)
        p, shared = self.project(mixed, shared)
        wkv_BHKV = state.wkv_BHKV
        r, w, k, v, a, b = (row.to(wkv_BHKV.dtype) for row in p[:6])
        y_1BH1V, wkv_BHKV = wkv7_step(r, w, k, v, a, b, wkv_BHKV)
        state = state._replace(att_shift_BD=x_1BD, wkv_BHKV=wkv_BHKV)
        return self.finish(y_1BH1V.to(x_1BD.dtype), p), state, shared

    def shift_mix(self) -> Tensor:
        """Return the share of the previous token in each of the six inputs [6, D]."""
        return torch.stack([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g])

    def project(self, mixed: Sequence[Tensor], shared: Shared) -> tuple[Projections7, Shared]:
        """Compute what the recurrence reads from the six shifted inputs [..., D] (r w k v a g)."""
        x_r, x_w, x_k, x_v, x_a, x_g = mixed
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        lora_w = product(torch.tanh(product(x_w, self.w1)), self.w2)
        lora_a = product(product(x_a, self.a1), self.a2)
        g = product(torch.sigmoid(product(x_g, self.g1)), self.g2)
        mixed_in = None
        if shared.v_first is None:
            shared = shared._replace(v_first=v)
        else:
            mixed_in = (shared.v_first, product(product(x_v, self.v1), self.v2), self.v0)
        k_k_HK = self.k_k.view_as(self.r_k)
        gates = gates7(lora_w, lora_a, k, v, self.w0, self.a0, k_k_HK, self.k_a, mixed_in)
        w, k, a, b, v = gates
        return Projections7(self.heads(r), w, k, v, a, b, g), shared

    def recurrence(self, p: Projections7, wkv_BHKV: Tensor) -> WKVOutput:
        """Run the op over the sequence."""
        r, w, k, v, a, b = (row.squeeze(-2) for row in p[:6])
        return wkv7(r, w, k, v, a, b, wkv_BHKV, impl=self.impl)

    def finish(self, y_H1V: Tensor, p: Projections7) -> Tensor:
        """Normalise each head, add the bonus of the current token, gate, and project out."""
        norm = self.ln_x
        rows = (y_H1V, p.r_H1K, p.k_H1K, p.v_H1V)
        return self.output(finish7(*rows, p.g_D, self.r_k, norm.weight, norm.bias, norm.eps))

    def heads(self, x_D: Tensor) -> Tensor:
        """View [..., D] as rows [..., H, 1, K]."""
        return x_D.unflatten(-1, (-1, 1, self.head_dim))


class ChannelMix7(Mixer):
    """Channel mixing of RWKV-7: token shift, expansion, squared ReLU; no receptance.

    Args:
        dim: width D.
        layer: index of this layer.
        depth: number of layers.
        hidden_dim: inner width; None is 4·D.
    """

    official_rows = frozenset(("x_k",))

    def __init__(
        self, dim: int, *, layer: int = 0, depth: int = 12, hidden_dim: int | None = None
    ) -> None:
        super().__init__()
        self.layer, self.depth = layer, depth
        self.x_k = nn.Parameter(torch.empty(dim))
        self.key = Linear(dim, hidden_dim or 4 * dim)
        self.value = Linear(hidden_dim or 4 * dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the official trainer does.

        x_k      1 - (n/D)^(ρ'^4), with ρ' = 1 - layer/depth
        key      orthogonal, gain 1
        value    0: a block is the identity at the start
        """
        dim = len(self.x_k)
        self.x_k.copy_(1 - (torch.arange(dim) / dim) ** ((1 - self.layer / self.depth) ** 4))
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.value.weight)

    def forward(
        self, x_BTD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix a sequence [B, T, D], T ≥ 0."""
        if x_BTD.shape[:2] == (1, 1) and type(self) is ChannelMix7:
            y_BTD = channel_mix_token(self, x_BTD, state.ffn_shift_BD)
            if y_BTD is not None:
                return y_BTD, state._replace(ffn_shift_BD=x_BTD[:, -1]), shared
        (x_k,), last_BD = token_mix(x_BTD, state.ffn_shift_BD, self.x_k[None])
        return self.expand(x_k), state._replace(ffn_shift_BD=last_BD), shared

    def step(
        self, x_1BD: Tensor, state: MatrixState, shared: Shared
    ) -> tuple[Tensor, MatrixState, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        y_1BD = self.expand(torch.addcmul(x_1BD, state.ffn_shift_BD - x_1BD, self.x_k))
        return y_1BD, state._replace(ffn_shift_BD=x_1BD), shared

    def expand(self, x_k_D: Tensor) -> Tensor:
        """Expand the interpolated token [..., D], square its positive part, and project back."""
        return self.value(squared_relu(self.key(x_k_D)))


RWKV7 = Generation(TimeMix7, ChannelMix7)
