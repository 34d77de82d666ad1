"""Hugging Face folders: fla and rwkv7-hf (RWKV-7, RWKV-6) and transformers' Rwkv (RWKV-4).

A folder is ``config.json`` with the weights in safetensors, whole or in shards, or in the older
``pytorch_model.bin``, which is a ``.pth`` by another name. The tensors say what the model is;
``config.json`` says the eps of the norms, and is checked where it says more. Sources of the names:
fla-org/flash-linear-attention, utils/convert_from_rwkv6.py and convert_from_rwkv7.py; transformers,
models/rwkv/convert_rwkv_checkpoint_to_hf.py.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_core._files import atomic_folder
from rwkv_core.errors import CheckpointError
from rwkv_core.formats import hf_names, official, pth, safe
from rwkv_core.formats.weights import Architecture, Weights

__all__ = ["describe", "named", "read", "write"]

CONFIG, WHOLE, BIN = "config.json", "model.safetensors", "pytorch_model.bin"
LAYER_EPS = 1e-5  # of every LayerNorm of every official model
GROUP_EPS = "group_norm_eps"  # ours; where the layouts cannot say what the model needs

Reader = Callable[[Path], dict[str, Tensor]]


def read(folder: Path) -> Weights:
    """Return the model in a folder.

    Raises:
        CheckpointError: no such folder, damaged files, a model of another kind, or one that this
            package computes differently (the message says in what).
    """
    return _weights(folder, safe.read, pth.read)


def describe(folder: Path) -> Weights:
    """Return the model in a folder, its tensors without data.

    Raises:
        CheckpointError: as :func:`read`.
    """
    return _weights(folder, safe.describe, pth.describe)


def named(tensors: Mapping[str, Tensor], config: Mapping[str, Any], source: str) -> Weights:
    """Return tensors under Hugging Face names as a model; an empty ``config`` assumes defaults.

    Raises:
        CheckpointError: as :func:`read`.
    """
    layout = hf_names.layout(tensors)
    if layout is None:
        raise CheckpointError(
            f"{source} holds none of the names of fla, rwkv7-hf or transformers' Rwkv: "
            f"{', '.join(list(tensors)[:3])}"
        )
    _check_config(config, layout, source)
    assumed: tuple[str, ...] = ()
    if config.get("fuse_norm") is True and layout == "fla7":
        assumed += ("the removal key is normalised as officially; fla's fuse_norm adds 1e-6",)
    if layout == "transformers":
        assumed += ("no layer was divided by transformers' eval() before it was saved",)
    weights = official.weights(
        hf_names.to_official(tensors, layout),
        source=source,
        format="transformers" if layout == "transformers" else "fla",
        norm_eps=_norm_eps(tensors, config, layout, source),
        assumed=assumed,
    )
    _compare_sizes(config, weights.architecture, source)
    return weights


def write(weights: Weights, folder: Path) -> list[str]:
    """Write a model as fla names it (RWKV-7, RWKV-6) or transformers does (RWKV-4).

    Returns:
        What the reader of the folder should know, one sentence each.

    Raises:
        CheckpointError: there is no layout for this generation, or none for all of its tensors.
        FileExistsError: something is at ``folder`` already.
    """
    a = weights.architecture
    layout = {"4": "transformers", "6": "fla6", "7": "fla7"}.get(a.version)
    if layout is None:
        raise CheckpointError(
            f"there is no Hugging Face layout for RWKV-{a.version}: transformers holds RWKV-4, fla "
            "RWKV-6 and RWKV-7; convert it --to official or --to safetensors"
        )
    for option in ("tuned_state", "stabilize_key"):
        if a.options.get(option):
            raise CheckpointError(
                f"the model has {option}, which the Hugging Face layouts cannot hold; convert it "
                "--to safetensors"
            )
    config, notes = _config(weights, layout)
    tensors = hf_names.from_official(weights.tensors, layout)
    with atomic_folder(folder) as temporary:
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        safe.write(tensors, temporary / WHOLE)
    return notes


def _weights(folder: Path, read_safe: Reader, read_bin: Reader) -> Weights:
    config = safe.read_json(folder / CONFIG)
    for name, reader in ((WHOLE, read_safe), (BIN, read_bin)):
        if (folder / name).is_file():
            return named(reader(folder / name), config, str(folder))
        if (folder / f"{name}.index.json").is_file():
            return named(_sharded(folder, f"{name}.index.json", reader), config, str(folder))
    raise CheckpointError(
        f"{folder} holds a {CONFIG} but no weights: expected {WHOLE}, {BIN}, or either in shards "
        "with its .index.json"
    )


def _sharded(folder: Path, index: str, reader: Reader) -> dict[str, Tensor]:
    places = safe.read_json(folder / index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(s, str) for s in places.values()):
        raise CheckpointError(f"{folder / index} holds no weight_map from tensors to files")
    shards = sorted(set(places.values()))
    for shard in shards:
        if not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard):
            raise CheckpointError(
                f"{folder / index} names the shard {shard[:80]!r}; expected a file of the folder"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder} lacks the shard {shard}")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        content = reader(folder / shard)
        promised = {name for name, place in places.items() if place == shard}
        if promised != content.keys():
            raise CheckpointError(
                f"{folder / shard} does not hold what {index} says: "
                f"{', '.join(sorted(promised ^ content.keys())[:3])}"
            )
        tensors |= content
    return tensors


def _check_config(config: Mapping[str, Any], layout: str, source: str) -> None:
    """Refuse what the tensors do not show and this package does not compute."""
    kind = config.get("model_type", "rwkv")
    if not isinstance(kind, str) or not kind.startswith("rwkv"):
        raise CheckpointError(f"{source} is of model_type {str(kind)[:40]!r}, which is no RWKV")
    expected: dict[str, Any] = {"tie_word_embeddings": False, "attn": None}
    if layout != "transformers":
        expected |= {"norm_first": True, "norm_bias": True, "hidden_act": "sqrelu"}
    for key, value in expected.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(
                f"{source}: config.json says {key} = {str(config[key])[:40]}; supported is {value}"
            )
    width = config.get("hidden_size")
    for key in ("attention_hidden_size", "value_dim"):
        widths = config.get(key)
        for other in widths if isinstance(widths, list) else [widths]:
            if other not in (None, width):
                raise CheckpointError(
                    f"{source}: config.json says {key} = {str(other)[:40]} beside hidden_size = "
                    f"{str(width)[:40]}; models with two widths are not supported"
                )
    eps = config.get("layer_norm_epsilon" if layout == "transformers" else "norm_eps", LAYER_EPS)
    if not _number(eps) or abs(eps - LAYER_EPS) > 1e-9:
        raise CheckpointError(
            f"{source}: config.json says LayerNorm eps {str(eps)[:40]}; supported is "
            f"{LAYER_EPS:g}, that of the official models"
        )


def _norm_eps(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], layout: str, source: str
) -> float | None:
    """Return the eps of the norm over heads as the model's own library computes it, if it says."""
    if GROUP_EPS in config:
        eps = config[GROUP_EPS]
        if not _number(eps) or not 0 < eps < 1:
            raise CheckpointError(f"{source}: config.json says {GROUP_EPS} = {str(eps)[:40]}")
        return float(eps)
    if "norm_eps" not in config or layout == "transformers":
        return None
    if layout == "fla6":
        return float(config["norm_eps"])
    shapes = [t.shape for name, t in tensors.items() if name.endswith(".attn.r_k") and t.ndim == 2]
    return float(config["norm_eps"]) * shapes[0][1] if shapes else None


