"""The official (BlinkDL) tensor names: which model they make, and what they are called here.

Detection looks at names and shapes alone, never at their order, and every missing, extra or misfit
tensor is named. Source of the names: BlinkDL/RWKV-LM and ChatRWKV.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rwkv_core.errors import CheckpointError
from rwkv_core.formats.shapes import official_shapes
from rwkv_core.formats.weights import MAX_TENSORS, Architecture, Weights

__all__ = ["NORM_EPS", "check_finite", "from_ours", "to_ours", "weights"]

NORM_EPS = 64e-5
"""Eps of the per-head norm of every official World model; it is in no file."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
PREFIX = re.compile(r"(?:_forward_module\.|_orig_mod\.|module\.|model\.)+")  # of trainers
LAYER = re.compile(r"blocks\.(0|[1-9]\d{0,4})\.(.+)")
UNUSED = {f"blocks.0.att.{name}" for name in ("v0", "v1", "v2")}

# variants of the architecture that are not implemented: a part of a name → what it is
REFUSED = {
    ".qkv.": "RWKV-7b (deep embedding attention)",
    ".ffn.s_emb": "RWKV-7a (deep embedding)",
    "enn.": "RWKV-8",
    "rosa": "RWKV-8 ROSA",
    ".time_maa_rkvw_w1": "RWKV-6b or 6c (they cannot be told apart)",
    ".att.gate_w1": "RWKV-6a (low-rank gate)",
    ".tiny_": "RWKV-4a (tiny attention)",
    "head_q": "a model with a copy head",
    "head_k": "a model with a copy head",
    "copy_mask": "a model with a copy head",
    "pos_emb": "a model with position embeddings",
    ".ffnPre.": "a model whose first layer begins with channel mixing (ffnPre)",
    ".att.qq": "an RWKV-4 with extra attention (qq, kk, vv, oo)",
}


def weights(
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    format: str,
    norm_eps: float | None = None,
    assumed: tuple[str, ...] = (),
    options: Mapping[str, Any] | None = None,
) -> Weights:
    """Return tensors under official names as a model, each in its official shape.

    Args:
        tensors: by official name, perhaps behind a trainer's prefix; axes of size 1 are free.
        source: the file, for messages.
        format: of the file.
        norm_eps: eps of the per-head norm if the file says it; None assumes 64e-5 and says so.
        assumed: sentences about what the reader took for granted.
        options: further mixer options that the file says; what the tensors tell goes first.

    Raises:
        CheckpointError: a variant that is not implemented, several generations at once, a tensor
            missing, unknown, or of a wrong shape or dtype.
    """
    found = _without_prefix(tensors, source)
    _refuse_variants(found, source)
    layers = _layers(found, source)
    version = _version(layers, source)
    dropped = tuple(sorted(UNUSED & found.keys())) if version == "7" else ()
    found = {name: t for name, t in found.items() if name not in dropped}
    _check_tensors(found, source)

    model = _Shapes(found, source)
    detected = _options(version, model, len(layers))
    if version == "5":
        version = "5.0" if not detected["gate"] else "5.2" if detected["per_channel"] else "5.1"
    if version != "4":
        if norm_eps is None:
            norm_eps = NORM_EPS
            assumed += (f"eps {NORM_EPS:g} of the norm over heads, as in every World model",)
        detected["norm_eps"] = norm_eps
    vocab_size, dim = model.matrix("emb.weight")
    architecture = Architecture(
        mixer=f"rwkv{version[0]}",
        version=version,
        dim=dim,
        depth=len(layers),
        vocab_size=vocab_size,
        options={**(options or {}), **detected},
    )
    return Weights(
        tensors=_in_official_shape(found, architecture, source),
        architecture=architecture,
        format=format,
        assumed=assumed,
        dropped=dropped,
    )


