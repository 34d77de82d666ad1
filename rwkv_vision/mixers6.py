"""VRWKV6: generation 6's time mixing over an image, both ways, with the Q-Shift of every head.

The pieces are those of :mod:`rwkv_core.mixers.rwkv6`, whose glossary and parameter names hold here
too: the five data-dependent inputs, the projections, the norm and gate. What differs is the
neighbour (a patch's four, each quarter of a head's channels another), the recurrence (ops/bi_wkv6:
the same keys, values and decays read from the left and from the right, the bonus once), the eps of
the norm and the initialisation. The channel mix is that of VRWKV.

Source: OpenGVLab/Vision-RWKV, classification/mmcls_custom/models/backbones/vrwkv6.py.
"""

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from rwkv_core.mixers.base import Mixer
from rwkv_core.mixers.rwkv6 import TimeMix6
from rwkv_core.ops.bi_wkv6 import bi_wkv6
from rwkv_vision.mixers import NORM_EPS, reset_linear
from rwkv_vision.shift import QShift

__all__ = ["SpatialMix6"]


@register_notrace_module  # one node of a graph that torch.fx traces
class SpatialMix6(TimeMix6):
    """Spatial mixing of VRWKV6: ``forward(x_BHWC) -> y_BHWC``; no state, any grid.

    Args:
        dim: width C, a multiple of ``head_dim``.
        head_dim: head size, K = V.
        layer: index of this layer.
        depth: number of layers, for the initialisation.
        key_norm: normalise the recurrence's output over the whole width, before the heads' norm.
        weight_std: standard deviation of the linear maps' weights at the start; None is
            1/√(inputs). The authors use 0.02.
        impl: implementation of the op, as in :func:`rwkv_core.ops.bi_wkv6`.
    """

    causal = False
    step, init_state = Mixer.step, Mixer.init_state  # there is no state

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int = 64,
        layer: int = 0,
        depth: int = 12,
        key_norm: bool = False,
        weight_std: float | None = None,
        impl: str = "auto",
    ) -> None:
        self.weight_std = weight_std  # first, because the line below initialises
        super().__init__(
            dim, head_dim=head_dim, layer=layer, depth=depth, norm_eps=NORM_EPS, impl=impl
        )
        self.shift = QShift(dim, heads=dim // head_dim)
        self.key_norm = nn.LayerNorm(dim, NORM_EPS) if key_norm else nn.Identity()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as the authors do, but for the scale of the linear maps.

        time_maa_□, time_decay, time_faaaa      as in TimeMix6
        time_maa_w1, _w2, time_decay_w1, _w2    uniform ±0.0001
        linear maps                             normal, cut off at 2 σ = 2 weight_std or 2/√(inputs)
        ln_x                                    weight 1, bias 0
        """
        self.reset_channels()
        for name in ("maa_w1", "maa_w2", "decay_w1", "decay_w2"):
            nn.init.uniform_(getattr(self, f"time_{name}"), -1e-4, 1e-4)
        reset_linear(self, self.weight_std)
        nn.init.ones_(self.ln_x.weight)
        nn.init.zeros_(self.ln_x.bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:  # type: ignore[override]
        """Mix an image of features [B, H, W, C]."""
        x_BTD, neighbours_BTD = x_BHWC.flatten(1, 2), self.shift(x_BHWC).flatten(1, 2)
        p = self.project(self.shifted(x_BTD, neighbours_BTD))
        r, w, k, v = (row.squeeze(-2) for row in p[:4])
        y_BTHV = bi_wkv6(r, w, k, v, self.time_faaaa, impl=self.impl)
        if isinstance(self.key_norm, nn.LayerNorm):
            y_BTHV = self.key_norm(y_BTHV.flatten(-2)).view(y_BTHV.shape)
        return self.finish(y_BTHV[..., None, :], p.g_D).view(x_BHWC.shape)
