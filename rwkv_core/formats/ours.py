"""Our own checkpoint folders of language models, as one format among the others."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from rwkv_core.errors import CheckpointError
from rwkv_core.formats import official, safe
from rwkv_core.formats.weights import Weights

__all__ = ["DOMAIN", "FORMAT", "describe", "is_ours", "read", "tensors_of"]

DOMAIN = "text"
"""The domain whose models official files hold, a name in the adapter registry."""

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "rwkv-toolkit"
MIXERS = ("rwkv4", "rwkv5", "rwkv6", "rwkv7")


def is_ours(folder: Path) -> bool:
    """Tell whether a folder says of itself that this package wrote it."""
    try:
        return "adapter" in safe.read_json(folder / CONFIG)
    except CheckpointError:
        return False


def read(folder: Path) -> Weights:
    """Return the language model in a checkpoint folder.

    Raises:
        CheckpointError: damaged, of another domain, or of a mixer that is no official generation.
    """
    return _weights(folder, safe.read)


def describe(folder: Path) -> Weights:
    """Return the language model in a checkpoint folder, its tensors without data.

    Raises:
        CheckpointError: as :func:`read`.
    """
    return _weights(folder, safe.describe)


def tensors_of(weights: Weights) -> dict[str, Tensor]:
    """Return a model's tensors as our language model holds them: our names, shapes and axes."""
    tensors = {}
    for name, tensor in weights.tensors.items():
        if tensor.ndim == 3 and tensor.shape[:2] == (1, 1):
            tensor = tensor.flatten()
        tensors[official.to_ours(name)] = official.turned(name, tensor)
    return tensors


def _weights(folder: Path, reader: Callable[[Path], dict[str, Tensor]]) -> Weights:
    description = safe.read_json(folder / CONFIG)
    config = description.get("config")
    if description.get("adapter") != DOMAIN or not isinstance(config, Mapping):
        raise CheckpointError(
            f"{folder} holds a model of the domain {str(description.get('adapter'))[:40]!r}; "
            f"official files hold those of the domain {DOMAIN!r}"
        )
    mixer, options = config.get("mixer"), config.get("mixer_options")
    if mixer not in MIXERS or not isinstance(options, Mapping) or not _are_scalars(options):
        raise CheckpointError(
            f"{folder} holds a model of the mixer {str(mixer)[:40]!r} with options "
            f"{str(options)[:80]}; official files hold {', '.join(MIXERS)}"
        )
    found = {}
    for name, tensor in reader(folder / WEIGHTS).items():
        theirs = official.from_ours(name)
        found[theirs] = official.turned(theirs, tensor)
    said = {n: v for n, v in options.items() if v is not None}
    weights = official.weights(
        found,
        source=str(folder),
        format=FORMAT,
        norm_eps=said.pop("norm_eps", official.NORM_EPS),
        options=said,
    )
    if weights.architecture.mixer != mixer:
        raise CheckpointError(
            f"{folder / CONFIG} says {mixer}, the tensors are of {weights.architecture.mixer}"
        )
    a = weights.architecture
    sizes = {"dim": a.dim, "depth": a.depth, "vocab_size": a.vocab_size}
    for key, value in {**{n: config.get(n) for n in sizes}, **said}.items():
        told = sizes.get(key, a.options.get(key))
        if value != told:
            raise CheckpointError(
                f"{folder / CONFIG} says {key} = {str(value)[:40]}, the tensors {told}"
            )
    return weights


def _are_scalars(options: Mapping[str, Any]) -> bool:
    """Tell whether options are what the mixers take: numbers, names, yes or no."""
    eps = options.get("norm_eps")
    return all(
        value is None or isinstance(value, (int, float, str)) for value in options.values()
    ) and (eps is None or isinstance(eps, float))