def check_finite(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError naming the tensors that hold NaN or infinity."""
    # the extremes are not numbers if any value is none, and finding them takes no memory
    extremes = {name: torch.stack(t.aminmax()) for name, t in tensors.items() if not t.is_meta}
    bad = [name for name, pair in extremes.items() if not bool(pair.isfinite().all())]
    if bad:
        raise CheckpointError(
            f"{source}: {len(bad)} of {len(tensors)} tensors hold values that are not finite: "
            f"{_few(bad)}; the file is damaged, or its training had diverged"
        )


def to_ours(name: str) -> str:
    """Return our name of an official one: ``blocks.3.att.key.weight`` → ``backbone.….key.weight``.

    The mixers keep the official names of their parameters; only what is around them differs.
    """
    if name.startswith("blocks.0.ln0."):
        return name.replace("blocks.0.ln0", "backbone.ln_in")
    if match := LAYER.fullmatch(name):
        half, dot, rest = match[2].partition(".")
        half = {"att": "time_mix", "ffn": "channel_mix"}.get(half, half)
        return f"backbone.blocks.{match[1]}.{half}{dot}{rest}"
    return f"backbone.{name}" if name.startswith("ln_out.") else name


def from_ours(name: str) -> str:
    """Return the official name of ours; the inverse of :func:`to_ours`."""
    name = name.replace("backbone.ln_in.", "blocks.0.ln0.").removeprefix("backbone.")
    return name.replace(".time_mix.", ".att.").replace(".channel_mix.", ".ffn.")


def turned(name: str, tensor: Tensor) -> Tensor:
    """Return a tensor in the other party's axes: a tuned state is [H, V, K] there, [H, K, V] here.

    The same for both directions and both generations that have one (6 and 7).
    """
    return tensor.transpose(-1, -2) if name.endswith(".time_state") else tensor


def _without_prefix(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{source} holds {len(tensors)} tensors; at most {MAX_TENSORS}")
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        short = PREFIX.sub("", name, count=1) if PREFIX.match(name) else name
        if short in found:
            raise CheckpointError(f"{source} holds {short} twice, once as {name}")
        found[short] = tensor
    return found


def _refuse_variants(found: Mapping[str, Tensor], source: str) -> None:
    for part, what in REFUSED.items():
        for name in found:
            if part in name:
                raise CheckpointError(
                    f"{source} holds {what}: {name}. Supported are the generations 4, 5.0, 5.1, "
                    "5.2, 6 and 7"
                )


def _layers(found: Mapping[str, Tensor], source: str) -> list[set[str]]:
    """Return the names within each layer, without ``blocks.i.``."""
    layers: dict[int, set[str]] = {}
    for name in found:
        if match := LAYER.fullmatch(name):
            layers.setdefault(int(match[1]), set()).add(match[2])
    if not layers or "emb.weight" not in found:
        known = "emb.weight and blocks.0.…"
        raise CheckpointError(
            f"{source} is no RWKV language model: expected {known}, got {_few(found)}"
        )
    if len(layers) != max(layers) + 1:
        absent = next(i for i in range(len(layers)) if i not in layers)
        raise CheckpointError(
            f"{source} holds layer {max(layers)} but no tensor of layer {absent}; layers count "
            "from 0 without gaps"
        )
    return [layers[i] for i in range(len(layers))]


def _version(layers: list[set[str]], source: str) -> str:
    versions = [_version_of_layer(names) for names in layers]
    for i, version in enumerate(versions):
        if version != versions[0]:
            raise CheckpointError(
                f"{source} mixes generations: layer 0 is RWKV-{versions[0]}, layer {i} "
                f"RWKV-{version}"
            )
    return versions[0]


def _version_of_layer(names: set[str]) -> str:
    if "att.r_k" in names:
        return "7"
    if "att.time_maa_x" in names:
        return "6"
    if "att.ln_x.weight" in names:
        return "5"
    return "4"


def _check_tensors(found: Mapping[str, Tensor], source: str) -> None:
    for name, tensor in found.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(
                f"{source}: {name} is of {tensor.dtype}; weights are float32, float16, bfloat16 or "
                "float64"
            )
        if not tensor.numel():
            raise CheckpointError(f"{source}: {name} is empty: shape {list(tensor.shape)}")


class _Shapes:
    """Shapes by name, for questions that have to have an answer."""

    def __init__(self, found: Mapping[str, Tensor], source: str) -> None:
        self.found, self.source = found, source

    def of(self, name: str) -> tuple[int, ...]:
        if name not in self.found:
            raise CheckpointError(f"{self.source} lacks {name}")
        return tuple(self.found[name].shape)

    def matrix(self, name: str) -> tuple[int, int]:
        shape = self.of(name)
        if len(shape) != 2:
            raise CheckpointError(
                f"{self.source}: {name} has shape {list(shape)}, expected two axes"
            )
        return shape

    def heads(self, name: str, dim: int) -> tuple[int, int]:
        """Return (heads, head size) of a tensor [H, N], which may have lost or gained axes of 1."""
        shape = self.of(name)
        if len(shape) != 2:
            shape = tuple(n for n in shape if n != 1)
        if len(shape) == 1:  # a single head
            shape = (1, *shape)
        if len(shape) != 2 or shape[0] * shape[1] != dim:
            raise CheckpointError(
                f"{self.source}: {name} has shape {list(self.of(name))}, expected [heads, head "
                f"size] whose product is the width {dim}"
            )
        return shape


def _options(version: str, model: _Shapes, depth: int) -> dict[str, Any]:
    """Return the options of the mixers that the shapes tell."""
    _, dim = model.matrix("emb.weight")
    attention, _ = model.matrix("blocks.0.att.key.weight")
    if attention != dim:
        raise CheckpointError(
            f"{model.source}: attention is {attention} wide and the embedding {dim}; models with "
            "two widths are not supported"
        )
    options: dict[str, Any] = {"hidden_dim": model.matrix("blocks.0.ffn.key.weight")[0]}
    if version == "5":
        return options | _options5(model, dim)
    if version == "6":
        options["head_dim"] = model.heads("blocks.0.att.time_faaaa", dim)[1]
        five = model.matrix("blocks.0.att.time_maa_w1")[1]
        if five % 5:
            raise CheckpointError(
                f"{model.source}: blocks.0.att.time_maa_w1 has {five} columns, expected five ranks"
            )
        options["mix_rank"] = five // 5
        options["decay_rank"] = model.matrix("blocks.0.att.time_decay_w1")[1]
    if version == "7":
        options["head_dim"] = model.heads("blocks.0.att.r_k", dim)[1]
        names = {"decay_rank": "w1", "iclr_rank": "a1", "gate_rank": "g1"}
        for option, name in names.items():
            options[option] = model.matrix(f"blocks.0.att.{name}")[1]
        if depth > 1:
            options["value_rank"] = model.matrix("blocks.1.att.v1")[1]
    if any(name.endswith(".att.time_state") for name in model.found):
        options["tuned_state"] = True
    return options


def _options5(model: _Shapes, dim: int) -> dict[str, Any]:
    """Return what tells 5.0, 5.1 and 5.2 apart; the bonus goes by its name, not by the gate."""
    exp_bonus = "blocks.0.att.time_first" in model.found
    bonus = f"blocks.0.att.{'time_first' if exp_bonus else 'time_faaaa'}"
    n_decay = math.prod(model.of("blocks.0.att.time_decay"))
    per_channel = n_decay == dim
    if dim % n_decay:
        raise CheckpointError(
            f"{model.source}: blocks.0.att.time_decay has {n_decay} values, expected one per head "
            f"or one per channel of width {dim}"
        )
    return {
        "head_dim": model.heads(bonus, dim)[1] if per_channel else dim // n_decay,
        "per_channel": per_channel,
        "gate": "blocks.0.att.gate.weight" in model.found,
        "exp_bonus": exp_bonus,
    }


def _in_official_shape(
    found: Mapping[str, Tensor], architecture: Architecture, source: str
) -> dict[str, Tensor]:
    """Return the tensors of a model, all of them and no other, with their official axes of 1."""
    a, expected = architecture, official_shapes(architecture)
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    problems = [f"lacks {_few(missing)}"] if missing else []
    problems += [f"holds {_few(extra)}, which such a model has not"] if extra else []
    if problems:
        raise CheckpointError(
            f"{source}, taken for RWKV-{a.version} of width {a.dim} and {a.depth} layers, "
            f"{' and '.join(problems)}"
        )
    shaped = {}
    for name, shape in expected.items():
        tensor = found[name]
        if _essential(tensor.shape) != _essential(shape):
            raise CheckpointError(
                f"{source}: {name} has shape {list(tensor.shape)}, expected {list(shape)}"
            )
        shaped[name] = tensor.reshape(shape)
    return shaped


def _essential(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
