"""A checkpoint is a folder: ``model.safetensors`` and ``config.json``, written whole or not at all.

``config.json`` says which domain built the model and from what configuration, so a folder is enough
to rebuild it. Nothing here unpickles.
"""

import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rwkv_core._files import atomic_folder
from rwkv_core.config import from_dict, to_dict
from rwkv_core.errors import CheckpointError, RWKVError
from rwkv_core.registry import ADAPTERS

__all__ = ["build", "find", "load", "read_tensors", "save"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def build(adapter: str, config: Any) -> nn.Module:
    """Return a new model of a registered domain that knows its domain and configuration.

    A domain may complete the configuration from its data (such as the names of classes); then
    ``model.config`` is the complete one, and that is what checkpoints hold.
    """
    model = ADAPTERS[adapter].build(config)
    complete = getattr(model, "config", None)
    return _tag(model, adapter, complete if isinstance(complete, type(config)) else config)


def save(model: nn.Module, folder: str | Path, extra: dict[str, bytes] | None = None) -> Path:
    """Write a model made by :func:`build` or :func:`load` to a new folder.

    Args:
        model: the model.
        folder: where; must not exist.
        extra: further files of the folder, by name.

    Raises:
        FileExistsError: ``folder`` exists.
        OSError: it cannot be written; nothing is left behind.
    """
    from safetensors.torch import save as to_bytes

    tensors = {n: t.detach().cpu().contiguous() for n, t in model.state_dict().items()}
    description = {"adapter": model.adapter, "config": to_dict(model.config)}
    with atomic_folder(folder) as temporary:
        (temporary / WEIGHTS).write_bytes(to_bytes(tensors, {"format": "pt"}))
        (temporary / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        for name, content in (extra or {}).items():
            (temporary / name).write_bytes(content)
    return Path(folder)


def find(path: str | Path) -> Path:
    """Return the checkpoint folder at ``path``, or the latest one inside a run's folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / WEIGHTS).is_file():
        return path
    steps = sorted(path.glob("step-*"), key=lambda p: int(re.sub(r"\D", "", p.name) or -1))
    steps = [p for p in steps if (p / WEIGHTS).is_file()]
    if not steps:
        what = "holds no checkpoint" if path.is_dir() else "is not a checkpoint folder"
        raise CheckpointError(
            f"{path} {what}: expected a folder with {WEIGHTS} and {CONFIG}, or a run's folder "
            "with step-* inside"
        )
    return steps[-1]


def load(path: str | Path, expected: str | None = None) -> nn.Module:
    """Return the model saved at ``path``, a checkpoint's folder or a run's, in evaluation mode.

    Args:
        path: the folder.
        expected: name of the domain it has to be of; None takes any.

    Raises:
        CheckpointError: a file is missing, damaged, of another domain or architecture; the message
            names the tensors that differ.
    """
    folder = find(path)
    try:
        description = json.loads((folder / CONFIG).read_text())
        adapter, values = description["adapter"], description["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} does not describe a model: {type(error).__name__}: {error}"
        ) from error
    config_type = ADAPTERS[adapter].Config
    if expected not in (None, adapter):
        raise CheckpointError(
            f"{path} holds a model of the domain {adapter!r}, expected {expected!r}"
        )
    model = build(adapter, from_dict(config_type, values))
    load_tensors(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return model.eval()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        CheckpointError: not such a file, or cut short. A pickle is recognised and refused: loading
            one can run code.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if content[:2] == b"PK" or content[:1] == b"\x80":
        raise CheckpointError(
            f"{path} is a pickle (a .pth file); expected safetensors. Unpickling can run code, so "
            "it is not done"
        )
    try:
        return from_bytes(content)
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is damaged or not safetensors ({len(content)} bytes): {error}"
        ) from error


def load_tensors(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a model; raise CheckpointError naming what is missing, extra or misfit."""
    expected = model.state_dict()
    problems = [f"missing {n}" for n in expected if n not in tensors]
    problems += [f"unexpected {n}" for n in tensors if n not in expected]
    problems += [
        f"{n} has shape {list(tensors[n].shape)}, expected {list(t.shape)}"
        for n, t in expected.items()
        if n in tensors and tensors[n].shape != t.shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + ("; …" if len(problems) > 3 else "")
        raise CheckpointError(
            f"{source} is of another architecture: {len(problems)} of {len(expected)} tensors "
            f"differ: {shown}"
        )
    model.load_state_dict(tensors)


def _tag(model: nn.Module, adapter: str, config: Any) -> nn.Module:
    model.adapter, model.config = adapter, config  # type: ignore[assignment]
    return model


def adapter_of(model: nn.Module) -> tuple[str, Any]:
    """Return the name of a model's domain and the adapter itself.

    Raises:
        RWKVError: the model was not made by a registered domain.
    """
    name = getattr(model, "adapter", None)
    if not isinstance(name, str):
        raise RWKVError(
            f"{type(model).__name__} does not say which domain it belongs to; build it with "
            "rwkv_core.checkpoint.build(name, config) or set its attributes 'adapter' and 'config'"
        )
    return name, ADAPTERS[name]
