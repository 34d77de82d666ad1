r"""RWKV-7 as tracing sees it: the layers of ``rwkv_core/mixers/rwkv7.py`` in fewer nodes.

Most nodes of a token are small, and cost more to start than to compute. The same mathematics, with
the symbols of that file, written for a graph:

    x + (x⁻ - x)·μ      the six at once; of a token (1 - μ)·x + μ·x⁻, where the second term of all
                        layers is known before the first one
    w, α, ν             low-rank maps side by side, one bias and sigmoid; r, k, v lie beside them,
                        because all are cut into heads
    -κ̂, κ̂α              κ̂ and -κ̂α: only their product counts, and α is signed where w is scaled
    b (aᵀS) + k vᵀ      one product, [b k] [aᵀS; v]; of a token the bonus is one, too
    states              those of all layers are cut and joined at once

PyTorch runs the layers as they are, and the export compares.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rwkv_core.backbone import Backbone
from rwkv_core.graphs import SequenceGraph, StepGraph
from rwkv_core.mixers.rwkv7 import ChannelMix7, TimeMix7
from rwkv_core.ops.rwkv7_layer import MAX_LOG_DECAY
from rwkv_core.ops.wkv7 import wkv7

__all__ = ["Sequence7", "Step7", "is_rwkv7"]


def is_rwkv7(backbone: Backbone) -> bool:
    """Tell whether all layers are RWKV-7's own: a class that derives from one may do otherwise."""
    kinds = {(type(block.time_mix), type(block.channel_mix)) for block in _blocks(backbone)}
    return kinds == {(TimeMix7, ChannelMix7)}


