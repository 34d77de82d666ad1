"""The names of Hugging Face layouts, to and from the official ones.

Three layouts: ``"fla7"`` (fla and rwkv7-hf), ``"fla6"`` and ``"transformers"`` (also the remote
code of RWKV-5 and 6 that follows its names). Names that a layout does not have are passed on as
they are, for the official check to name.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["from_official", "layout", "to_official"]

ENDS = {
    "emb.weight": "model.embeddings.weight",
    "ln_out.weight": "model.norm.weight",
    "ln_out.bias": "model.norm.bias",
    "head.weight": "lm_head.weight",
}
NORMS = {
    f"{theirs}.{kind}": f"{ours}.{kind}"
    for theirs, ours in (("ln0", "pre_norm"), ("ln1", "attn_norm"), ("ln2", "ffn_norm"))
    for kind in ("weight", "bias")
} | {f"att.ln_x.{kind}": f"attn.g_norm.{kind}" for kind in ("weight", "bias")}
PROJECTIONS = {"receptance": "r", "key": "k", "value": "v"}

LAYER7 = {
    **NORMS,
    **{f"att.{name}.weight": f"attn.{c}_proj.weight" for name, c in PROJECTIONS.items()},
    "att.output.weight": "attn.o_proj.weight",
    **{f"att.{name}": f"attn.{name}" for name in ("k_k", "k_a", "r_k")},
    **{f"att.x_{c}": f"attn.x_{c}" for c in "rwkvag"},
    **{f"att.{c}0": f"attn.{c}_lora.lora.2.bias" for c in "wav"},
    **{f"att.{c}1": f"attn.{c}_lora.lora.0.weight" for c in "wavg"},
    **{f"att.{c}2": f"attn.{c}_lora.lora.2.weight" for c in "wavg"},
    **{name: name for name in ("ffn.x_k", "ffn.key.weight", "ffn.value.weight")},
}
LAYER6 = {
    **NORMS,
    **{f"att.{name}.weight": f"attn.{c}_proj.linear.weight" for name, c in PROJECTIONS.items()},
    "att.gate.weight": "attn.g_proj.linear.weight",
    "att.output.weight": "attn.o_proj.weight",
    "att.time_faaaa": "attn.bonus",
    "att.time_decay": "attn.w_proj.linear.lora.2.bias",
    "att.time_decay_w1": "attn.w_proj.linear.lora.0.weight",
    "att.time_decay_w2": "attn.w_proj.linear.lora.2.weight",
    "att.time_maa_x": "attn.x_proj.0.mu",
    "ffn.key.weight": "ffn.key.linear.weight",
    "ffn.receptance.weight": "ffn.receptance.linear.weight",
    "ffn.value.weight": "ffn.value.weight",
    "ffn.time_maa_k": "ffn.key.mu",
    "ffn.time_maa_r": "ffn.receptance.mu",
}
LAYERS = {"fla6": LAYER6, "fla7": LAYER7}
# raw factors [in, out] officially, weights of linear maps [out, in] in fla
TURNED = re.compile(r"att\.([wavg][12]|time_decay_w[12])")

FIVE_OFFICIAL, FIVE_FLA = "wkvrg", "rwkvg"  # the order of RWKV-6's five-way low-rank map
SIX = "rwkvag"  # the order in which early fla stacks RWKV-7's token shifts

TRANSFORMERS = (  # official → transformers, in this order; the way back takes them in reverse
    (r"^emb\.", "rwkv.embeddings."),
    (r"^ln_out\.", "rwkv.ln_out."),
    (r"^blocks\.", "rwkv.blocks."),
    (r"^rwkv\.blocks\.0\.ln0\.", "rwkv.blocks.0.pre_ln."),
    (r"\.att\.", ".attention."),
    (r"\.ffn\.", ".feed_forward."),
    (r"\.time_mix_k$", ".time_mix_key"),
    (r"\.time_mix_v$", ".time_mix_value"),
    (r"\.time_mix_r$", ".time_mix_receptance"),
    (r"\.time_mix_g$", ".time_mix_gate"),
)
BACK = (
    (r"^rwkv\.embeddings\.", "emb."),
    (r"^rwkv\.ln_out\.", "ln_out."),
    (r"^rwkv\.blocks\.", "blocks."),
    (r"^blocks\.0\.pre_ln\.", "blocks.0.ln0."),
    (r"\.attention\.", ".att."),
    (r"\.feed_forward\.", ".ffn."),
    (r"\.time_mix_key$", ".time_mix_k"),
    (r"\.time_mix_value$", ".time_mix_v"),
    (r"\.time_mix_receptance$", ".time_mix_r"),
    (r"\.time_mix_gate$", ".time_mix_g"),
)


def layout(names: Mapping[str, Tensor]) -> str | None:
    """Return the layout that tensors are named by, or None."""
    if any(name.startswith(("rwkv.blocks.", "rwkv.embeddings.")) for name in names):
        return "transformers"
    if not any(name.startswith("model.layers.") for name in names):
        return None
    return "fla6" if any(".attn.x_proj." in name for name in names) else "fla7"


def to_official(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return tensors of a layout under official names; their axes of size 1 are not settled."""
    if layout == "transformers":
        return {_replaced(name, BACK): tensor for name, tensor in tensors.items()}
    ends = {theirs: name for name, theirs in ENDS.items()}
    layer = {theirs: name for name, theirs in LAYERS[layout].items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if match is None:
            found[ends.get(name, name)] = tensor
            continue
        stem, part = f"blocks.{match[1]}.", match[2]
        if part in layer:
            turn = TURNED.fullmatch(layer[part]) and tensor.ndim == 2
            found[stem + layer[part]] = tensor.T if turn else tensor
        elif layout == "fla7" and part == "attn.x_x" and len(tensor) == len(SIX):
            found |= {f"{stem}att.x_{c}": row for c, row in zip(SIX, tensor, strict=True)}
        elif layout == "fla6" and (five := _five_to_official(part, tensor)):
            found |= {f"{stem}att.{key}": value for key, value in five.items()}
        else:
            found[name] = tensor
    return found


def from_official(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return official tensors under the names of a layout, in its shapes."""
    if layout == "transformers":
        return {_replaced(name, TRANSFORMERS): tensor for name, tensor in tensors.items()}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if match is None:
            found[ENDS[name]] = tensor
            continue
        stem, part = f"model.layers.{match[1]}.", match[2]
        if part not in LAYERS[layout]:
            continue  # the five-way map, below
        if TURNED.fullmatch(part):
            tensor = tensor.T
        elif tensor.shape[:-1] == (1, 1) and not part.startswith("att.x_"):
            tensor = tensor.flatten()
        found[stem + LAYERS[layout][part]] = tensor
    if layout == "fla6":
        found |= _fives_from_official(tensors)
    return found


def _five_to_official(part: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return the five-way low-rank map of fla's RWKV-6 in official order and axes."""
    order = [FIVE_FLA.index(c) for c in FIVE_OFFICIAL]
    if part == "attn.x_bias" and len(tensor) == 5:
        return {f"time_maa_{c}": row for c, row in zip(FIVE_FLA, tensor, strict=True)}
    if part == "attn.x_proj.0.linear.weight" and tensor.ndim == 2 and len(tensor) % 5 == 0:
        five = tensor.unflatten(0, (5, -1))[order]  # [5, R, D]
        return {"time_maa_w1": five.flatten(0, 1).T}
    if part == "attn.x_proj.2.weight" and tensor.ndim == 2 and tensor.shape[1] % 5 == 0:
        five = tensor.unflatten(1, (5, -1))[:, order]  # [D, 5, R]
        return {"time_maa_w2": five.permute(1, 2, 0)}
    return {}


def _fives_from_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the five-way maps of every layer in fla's order and axes."""
    order = [FIVE_OFFICIAL.index(c) for c in FIVE_FLA]
    found = {}
    for name, w1 in tensors.items():
        if not name.endswith(".att.time_maa_w1"):
            continue
        layer = name.removesuffix("w1")
        stem = f"model.layers.{name.split('.')[1]}.attn."
        bias = torch.stack([tensors[f"{layer}{c}"].flatten() for c in FIVE_FLA])
        found[f"{stem}x_bias"] = bias
        found[f"{stem}x_proj.0.linear.weight"] = w1.T.unflatten(0, (5, -1))[order].flatten(0, 1)
        w2 = tensors[f"{layer}w2"][order]  # [5, R, D]
        found[f"{stem}x_proj.2.weight"] = w2.permute(2, 0, 1).flatten(1)
    return found


def _replaced(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in pairs:
        name = re.sub(pattern, replacement, name)
    return name
