"""Run an exported folder with numpy and onnxruntime alone."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_core.adapter import Arrays
from rwkv_core.errors import ExportError
from rwkv_core.registry import ADAPTERS
from rwkv_export.manifest import Manifest, sha256

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

__all__ = ["Runtime", "load"]


class Runtime:
    """An exported model; implements :class:`rwkv_core.adapter.Run`.

    Args:
        folder: the exported folder.
        threads: of onnxruntime; 0 is one less than the machine has, because a spinning pool on a
            busy core costs more than it brings.

    Raises:
        ExportError: the folder is no exported model, or a file differs from what was proven.
    """

    def __init__(self, folder: str | Path, *, threads: int = 0) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        self.graphs, self.metadata = self.manifest.graphs, self.manifest.metadata
        self._threads = threads or max(1, (os.cpu_count() or 2) - 1)
        self._sessions: dict[str, InferenceSession] = {}
        hashes = {graph.file: graph.sha256 for graph in self.graphs.values()}
        for file, expected in {**hashes, **self.manifest.files}.items():
            path = self.folder / file
            if Path(file).name != file or not path.is_file():
                raise ExportError(f"{self.folder} lacks the file {file!r} of its manifest")
            if sha256(path) != expected:
                raise ExportError(
                    f"{path} is not the file that was exported: its hash differs from the "
                    "manifest's; export the model again"
                )

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs of ``graph``, state tensors under their input names."""
        info = self.graphs[graph]
        state = [t.name for t in info.state]
        wanted = [*info.outputs, *(f"{name}_out" for name in state)]
        results = self._session(graph).run(wanted, dict(inputs))
        return dict(zip([*info.outputs, *state], results, strict=True))

    def initial_state(self, graph: str, batch: int) -> dict[str, np.ndarray]:
        """Return the state before the first token, for ``batch`` sequences."""
        return self.graphs[graph].initial_state(batch)

    def predict(self, inputs: Any) -> Any:
        """Return the domain's predictions, computed by the code that serves the torch model."""
        return self._adapter.predict(self, inputs)

    def generate(
        self, prompt: str = "", *, stream: bool = False, **settings: Any
    ) -> str | Iterator[str]:
        """Return the continuation of a prompt, or with ``stream`` an iterator over its pieces.

        Further settings are the domain's, for text those of :func:`rwkv_text.host.generate`.
        """
        if not hasattr(self._adapter, "generate"):
            raise ExportError(
                f"the domain {self.manifest.adapter!r} does not generate; use predict"
            )
        pieces = self._adapter.generate(self, prompt, **settings)
        return pieces if stream else "".join(pieces)

    @property
    def _adapter(self) -> Any:
        return ADAPTERS[self.manifest.adapter]

    def _session(self, graph: str) -> "InferenceSession":
        if graph not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            self._sessions[graph] = onnxruntime.InferenceSession(
                self.folder / self.graphs[graph].file, options, ["CPUExecutionProvider"]
            )
        return self._sessions[graph]


def load(folder: str | Path, *, threads: int = 0) -> Runtime:
    """Return the model exported to ``folder``; no torch needed.

    Raises:
        ExportError: the folder is no exported model, or a file differs from what was proven.
    """
    return Runtime(folder, threads=threads)