class Step7(StepGraph):
    """One token of each sequence; takes the place of ``StepGraph`` while that is traced."""

    def forward(self, inputs: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
        """Run the trunk, time first; packed states [L, B, ...]."""
        att_LBD, wkv_LBHKV, ffn_LBD = packed
        blocks = _blocks(self.backbone)
        mix_L61D = torch.cat([torch.cat(_mix(block.time_mix, 2))[None] for block in blocks])
        mix_L1D = torch.cat([block.channel_mix.x_k.view(1, 1, -1) for block in blocks])
        rows = zip(
            blocks,
            (att_LBD[:, None] * mix_L61D).flatten(0, 1).split(6),
            (ffn_LBD * mix_L1D).split(1),
            wkv_LBHKV.split(1),
            strict=True,
        )
        x_1BD = self.backbone.ln_in(self.embed(inputs.transpose(0, 1)))
        after, v_first = [], None
        for block, att_6BD, ffn_1BD, wkv_1BHKV in rows:
            att, ffn, att_1BD = block.time_mix, block.channel_mix, block.ln1(x_1BD)
            keep_61D = torch.cat([1 - mix for mix in _mix(att, 2)])
            p = _project(att, (att_1BD * keep_61D + att_6BD).split(1), v_first, x_1BD.shape, 1)
            v_first = p.v if v_first is None else v_first
            written_BH2K = torch.cat([p.b, p.k], -2)
            read_BH2V = torch.cat([p.a @ wkv_1BHKV, p.v], -2)
            wkv_1BHKV = p.w.exp().mT * wkv_1BHKV + written_BH2K.mT @ read_BH2V
            bonus_BH11 = (p.r * p.k) @ att.r_k[..., None]
            x_1BD = x_1BD + _finish(att, p.r @ wkv_1BHKV, bonus_BH11, p, x_1BD.shape)
            after_1BD = block.ln2(x_1BD)
            x_1BD = x_1BD + ffn.expand(after_1BD * (1 - ffn.x_k) + ffn_1BD)
            after.append((att_1BD, wkv_1BHKV, after_1BD))
        states = map(torch.cat, zip(*after, strict=True))
        return self.head(self.backbone.ln_out(x_1BD))[0], *states


class Sequence7(SequenceGraph):
    """A sequence of tokens; takes the place of ``SequenceGraph`` while that is traced."""

    def forward(self, inputs: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
        """Run the trunk; positions [R] and packed states [L, B, ...]."""
        positions_R, att_LBD, wkv_LBHKV, ffn_LBD = packed
        rows = zip(
            _blocks(self.backbone),
            *(last_LBD.transpose(0, 1).split(1, 1) for last_LBD in (att_LBD, ffn_LBD)),
            (wkv_LBHKV[i] for i in range(len(wkv_LBHKV))),
            strict=True,
        )
        x_BTD = self.backbone.ln_in(self.embed(inputs))
        after, v_first = [], None
        for block, att_B1D, ffn_B1D, wkv_BHKV in rows:
            att, ffn, att_BTD = block.time_mix, block.channel_mix, block.ln1(x_BTD)
            d_BTD = _before(att_BTD, att_B1D) - att_BTD
            mixed = torch.addcmul(att_BTD, d_BTD, torch.cat(_mix(att, 3))).split(1)
            p = _project(att, mixed, v_first, x_BTD.shape)
            v_first = p.v if v_first is None else v_first
            y_BTHV, wkv_BHKV = wkv7(*p[:6], wkv_BHKV, impl="node")
            bonus_BTH1 = (p.r * p.k * att.r_k).sum(-1, keepdim=True)
            x_BTD = x_BTD + _finish(att, y_BTHV, bonus_BTH1, p, x_BTD.shape)
            ffn_BTD = block.ln2(x_BTD)
            d_BTD = _before(ffn_BTD, ffn_B1D) - ffn_BTD
            x_BTD = x_BTD + ffn.expand(torch.addcmul(ffn_BTD, d_BTD, ffn.x_k))
            after.append((att_BTD[:, -1:], wkv_BHKV, ffn_BTD[:, -1:]))
        last_att, wkv, last_ffn = zip(*after, strict=True)
        x_BRD = self.backbone.ln_out(x_BTD).index_select(1, positions_R)
        return (
            self.head(x_BRD),
            torch.cat(last_att, 1).transpose(0, 1),
            torch.cat(wkv).view(wkv_LBHKV.shape),
            torch.cat(last_ffn, 1).transpose(0, 1),
        )


class Projected(NamedTuple):
    """What the recurrence reads, in its order, heads [..., H, K] or [..., H, 1, K]; the gate."""

    r: Tensor
    w: Tensor
    k: Tensor
    v: Tensor
    a: Tensor
    b: Tensor
    g_D: Tensor


def _blocks(backbone: Backbone) -> Sequence[Any]:
    return list(backbone.blocks)


def _mix(mixer: TimeMix7, axes: int) -> list[Tensor]:
    """Return μ of r w k v a g, with so many axes of size 1 before D."""
    return [getattr(mixer, f"x_{name}").view(*[1] * axes, -1) for name in "rwkvag"]


def _before(x_BTD: Tensor, last_B1D: Tensor) -> Tensor:
    """Return the token before each one."""
    return torch.cat([last_B1D, x_BTD], 1)[:, :-1]


def _project(
    mixer: TimeMix7,
    mixed: Sequence[Tensor],
    v_first: Tensor | None,
    shape: Sequence[int],
    *row: int,
) -> Projected:
    """Return what the recurrence reads of the six inputs, which have ``shape`` [..., D].

    ``row``: 1 for heads that are rows.
    """
    m, (x_r, x_w, x_k, x_v, x_a, x_g) = mixer, mixed
    lead, H = len(shape) - 1, len(m.r_k)

    def heads(x_D: Tensor) -> Tensor:
        return x_D.view(H, *row, -1)

    maps = [torch.tanh(x_w @ m.w1) @ m.w2, x_a @ m.a1 @ m.a2]
    bias, scale = [m.w0, m.a0], [-MAX_LOG_DECAY, -1.0]
    if v_first is not None:
        maps.append(x_v @ m.v1 @ m.v2)
        bias.append(m.v0)
        scale.append(1.0)
    n = len(maps)
    maps += [m.receptance(x_r), m.key(x_k), m.value(x_v)]
    cells = torch.cat(maps, -1).view(*shape[:-1], (n + 3) * H, *row, m.head_dim)
    rates, r, k, v = cells.split([n * H, H, H, H], lead)
    scales = torch.cat([torch.full((H, *row, 1), s) for s in scale])
    rates = torch.sigmoid(rates + torch.cat([heads(b_D) for b_D in bias])) * scales
    w, minus_alpha, *share = rates.split(H, lead)
    if v_first is not None:
        v = v + (v_first - v) * share[0]
    kappa = k * heads(m.k_k)
    kappa = kappa / kappa.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    k = k * (heads(1 - m.k_a) - minus_alpha * heads(m.k_a))
    g_D = torch.sigmoid(x_g @ m.g1) @ m.g2
    return Projected(r, w, k, v, kappa, kappa * minus_alpha, g_D)


def _finish(
    mixer: TimeMix7, y: Tensor, bonus: Tensor, p: Projected, shape: Sequence[int]
) -> Tensor:
    """Normalise each head, add so much of the value of the current token, gate, and project out."""

    def heads(x_D: Tensor) -> Tensor:
        return x_D.view(len(mixer.r_k), *y.shape[len(shape) :])

    norm = mixer.ln_x
    y = F.layer_norm(y, y.shape[-1:], eps=norm.eps) * heads(norm.weight) + heads(norm.bias)
    return mixer.output((y + bonus * p.v).view(shape) * p.g_D.view(shape))
