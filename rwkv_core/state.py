"""The state a user holds: everything a causal model remembers of what it has read."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_core._files import atomic_file
from rwkv_core.errors import CheckpointError
from rwkv_core.mixers.base import LayerState

__all__ = ["State", "pack", "packed_names", "unpack"]


@dataclass(frozen=True)
class State:
    """Per-layer states, how many tokens they hold, and whose they are.

    Immutable: a model returns a new one, so keeping an old one is all a fork takes.

    Attributes:
        layers: one NamedTuple of tensors per layer, batch first in every tensor.
        position: number of tokens read.
        model: fingerprint of the architecture the state belongs to.
    """

    layers: tuple[LayerState, ...]
    position: int
    model: str

    def packed(self) -> dict[str, Tensor]:
        """Return one tensor [L, B, …] per kind of memory: the layout of files and of ONNX."""
        return pack(self.layers)

    def unpacked(self, tensors: dict[str, Tensor], position: int) -> "State":
        """Return a state of the same model made of packed tensors."""
        return replace(self, layers=unpack(type(self.layers[0]), tensors), position=position)

    def detach(self) -> "State":
        """Return the same memory without its history of gradients."""
        return replace(self, layers=self._map(torch.Tensor.detach))

    def fork(self, batch: int) -> "State":
        """Return ``batch`` copies of a state that holds one sequence."""
        copies = self._map(lambda x: x.expand(batch, *x.shape[1:]).clone())
        return replace(self, layers=copies)

    def mix(self, other: "State", weight: float) -> "State":
        """Return the state ``weight`` of the way to another one of the same model."""
        if other.model != self.model:
            raise CheckpointError(
                f"cannot mix states of different models ({self.model} and {other.model})"
            )
        layers = tuple(a.mix(b, weight) for a, b in zip(self.layers, other.layers, strict=True))
        return replace(self, layers=layers)

    def hash(self) -> str:
        """Return a hexadecimal digest: equal for equal memories of the same model."""
        digest = hashlib.sha256(f"{self.model}:{self.position}".encode())
        for name, tensor in sorted(self.packed().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write one safetensors file that PyTorch and the exported model both read."""
        from safetensors.torch import save

        tensors = {n: t.detach().cpu().contiguous() for n, t in self.packed().items()}
        metadata = {"state": json.dumps({"position": self.position, "model": self.model})}
        with atomic_file(path) as file:
            file.write(save(tensors, metadata))

    def load(self, path: str | Path) -> "State":
        """Return the state saved in a file; ``self`` says of which model it has to be.

        Raises:
            CheckpointError: not a state file, or the state of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                info = json.loads((file.metadata() or {})["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, OSError) as error:
            raise CheckpointError(f"{path} is not a saved state: {error}") from error
        if info["model"] != self.model:
            raise CheckpointError(
                f"{path} belongs to another model: it has fingerprint {info['model']}, "
                f"this model has {self.model}"
            )
        return self.unpacked(tensors, info["position"])

    def _map(self, function: Any) -> tuple[LayerState, ...]:
        return tuple(type(layer)(*map(function, layer)) for layer in self.layers)


def packed_names(layer_state: type) -> dict[str, str]:
    """Return field → name outside Python: ``wkv_BHKV`` → ``wkv``, without the axis letters."""
    return {field: field.rpartition("_")[0] for field in layer_state._fields}  # type: ignore[attr-defined]


def pack(layers: tuple[LayerState, ...]) -> dict[str, Tensor]:
    """Return packed tensors [L, B, …] of per-layer states."""
    names = packed_names(type(layers[0])).values()
    return {name: torch.stack(rows) for name, rows in zip(names, zip(*layers))}  # noqa: B905


def unpack(layer_state: type, tensors: dict[str, Tensor]) -> tuple[LayerState, ...]:
    """Return per-layer states from packed tensors [L, B, …]."""
    names = packed_names(layer_state).values()
    return tuple(layer_state(*rows) for rows in zip(*(tensors[n].unbind() for n in names)))  # noqa: B905