def _compare_sizes(config: Mapping[str, Any], a: Architecture, source: str) -> None:
    sizes = {
        "hidden_size": a.dim,
        "num_hidden_layers": a.depth,
        "vocab_size": a.vocab_size,
        "intermediate_size": a.options["hidden_dim"],
        "head_dim": a.options.get("head_dim"),
    }
    for key, size in sizes.items():
        if size is not None and config.get(key, size) not in (size, None):
            raise CheckpointError(
                f"{source}: config.json says {key} = {str(config[key])[:40]}, the tensors {size}"
            )


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def _config(weights: Weights, layout: str) -> tuple[dict[str, Any], list[str]]:
    """Return the config.json of a folder, and what it cannot say to its library."""
    a = weights.architecture
    notes: list[str] = []
    dtypes = [str(t.dtype).removeprefix("torch.") for t in weights.tensors.values()]
    config: dict[str, Any] = {
        "vocab_size": a.vocab_size,
        "hidden_size": a.dim,
        "num_hidden_layers": a.depth,
        "intermediate_size": a.options["hidden_dim"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "tie_word_embeddings": False,
        "torch_dtype": max(set(dtypes), key=dtypes.count),
    }
    if layout == "transformers":
        return config | {
            "architectures": ["RwkvForCausalLM"],
            "model_type": "rwkv",
            "attention_hidden_size": a.dim,
            "context_length": 1024,
            "layer_norm_epsilon": LAYER_EPS,
            "rescale_every": 6,
        }, notes
    heads = a.dim // a.options["head_dim"]
    config |= {
        "hidden_act": "sqrelu",
        "hidden_ratio": a.options["hidden_dim"] / a.dim,
        "norm_first": True,
        "norm_bias": True,
        "norm_eps": LAYER_EPS,
        "num_heads": heads,
        "fuse_norm": False,
        GROUP_EPS: a.options["norm_eps"],
    }
    if layout == "fla6":
        theirs = LAYER_EPS
        config |= {
            "architectures": ["RWKV6ForCausalLM"],
            "model_type": "rwkv6",
            "expand_k": 1.0,
            "expand_v": 1.0,
            "proj_low_rank_dim": a.options["mix_rank"],
            "gate_low_rank_dim": a.options["decay_rank"],
        }
    else:
        theirs = LAYER_EPS * a.options["head_dim"]
        config |= {
            "architectures": ["RWKV7ForCausalLM"],
            "model_type": "rwkv7",
            "head_dim": a.options["head_dim"],
            "value_dim": [a.dim] * a.depth,
            "decay_low_rank_dim": a.options["decay_rank"],
            "a_low_rank_dim": a.options["iclr_rank"],
            "v_low_rank_dim": a.options.get("value_rank", 32),
            "gate_low_rank_dim": a.options["gate_rank"],
        }
    if abs(theirs - a.options["norm_eps"]) > 1e-9:
        notes.append(
            f"fla computes the norm over heads with eps {theirs:g}, this model with "
            f"{a.options['norm_eps']:g}: its logits will differ there; rwkv reads {GROUP_EPS}"
        )
    return config, notes
