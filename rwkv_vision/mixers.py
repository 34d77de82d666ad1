r"""VRWKV: the bidirectional spatial mix and the channel mix of Vision-RWKV, on images of features.

Paper: arXiv 2403.02308, section 3; parameter names are those of the authors' code, OpenGVLab/
Vision-RWKV, classification/mmcls_custom/models/backbones/vrwkv.py.

    symbol   meaning                                      shape          computed as
    x        features of a patch                          [B, H, W, C]
    s        features of its four neighbours              [B, H, W, C]   Q-Shift of x (shift.py)
    x_□      s + (x - s)·μ_□                              [B, H, W, C]   □ in r k v
    r k v    receptance, key, value                       [B, H, W, C]   linear maps of x_r x_k x_v
    w u      decay and bonus, scaled by the length        [C]            spatial_decay, _first
    y        mean of all values, weighted by key and      [B, T, C]      ops/bi_wkv, row by row,
             distance                                                    T = H·W

B batch, H and W rows and columns of patches, C width, T tokens.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rwkv_core.errors import CheckpointError, RWKVError
from rwkv_core.mixers.base import Mixer
from rwkv_core.ops.bi_wkv import bi_wkv, check_decay
from rwkv_core.ops.bi_wkv.prefix import bi_wkv_prefix
from rwkv_vision.shift import QShift

__all__ = ["ChannelMix", "SpatialMix"]

NORM_EPS = 1e-5  # the authors'; timm's own models use 1e-6


def _bi_wkv(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, impl: str) -> Tensor:
    """Run the op; TorchScript, which takes no keyword-only arguments, gets its plain operations."""
    if torch.jit.is_scripting():
        dtype = torch.float64 if v_BTC.dtype == torch.float64 else torch.float32
        w_C, u_C, k_BTC = w_C.to(dtype), u_C.to(dtype), k_BTC.to(dtype)
        return bi_wkv_prefix(w_C, u_C, k_BTC, v_BTC.to(dtype)).to(v_BTC.dtype)
    else:
        return bi_wkv(w_C, u_C, k_BTC, v_BTC, impl=impl)


# one node of a traced graph: feature extraction by torch.fx must not look inside
torch.fx.wrap("_bi_wkv")


def reset_linear(mixer: nn.Module, weight_std: float | None) -> None:
    """Draw the linear maps' weights from a normal cut off at 2 σ; None is σ = 1/√(inputs)."""
    for module in mixer.children():
        if isinstance(module, nn.Linear):
            std = weight_std or 1 / math.sqrt(module.in_features)
            nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)


