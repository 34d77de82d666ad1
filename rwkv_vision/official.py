"""The authors' weights under our names, and what their kernel computes with them.

    the authors' name                               ours
    backbone.□                                      □
    patch_embed.projection.□                        patch_embed.proj.□
    layers.i.□                                      blocks.i.□
    ln1.□, after the last layer                     norm.□
    head.0.□, head.2.□, of the large model          head.pre_logits.fc.□, head.fc.□
    head.weight, head.bias, of its trainer          head.fc.□
    decoder_□, mask_token, ln2.□, of an MAE         left out, with the decoder they belong to

Names within a layer are the same; of generation 6, vectors [1, 1, C] are [C] here. The encoder of
an MAE has no ``backbone.`` and no head; it was trained with a shift along one axis and with its
positions added twice, so it is a start to fine-tune from.

timm loads such files by ``pretrained_cfg_overlay=dict(file=…)`` with ``pretrained=True``, and by
``checkpoint_path=…``. A file that holds objects beside its tensors, which safe loaders refuse, is
rewritten once by :func:`convert`.

Source: OpenGVLab/Vision-RWKV: classification/mmcls_custom, classification_internimage,
classification/mae; the kernels classification/…/cuda/wkv_cuda.cu.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import clean_state_dict
from torch import Tensor, nn

from rwkv_core._files import atomic_file
from rwkv_core.errors import CheckpointError
from rwkv_core.formats.official import check_finite
from rwkv_core.formats.safe import apart
from rwkv_core.mixers.rwkv6 import TimeMix6

__all__ = ["bi_wkv_official_kernel", "checkpoint_filter_fn", "convert", "is_official", "rename"]

RULES = (
    (re.compile(r"^backbone\."), ""),
    (re.compile(r"^patch_embed\.projection\."), "patch_embed.proj."),
    (re.compile(r"^layers\."), "blocks."),
    (re.compile(r"^ln1\."), "norm."),
    (re.compile(r"^head\.0\."), "head.pre_logits.fc."),
    (re.compile(r"^head\.2\."), "head.fc."),
    (re.compile(r"^head\.(?=weight$|bias$)"), "head.fc."),
)
TIME6 = re.compile(rf"\.att\.({'|'.join(TimeMix6.official_rows)})$")  # [1, 1, C] there, [C] here
DECODER = re.compile(r"^(decoder_|mask_token$|ln2\.)")
NESTED = ("state_dict_ema", "model_ema", "state_dict", "model")  # the averaged weights first
CLASSIFIER = ("head.fc.weight", "head.fc.bias")  # timm's to replace, for another number of classes
TRAINERS = (
    "mmcv", "mmcls", "mmdet", "mmengine", "mmpretrain", "mmseg", "addict", "argparse", "numpy",
    "yacs",
)  # fmt: skip
FREE = {"pos_embed": 1, "patch_embed.proj.weight": 1, **dict.fromkeys(CLASSIFIER, 0)}  # name: axis
SHOWN = 20  # differences that an error lists


def is_official(names: Iterable[str]) -> bool:
    """Tell whether tensors bear the authors' names."""
    return any(".patch_embed.projection." in f".{name}" for name in names)


def rename(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint under our names, every value and dtype as it is.

    Args:
        checkpoint: the authors' tensors, or a record of a trainer's that holds them under
            ``model_ema``, ``state_dict`` or ``model``. Our own names stay as they are.

    Raises:
        CheckpointError: something that is no tensor, or two names of one parameter.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in _unwrapped(checkpoint).items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, expected a tensor; weights are expected at "
                f"the top of the file or under one of {', '.join(NESTED)}"
            )
        if DECODER.match(name):
            continue
        ours = name
        for pattern, replacement in RULES:
            ours = pattern.sub(replacement, ours)
        if ours in found:
            raise CheckpointError(f"{name} comes twice: another tensor is {ours} already")
        row = tensor.shape[:2] == (1, 1) and TIME6.search(ours)
        found[ours] = tensor.flatten() if row else tensor
    return found


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Return a checkpoint as ``model`` takes it: timm's ``pretrained_filter_fn``.

    The position embedding is resampled if it was made for another image size. The classifier is
    left to timm, which drops one of another number of classes.

    Args:
        state_dict: the authors' tensors or our own, as for :func:`rename`.
        model: a model of :mod:`rwkv_vision.models`.

    Raises:
        CheckpointError: weights of another model: what is missing, unexpected or of another shape,
            and the registered model they are nearest to.
    """
    found = rename(state_dict)
    if "pos_embed" in found:
        theirs = is_official(_unwrapped(state_dict))
        found["pos_embed"] = _resampled(found["pos_embed"], model, theirs)
    if model.num_classes == 0:
        found = {name: tensor for name, tensor in found.items() if name not in CLASSIFIER}
    if differing := differences(found, model.state_dict()):
        raise CheckpointError(_complaint(found, differing, "the model they are to be loaded into"))
    return found


def load_pre_hook(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let ``load_state_dict`` take the authors' tensors; our own are not looked at."""
    if not prefix and is_official(state_dict):
        found = checkpoint_filter_fn(state_dict, model)
        state_dict.clear()
        state_dict.update(found)


