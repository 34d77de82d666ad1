"""One file for the weights of all graphs: what two graphs have in common is stored once."""

import hashlib
from pathlib import Path

import onnx_ir as ir

__all__ = ["WEIGHTS", "WeightFile"]

WEIGHTS = "weights.bin"
ALIGNMENT = 64  # bytes; runtimes map the file into memory
SMALL = 1024  # bytes; below, a tensor stays in its graph, where shapes are inferred from it


class WeightFile:
    """Appends tensors to a file and hands out references; equal bytes get the same place.

    Args:
        path: the file, beside the graphs.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[bytes, int] = {}

    def take(self, model: ir.Model) -> None:
        """Move the weights of a graph into the file."""
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < SMALL or isinstance(tensor, ir.ExternalTensor):
                continue
            content = tensor.tobytes()
            value.const_value = ir.ExternalTensor(
                self.path.name,
                self._place(content),
                len(content),
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=value.name or "",
                base_dir=self.path.parent,
            )

    def _place(self, content: bytes) -> int:
        """Return where in the file these bytes are, after writing them if they are new."""
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            with self.path.open("ab") as file:
                file.write(bytes(-file.tell() % ALIGNMENT))
                self._places[key] = file.tell()
                file.write(content)
        return self._places[key]