class SpatialMix(Mixer):
    """Spatial mixing of VRWKV: Q-Shift → project → bidirectional WKV → gate, project out.

    ``forward(x_BHWC) -> y_BHWC``; no state, any grid.

    Args:
        dim: width C.
        layer: index of this layer.
        depth: number of layers, for the initialisation.
        gamma, shift_pixel: of the Q-Shift.
        key_norm: normalise what the recurrence returns.
        weight_std: standard deviation of the linear maps' weights at the start; None is
            1/√(inputs). The authors use 0.02.
        impl: implementation of the op, as in :func:`rwkv_core.ops.bi_wkv`.
    """

    causal = False
    full_precision = frozenset(("spatial_decay", "spatial_first"))

    def __init__(
        self,
        dim: int,
        *,
        layer: int = 0,
        depth: int = 12,
        gamma: float = 0.25,
        shift_pixel: int = 1,
        key_norm: bool = False,
        weight_std: float | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        self.dim, self.layer, self.depth = dim, layer, depth
        self.weight_std, self.impl = weight_std, impl
        self.shift = QShift(dim, gamma=gamma, shift_pixel=shift_pixel)
        self.spatial_decay = nn.Parameter(torch.empty(dim))
        self.spatial_first = nn.Parameter(torch.empty(dim))
        self.spatial_mix_k = nn.Parameter(torch.empty(1, 1, dim))
        self.spatial_mix_v = nn.Parameter(torch.empty(1, 1, dim))
        self.spatial_mix_r = nn.Parameter(torch.empty(1, 1, dim))
        self.key = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(dim, dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(dim, NORM_EPS) if key_norm else nn.Identity()
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_check_loaded)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors' ``fancy`` mode does, but for the scale of the linear maps.

        With j the channel, s = j/C, l = j/(C-1), ρ = layer/(depth-1), ρ' = 1 - layer/depth:

            spatial_decay      -5 + 8 l^(0.7 + 1.3 ρ)
            spatial_first      ln 0.3 + 0.5 ((j + 1) mod 3 - 1)
            spatial_mix_k      s^ρ'
            spatial_mix_v      s^ρ' + 0.3 ρ
            spatial_mix_r      s^(0.5 ρ')
            linear maps        normal, cut off at 2 σ, σ = weight_std or 1/√(inputs)
        """
        C = self.dim
        rho = self.layer / max(self.depth - 1, 1)
        rest = 1 - self.layer / self.depth
        j = torch.arange(C)
        s, linear = j / C, j / max(C - 1, 1)
        self.spatial_decay.copy_(-5 + 8 * linear ** (0.7 + 1.3 * rho))
        self.spatial_first.copy_(math.log(0.3) + 0.5 * ((j + 1) % 3 - 1))
        self.spatial_mix_k.copy_(s**rest)
        self.spatial_mix_v.copy_(s**rest + 0.3 * rho)
        self.spatial_mix_r.copy_(s ** (0.5 * rest))
        reset_linear(self, self.weight_std)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Mix an image of features [B, H, W, C]."""
        s = self.shift(x_BHWC)
        x = x_BHWC - s
        k = self.key(s + x * self.spatial_mix_k)
        v = self.value(s + x * self.spatial_mix_v)
        r = self.receptance(s + x * self.spatial_mix_r)
        w, u = self.spatial_decay, self.spatial_first
        y_BTC = _bi_wkv(w, u, k.flatten(1, 2), v.flatten(1, 2), self.impl)
        return self.output(torch.sigmoid(r) * self.key_norm(y_BTC).reshape(r.shape))

    @torch.jit.ignore
    def check_decay(self, error: type[RWKVError]) -> None:
        """Raise ``error`` if decay or bonus left the range of the op's implementation."""
        if self.impl not in ("reference", "native"):
            where = f"spatial mix of layer {self.layer}"
            check_decay(self.spatial_decay, self.spatial_first, layer=where, error=error)


class ChannelMix(Mixer):
    """Channel mixing of VRWKV and VRWKV6: Q-Shift, expansion, squared ReLU, receptance gate.

    ``forward(x_BHWC) -> y_BHWC``; no state, any grid.

    Args:
        dim: width C.
        layer: index of this layer.
        depth: number of layers, for the initialisation.
        hidden_rate: inner width as a multiple of C.
        gamma, shift_pixel, heads: of the Q-Shift; VRWKV6 shifts each head.
        key_norm: normalise the hidden features.
        weight_std: as in :class:`SpatialMix`.
    """

    causal = False

    def __init__(
        self,
        dim: int,
        *,
        layer: int = 0,
        depth: int = 12,
        hidden_rate: int = 4,
        gamma: float = 0.25,
        shift_pixel: int = 1,
        heads: int = 1,
        key_norm: bool = False,
        weight_std: float | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.layer, self.depth = dim, layer, depth
        self.weight_std = weight_std
        self.shift = QShift(dim, gamma=gamma, shift_pixel=shift_pixel, heads=heads)
        self.spatial_mix_k = nn.Parameter(torch.empty(1, 1, dim))
        self.spatial_mix_r = nn.Parameter(torch.empty(1, 1, dim))
        self.key = nn.Linear(dim, hidden_rate * dim, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.value = nn.Linear(hidden_rate * dim, dim, bias=False)
        self.key_norm = nn.LayerNorm(hidden_rate * dim, NORM_EPS) if key_norm else nn.Identity()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors' ``fancy`` mode does, but for the scale of the linear maps.

        spatial_mix_k, spatial_mix_r    (j/C)^(1 - layer/depth), j the channel
        linear maps                     normal, cut off at 2 σ, σ = weight_std or 1/√(inputs)
        """
        mix = (torch.arange(self.dim) / self.dim) ** (1 - self.layer / self.depth)
        self.spatial_mix_k.copy_(mix)
        self.spatial_mix_r.copy_(mix)
        reset_linear(self, self.weight_std)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Mix an image of features [B, H, W, C]."""
        s = self.shift(x_BHWC)
        x = x_BHWC - s
        k = self.key_norm(torch.relu(self.key(s + x * self.spatial_mix_k)).square())
        return torch.sigmoid(self.receptance(s + x * self.spatial_mix_r)) * self.value(k)


def _check_loaded(mixer: SpatialMix, _: Any) -> None:
    mixer.check_decay(CheckpointError)