def convert(source: str | Path, out: str | Path, name: str | None = None, **options: Any) -> str:
    """Write the weights of one of the authors' files under our names, as safetensors.

    The file is read by ``torch.load(weights_only=True)``. The settings and the history that its
    trainer pickled beside the weights are passed over: no class or function they name is imported.

    Args:
        source: a ``.pth`` file.
        out: a ``.safetensors`` file that does not exist.
        name: the model that the weights must fit; None finds it among those registered.
        options: of that model, as for ``timm.create_model``; an encoder of an MAE needs
            ``num_classes=0, key_norm=True``.

    Returns:
        The name of the model.

    Raises:
        CheckpointError: the file cannot be read safely, its weights fit no model, or not the one
            named, or they are not finite.
        FileExistsError: something is at ``out`` already.
        ValueError: ``out`` has another suffix, by which timm would not know it.
    """
    import safetensors.torch

    source, out = Path(source), Path(out)
    if out.suffix != ".safetensors":
        raise ValueError(f"{out} must end in .safetensors: timm tells the format by it")
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another name")
    found = rename(_load(source))
    check_finite(found, str(source))
    if name is None:
        name, differing = nearest(found)
    else:
        with torch.device("meta"):
            differing = differences(found, timm.create_model(name, **options).state_dict())
    if differing:
        raise CheckpointError(f"{source}: {_complaint(found, differing, name)}")
    with atomic_file(out) as file:
        file.write(safetensors.torch.save(apart(found), {"format": "pt"}))
    return name


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Return what sets tensors apart from those of a model, one phrase per kind of parameter.

    The number of classes and of input channels, and the positions' size, do not count: they are
    timm's to adapt.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted({*found, *expected}, key=lambda n: (n.startswith("blocks."), _natural(n))):
        if name not in found:
            what = "{} is missing"
        elif name not in expected:
            what = "{} is unexpected"
        elif _fixed(name, found[name]) != _fixed(name, expected[name]):
            what = f"{{}} is {list(found[name].shape)}, expected {list(expected[name].shape)}"
        else:
            continue
        groups.setdefault((re.sub(r"\d+", "*", name, count=1), what), []).append(name)
    phrases = [
        what.format(names[0] if len(names) == 1 else f"{kind} ({len(names)} layers)")
        for (kind, what), names in groups.items()
    ]
    return sorted(phrases, key=lambda phrase: "expected [" in phrase)  # names before shapes


def nearest(found: Mapping[str, Tensor]) -> tuple[str, list[str]]:
    """Return the name of the registered model with the fewest differences, and those."""
    names = timm.list_models("*vrwkv*", module="models")
    each = [
        (name, differences(found, _registered(name, "head.fc.weight" in found))) for name in names
    ]
    return min(each, key=lambda pair: (len(pair[1]), pair[0]))


