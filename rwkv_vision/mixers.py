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
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rwkv_core.errors import CheckpointError, RWKVError
from rwkv_core.mixers.base import Mixer
from rwkv_core.ops.bi_wkv import bi_wkv, check_decay
from rwkv_core.ops.bi_wkv.prefix import bi_wkv_prefix
from rwkv_core.ops.gate import gate
from rwkv_core.ops.squared_relu import squared_relu
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


def _gate(r: Tensor, y: Tensor) -> Tensor:
    """Return σ(r)·y."""
    if torch.jit.is_scripting():
        return torch.sigmoid(r) * y
    else:
        return gate(r, y)


def _squared_relu(x: Tensor) -> Tensor:
    """Return relu(x)²."""
    if torch.jit.is_scripting():
        return torch.relu(x).square()
    else:
        return squared_relu(x)


# nodes of a traced graph: feature extraction by torch.fx must not look inside
for name in ("_bi_wkv", "_gate", "_squared_relu"):
    torch.fx.wrap(name)


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
    decays: ClassVar[tuple[str, ...]] = ("spatial_decay",)
    spatial_decay: Tensor
    spatial_first: Tensor

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
        for name in (*self.decays, "spatial_first"):
            self.register_parameter(name, nn.Parameter(torch.empty(dim)))
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
        for name in self.decays:
            getattr(self, name).copy_(-5 + 8 * linear ** (0.7 + 1.3 * rho))
        self.spatial_first.copy_(math.log(0.3) + 0.5 * ((j + 1) % 3 - 1))
        self.spatial_mix_k.copy_(s**rest)
        self.spatial_mix_v.copy_(s**rest + 0.3 * rho)
        self.spatial_mix_r.copy_(s ** (0.5 * rest))
        reset_linear(self, self.weight_std)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Mix an image of features [B, H, W, C]."""
        x_k, x_v, x_r = self.mix(x_BHWC)
        return self.finish(x_r, self.recur(self.key(x_k), self.value(x_v)))

    def mix(self, x_BHWC: Tensor) -> list[Tensor]:
        """Return what key, value and receptance read: mixtures of each patch and its neighbours."""
        mix = torch.cat([self.spatial_mix_k, self.spatial_mix_v, self.spatial_mix_r])
        return self.shift.mix(x_BHWC, mix[:, 0])

    def recur(self, k_BHWC: Tensor, v_BHWC: Tensor) -> Tensor:
        """Return the mean of all values for each patch [B, H, W, C]."""
        w, u = self.spatial_decay, self.spatial_first
        y_BTC = _bi_wkv(w, u, k_BHWC.flatten(1, 2), v_BHWC.flatten(1, 2), self.impl)
        return y_BTC.reshape(k_BHWC.shape)

    def finish(self, x_r_BHWC: Tensor, y_BHWC: Tensor) -> Tensor:
        """Gate what the recurrence returned and project it out."""
        return self.output(_gate(self.receptance(x_r_BHWC), self.key_norm(y_BHWC)))

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
        x_k, x_r = self.mix(x_BHWC)
        return self.expand(x_k, x_r)

    def mix(self, x_BHWC: Tensor) -> list[Tensor]:
        """Return what key and receptance read: mixtures of each patch and its neighbours."""
        mix = torch.cat([self.spatial_mix_k, self.spatial_mix_r])
        return self.shift.mix(x_BHWC, mix[:, 0])

    def expand(self, x_k_BHWC: Tensor, x_r_BHWC: Tensor) -> Tensor:
        """Expand, square the positive part, project back, and gate by the receptance."""
        k = self.key_norm(_squared_relu(self.key(x_k_BHWC)))
        return _gate(self.receptance(x_r_BHWC), self.value(k))


def _check_loaded(mixer: SpatialMix, _: Any) -> None:
    mixer.check_decay(CheckpointError)
