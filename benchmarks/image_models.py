"""The models of cifar10.py: VRWKV's generations and parts, and timm's ViT of its size."""

import math
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rwkv_vision  # noqa: F401 - registers our models
from rwkv_core.ops.bi_wkv import bi_wkv
from rwkv_core.ops.wkv4 import wkv4
from rwkv_vision.mixers import SpatialMix
from rwkv_vision.scan import ColumnScan, FourWayScan, RowScan, Scan, ZigzagScan

DIM, DEPTH, PATCH = 32, 3, 4
OURS, THEIRS = "vrwkv", "vit"


class Part(SpatialMix):
    """VRWKV's spatial mix with another scan or recurrence."""

    scan: Scan
    recurrence: str

    def recur(self, k_BHWC: Tensor, v_BHWC: Tensor) -> Tensor:
        """Return what the changed recurrence makes of keys and values [B, H, W, C]."""
        if self.recurrence == "none":
            return v_BHWC
        grid = v_BHWC.shape[1:3]
        k_BTC, v_BTC = (self.scan.apply(x.flatten(1, 2), grid) for x in (k_BHWC, v_BHWC))
        w, u = self.spatial_decay, self.spatial_first
        if self.recurrence == "causal":
            T = v_BTC.shape[1]
            y_BTC = wkv4(-w / T, u / T, k_BTC, v_BTC).y_BTD
        else:
            y_BTC = bi_wkv(w, u, k_BTC, v_BTC)
        return self.scan.undo(y_BTC, grid).view(v_BHWC.shape)


class Here(nn.Module):
    """In place of Q-Shift: every patch sees itself."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Return the image of features [B, H, W, C] as it is."""
        return x_BHWC

    def mix(self, x_BHWC: Tensor, mix_NC: Tensor) -> list[Tensor]:
        """Return N mixtures, as :meth:`rwkv_vision.shift.QShift.mix` does."""
        s_BHWC = self(x_BHWC)
        return [torch.lerp(s_BHWC, x_BHWC, mix_C) for mix_C in mix_NC]


class Previous(Here):
    """The causal generations' shift: every token sees the one before it, row by row."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Shift an image of features [B, H, W, C]."""
        return F.pad(x_BHWC.flatten(1, 2), (0, 0, 1, -1)).view(x_BHWC.shape)


ABLATION = {  # recurrence and neighbours
    "causal, no shift": ("causal", Here),
    "causal, previous": ("causal", Previous),
    "causal, Q-Shift": ("causal", None),
    "both ways, no shift": ("both ways", Here),
    "both ways, previous": ("both ways", Previous),
    "none": ("none", None),
}
PARTS = (*ABLATION, OURS)  # the last both ways with Q-Shift
GENERATIONS = ("vrwkv6", "vrwkv7", "vrwkv_2d")
SCANS = {  # of even and of odd layers; rows in all of them is VRWKV
    "zigzag": (ZigzagScan, ZigzagScan),
    "rows, columns": (RowScan, ColumnScan),
    "four ways": (FourWayScan, FourWayScan),
}


def make(model: str, image: tuple[int, ...]) -> nn.Module:
    """Return a new network of a name of the plan, for pictures [C, H, W] and ten classes."""
    size: dict[str, Any] = {
        "embed_dim": DIM, "depth": DEPTH, "patch_size": PATCH,
        "in_chans": image[0], "img_size": image[1:], "num_classes": 10,
    }  # fmt: skip
    if model.startswith(THEIRS):
        if "mean" in model:
            size |= {"class_token": False, "global_pool": "avg"}
        # 4.5 in place of 4: as many parameters as a block of VRWKV, whose receptances it lacks
        net = timm.create_model("vit_tiny_patch16_224", num_heads=2, mlp_ratio=4.5, **size)
        if "fan-in" in model:
            net.apply(fan_in)
        return net
    if model in GENERATIONS:
        return timm.create_model("vrwkv_nano_patch4_28", mixer=model, head_dim=16, **size)
    std = 0.02 if "0.02" in model else None
    net = timm.create_model("vrwkv_nano_patch4_28", weight_std=std, **size)
    recurrence, shift = ABLATION.get(model, ("both ways", None))
    scans = SCANS.get(model, (RowScan, RowScan))
    if model in ABLATION or model in SCANS:
        for i, block in enumerate(net.blocks):
            part = Part(DIM, layer=i, depth=DEPTH)
            part.load_state_dict(block.att.state_dict())
            part.scan, part.recurrence, block.att = scans[i % 2](), recurrence, part
            if shift is not None:
                part.shift, block.ffn.shift = shift(), shift()
    return net


def fan_in(module: nn.Module) -> None:
    """Draw a linear map's weights as ours are: a normal of σ = 1/√(inputs), cut off at 2 σ."""
    if isinstance(module, nn.Linear):
        std = 1 / math.sqrt(module.in_features)
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        nn.init.zeros_(module.bias)