def bi_wkv_official_kernel(
    w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, *, segments: int = 32
) -> Tensor:
    """Return what the authors' CUDA kernel computes in place of bidirectional WKV, in closed form.

    It cuts time into segments of n = ⌈T/segments⌉ tokens. Where two of them meet, tokens are off by
    one power of the decay, and sums over the future lose the past of their own segment by
    subtraction, but not all of it. With z = e^{-w/T}, x the numerator's or the denominator's terms,
    and t₀ = n⌊t/n⌋ the start of the segment:

        Σ_{i<t₀} z^{t-i} x_i + Σ_{t₀≤i<t} z^{t-1-i} x_i + Σ_{i>t} z^{i-t} x_i
            + (1 - 1/z) Σ_{t₀<i≤t} z^{i-t} x_i + e^{u/T} x_t

    A helper to compare with the authors' outputs, of order T²: our op is the paper's formula. At
    the initial decays the outputs differ by up to 0.008 of the largest with 14 × 14 patches, by
    0.001 with 24 × 24. Left out is the 1e-6 that the kernel adds to a denominator of about 1.
    ``monkeypatch.setitem(bi_wkv.IMPLS, …)`` runs a whole
    model with it.

    Args:
        w_C: decay over the whole sequence [C].
        u_C: bonus of the token itself, times T [C].
        k_BTC: key [B, T, C].
        v_BTC: value [B, T, C].
        segments: 32; 16 in the trainer of the large model.
    """
    T = k_BTC.shape[1]
    n = -(-T // segments)
    w, bonus = w_C / T, torch.exp(u_C / T)
    e_BTC = torch.exp(k_BTC - k_BTC.amax(1, keepdim=True))
    i = torch.arange(T, device=k_BTC.device)[:, None]
    leak = -torch.expm1(w)
    outputs = []
    for t in range(T):
        start = n * (t // n)
        weight_TC = torch.exp(-w * torch.where(i < start, t - i, abs(t - i) - (i < t).long()))
        weight_TC = torch.where(i == t, bonus, weight_TC)
        inside = (i > start) & (i <= t)
        weight_TC = weight_TC + torch.where(inside, leak * torch.exp(w * (t - i)), 0)
        terms_BTC = weight_TC * e_BTC
        outputs.append((terms_BTC * v_BTC).sum(1) / terms_BTC.sum(1))
    return torch.stack(outputs, 1)


class _Ignored(dict[str, Any]):
    """What stands in for a trainer's own object in a file: it takes everything, keeps nothing."""

    def __new__(cls, *_: Any) -> "_Ignored":
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def __setitem__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _unwrapped(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of a trainer's record, without the prefixes of parallel training."""
    inner = [checkpoint[key] for key in NESTED if isinstance(checkpoint.get(key), Mapping)]
    return clean_state_dict(dict(inner[0] if inner else checkpoint))


def _load(path: Path) -> Mapping[str, Any]:
    """Return what a ``.pth`` file holds, trainers' own objects aside."""
    try:
        named = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if strange := [n for n in named if n.partition(".")[0] not in TRAINERS]:
            raise CheckpointError(
                f"{path} asks for {', '.join(strange[:4])}, which no file of weights needs; it is "
                f"read only if all it names are of {', '.join(TRAINERS)}"
            )
        with torch.serialization.safe_globals([(_Ignored, n) for n in named]):
            checkpoint = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except CheckpointError:
        raise
    except Exception as error:  # torch reports a damaged file by many kinds
        first = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {first}") from error
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(f"{path} holds a {type(checkpoint).__name__}, expected a dictionary")
    return checkpoint


def _resampled(pos: Tensor, model: Any, official: bool) -> Tensor:
    """Return positions [1, T, C] on the model's grid; the authors' grids are square."""
    if pos.ndim != 3:
        return pos
    (rows, columns), side = model.grid, math.isqrt(pos.shape[1])
    if (rows, columns) == (side, side) or (not official and pos.shape[1] == rows * columns):
        return pos
    if side * side != pos.shape[1]:
        raise CheckpointError(
            f"pos_embed holds {pos.shape[1]} positions, which are no square, and the model's grid "
            f"is {rows} × {columns}; create it with the img_size that the weights are for"
        )
    return resample_abs_pos_embed(
        pos,
        new_size=[rows, columns],
        old_size=[side, side],
        num_prefix_tokens=0,
        antialias=False,  # the authors'
    )


@functools.cache
def _registered(name: str, classifies: bool) -> dict[str, Tensor]:
    """Return the tensors of a registered model, without data."""
    with torch.device("meta"):
        return timm.create_model(name, num_classes=int(classifies)).state_dict()


def _fixed(name: str, tensor: Tensor) -> list[int]:
    """Return a tensor's shape without the axis that timm or we can adapt."""
    shape = list(tensor.shape)
    if name in FREE:
        del shape[FREE[name] : FREE[name] + 1]
    return shape


def _natural(name: str) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _complaint(found: Mapping[str, Tensor], differing: list[str], of: str) -> str:
    more = [f"and {len(differing) - SHOWN} more"] if len(differing) > SHOWN else []
    near, rest = nearest(found)
    near += "" if CLASSIFIER[0] in found else " with num_classes=0"
    advice = f"they are those of {near}" if not rest else f"the nearest model is {near}"
    return (
        f"not the weights of {of}: {'; '.join(differing[:SHOWN] + more)}. By name and shape "
        f"{advice}"
    )
