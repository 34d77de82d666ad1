"""A checkpoint is a folder: ``model.safetensors`` and ``config.json``, written whole or not at all.

``config.json`` says which domain built the model and from what configuration, so a folder is enough
to rebuild it. Nothing here unpickles.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from rwkv_core import formats
from rwkv_core._files import atomic_folder
from rwkv_core.config import from_dict, to_dict
from rwkv_core.errors import CheckpointError, RWKVError
from rwkv_core.formats import ours, safe
from rwkv_core.registry import ADAPTERS

__all__ = ["build", "find", "load", "located", "portable", "read_tensors", "save"]

WEIGHTS, CONFIG = "model.safetensors", "config.json"
LARGE = 1 << 24  # values; above, initialising takes longer than torch's meta device to start
MARGIN = 128  # parameters, so that a message can name the few that are missing


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
    tensors = dict(model.state_dict())
    config, files = portable(model)
    return _write(tensors, str(model.adapter), config, folder, {**files, **(extra or {})})


def _write(
    tensors: dict[str, Tensor],
    adapter: str,
    config: Any,
    folder: str | Path,
    files: Mapping[str, bytes],
) -> Path:
    description = {"adapter": adapter, "config": to_dict(config)}
    with atomic_folder(folder) as temporary:
        safe.write(tensors, temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(description, indent=2) + "\n")
        for name, content in files.items():
            (temporary / name).write_bytes(content)
    return Path(folder)


def portable(model: nn.Module) -> tuple[Any, dict[str, bytes]]:
    """Return a model's configuration as it is stored, and the files it needs stored beside it."""
    _, adapter = adapter_of(model)
    hook = getattr(adapter, "portable", None)
    return hook(model.config) if hook else (model.config, {})


def located(adapter: str, config: Any, folder: Path) -> Any:
    """Return a stored configuration that uses the files beside it in ``folder``."""
    hook = getattr(ADAPTERS[adapter], "located", None)
    return hook(config, folder) if hook else config


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
    """Return the model saved at ``path``, in evaluation mode.

    Args:
        path: a checkpoint's folder, a run's, or somebody else's weights in any format that
            :mod:`rwkv_core.formats` reads, which become fp32; ``owner/name`` that is nowhere on
            disk is a Hugging Face repository.
        expected: name of the domain it has to be of; None takes any.

    Raises:
        CheckpointError: a file is missing, damaged, of another domain or architecture; the message
            names the tensors that differ.
    """
    path = formats.resolve(path)
    if path.name == WEIGHTS and ours.is_ours(path.parent):
        path = path.parent
    if formats.is_foreign(path):
        return _load_foreign(path, expected)
    folder = find(path)
    try:
        description = safe.read_json(folder / CONFIG)
        adapter, values = str(description["adapter"]), description["config"]
    except (CheckpointError, KeyError) as error:
        raise CheckpointError(
            f"{folder / CONFIG} does not describe a model: {type(error).__name__}: {error}"
        ) from error
    config_type = ADAPTERS[adapter].Config
    _check_domain(path, adapter, expected)
    config = located(adapter, from_dict(config_type, values), folder)
    tensors = read_tensors(folder / WEIGHTS)
    return _loaded(adapter, config, tensors, str(folder / WEIGHTS)).eval()


def foreign_config(architecture: formats.Architecture) -> Any:
    """Return the configuration of our language model for an architecture found in a file."""
    return ADAPTERS[ours.DOMAIN].foreign(architecture)


def save_weights(weights: formats.Weights, folder: str | Path, beside: Path) -> Path:
    """Write a language model read from any format to a new folder that :func:`load` reads.

    The tensors keep their dtypes; the vocabulary in the folder ``beside`` comes along.

    Raises:
        FileExistsError: ``folder`` exists.
        OSError: it cannot be written; nothing is left behind.
    """
    config = located(ours.DOMAIN, foreign_config(weights.architecture), beside)
    config, files = ADAPTERS[ours.DOMAIN].portable(config)
    return _write(ours.tensors_of(weights), ours.DOMAIN, config, folder, files)


