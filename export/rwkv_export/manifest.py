"""``manifest.json``: what an exported folder holds, for hosts in any language."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_core.errors import ExportError

__all__ = ["MANIFEST", "PARITY", "GraphInfo", "Manifest", "TensorInfo", "present", "sha256"]

MANIFEST, PARITY = "manifest.json", "parity.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """A named tensor: numpy dtype, shape with names for free dimensions, and for a state its start.

    ``initial`` is the value every element of a state has before the first token, or the name of a
    file that holds all of them for one sequence (little-endian, in the order of the shape).
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    initial: float | str | None = None


def present(state: str) -> str:
    """Return the name of the output that holds a state after the call.

    It is ``<state>_out``; of other people's names, ``past…`` or ``past_key_values…``, ``present…``.
    """
    for past in ("past_key_values", "past"):
        if state.startswith(past):
            return state.replace(past, "present", 1)
    return f"{state}_out"


@dataclass(frozen=True, kw_only=True)
class GraphInfo:
    """One ONNX file. State tensors come in by name and go out last, see :func:`present`."""

    file: str
    sha256: str
    opset: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[str, ...]
    state: tuple[TensorInfo, ...]

    def initial_state(self, batch: int, folder: Path) -> dict[str, np.ndarray]:
        """Return the state before the first token, for ``batch`` sequences.

        Raises:
            ExportError: a file of initial values has another size than the state.
        """
        state = {}
        for t in self.state:
            dtype = np.dtype(t.dtype)
            shape = [batch if isinstance(size, str) else size for size in t.shape]
            if not isinstance(t.initial, str):
                state[t.name] = np.full(shape, t.initial, dtype)
                continue
            one = [1 if isinstance(size, str) else size for size in t.shape]
            values = np.fromfile(folder / t.initial, dtype.newbyteorder("<"))
            if values.size != math.prod(one):
                raise ExportError(
                    f"{folder / t.initial} holds {values.size} values, the state {t.name!r} has "
                    f"{math.prod(one)}"
                )
            values = values.reshape(one).astype(dtype)
            state[t.name] = np.broadcast_to(values, shape).copy()
        return state


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The folder: which domain made it, its graphs, and what a host needs beside them.

    ``files`` are those besides the graphs, such as a vocabulary: name → sha256.
    """

    adapter: str
    graphs: Mapping[str, GraphInfo]
    metadata: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``."""
        graphs = {
            name: {
                **{k: getattr(graph, k) for k in ("file", "sha256", "opset", "outputs")},
                "inputs": [_tensor(t) for t in graph.inputs],
                "state": [_tensor(t) for t in graph.state],
            }
            for name, graph in self.graphs.items()
        }
        content = {
            "format": FORMAT,
            "adapter": self.adapter,
            "metadata": dict(self.metadata),
            "files": dict(self.files),
            "graphs": graphs,
        }
        (folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read ``manifest.json``.

        Raises:
            ExportError: there is none, or it does not describe an exported model.
        """
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ExportError(
                    f"{path} has format {content['format']!r}; this version reads {FORMAT}"
                )
            graphs = {
                name: GraphInfo(
                    file=g["file"],
                    sha256=g["sha256"],
                    opset=g["opset"],
                    outputs=tuple(g["outputs"]),
                    inputs=tuple(_read_tensor(t) for t in g["inputs"]),
                    state=tuple(_read_tensor(t) for t in g["state"]),
                )
                for name, g in content["graphs"].items()
            }
            return cls(
                adapter=content["adapter"],
                graphs=graphs,
                metadata=content["metadata"],
                files=dict(content.get("files", {})),
            )
        except FileNotFoundError as error:
            raise ExportError(f"{folder} is not an exported model: no {MANIFEST}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExportError(
                f"{path} does not describe an exported model: {type(error).__name__}: {error}"
            ) from error


def sha256(path: Path) -> str:
    """Return the hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _tensor(t: TensorInfo) -> dict[str, Any]:
    described = {"name": t.name, "dtype": t.dtype, "shape": list(t.shape)}
    return described if t.initial is None else {**described, "initial": t.initial}


def _read_tensor(t: Mapping[str, Any]) -> TensorInfo:
    np.dtype(t["dtype"])
    return TensorInfo(
        name=t["name"], dtype=t["dtype"], shape=tuple(t["shape"]), initial=t.get("initial")
    )