def _load_foreign(path: Path, expected: str | None) -> nn.Module:
    """Return somebody else's language model in fp32."""
    _check_domain(path, ours.DOMAIN, expected)
    weights = formats.read(path)
    folder = path if path.is_dir() else path.parent
    config = located(ours.DOMAIN, foreign_config(weights.architecture), folder)
    tensors = ours.tensors_of(weights)
    weights.tensors.clear()  # so that each can go as soon as its fp32 copy is there
    return _loaded(ours.DOMAIN, config, tensors, str(path)).eval()


def _check_domain(path: Path, adapter: str, expected: str | None) -> None:
    if expected not in (None, adapter):
        raise CheckpointError(
            f"{path} holds a model of the domain {adapter!r}, expected {expected!r}"
        )


def _loaded(adapter: str, config: Any, tensors: dict[str, Tensor], source: str) -> nn.Module:
    """Return a model with these tensors as its parameters.

    What a configuration claims is not believed: building ends where it outgrows the tensors. A
    large model is built without values, because its initialisation would take minutes.
    """
    size = sum(tensor.numel() for tensor in tensors.values())
    with _Budget(len(tensors), size, source):
        try:
            bare = _without_values(adapter, config) if size > LARGE else None
            model = build(adapter, config) if bare is None else bare
        except RWKVError:
            raise
        except (RuntimeError, OverflowError, TypeError, ValueError) as error:
            raise CheckpointError(f"{source}: its model cannot be built: {error}") from error
    if bare is None:
        load_tensors(model, tensors, source)
        return model
    _check_shapes(model, tensors, source)
    state = {}
    for name, expected in model.state_dict().items():
        # a copy: the model's memory is its own, not the file's
        state[name] = tensors.pop(name).to(expected.dtype, copy=True).contiguous()
    model.load_state_dict(state, assign=True)
    return model


def _without_values(adapter: str, config: Any) -> nn.Module | None:
    """Return a model whose parameters have shapes and no values, or None where that cannot be."""
    if not hasattr(ADAPTERS[adapter], "foreign"):
        return None
    try:
        with torch.device("meta"):
            model = build(adapter, config)
    except RWKVError:
        raise
    except Exception:  # somebody's mixer reads a value while it is built
        return None
    # what is in no file must be computed
    stored = model.state_dict().keys()
    return model if all(name in stored for name, _ in model.named_buffers()) else None


class _Budget(TorchFunctionMode):
    """Refuses memory for a model that has, or takes, more than twice what its tensors do.

    Twice, because a domain may build a part and replace it, and with a margin for what is computed
    on the way.
    """

    sized = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)

    def __init__(self, n_tensors: int, size: int, source: str) -> None:
        super().__init__()
        self.n_left, self.size_left = 2 * n_tensors + MARGIN, 2 * size + 512 * MARGIN
        self.n_tensors, self.source = n_tensors, source

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in self.sized:
            shape = args[0] if args and isinstance(args[0], (tuple, list)) else args
            self.size_left -= abs(math.prod(n for n in shape if isinstance(n, int)))
            self.check()
        return func(*args, **(kwargs or {}))

    def count(self, module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        """Take one parameter that a module registers from what is left."""
        self.n_left -= 1
        self.check()

    def check(self) -> None:
        """Raise CheckpointError if nothing is left."""
        if min(self.n_left, self.size_left) < 0:
            raise CheckpointError(
                f"{self.source} is of another architecture: its config.json describes a larger "
                f"model than the {self.n_tensors} tensors make"
            )

    def __enter__(self) -> "_Budget":
        self.handle = register_module_parameter_registration_hook(self.count)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.handle.remove()


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
    _check_shapes(model, tensors, source)
    model.load_state_dict(tensors)


def _check_shapes(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
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
