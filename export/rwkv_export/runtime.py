"""Run an exported folder with numpy and onnxruntime alone."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_core.adapter import Arrays
from rwkv_core.errors import ExportError
from rwkv_core.registry import ADAPTERS
from rwkv_export.manifest import GraphInfo, Manifest, present, sha256

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, OrtValue

__all__ = ["Runtime", "Stream", "load"]


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
        """Return the outputs of ``graph``, state tensors under their input names.

        A graph that takes a single input, as for phones and pages, reads a batch one by one.

        Raises:
            ExportError: an input that is missing, unknown, or of another dtype or shape.
        """
        info = self.graphs[graph]
        if n := _singly(info, inputs):
            parts = [self(graph, {k: x[i : i + 1] for k, x in inputs.items()}) for i in range(n)]
            return {name: np.concatenate([part[name] for part in parts]) for name in info.outputs}
        self._check(graph, inputs)
        state = [t.name for t in info.state]
        wanted = [*info.outputs, *map(present, state)]
        results = self.session(graph).run(wanted, dict(inputs))
        return dict(zip([*info.outputs, *state], results, strict=True))

    def initial_state(self, graph: str, batch: int) -> dict[str, np.ndarray]:
        """Return the state before the first token, for ``batch`` sequences.

        Raises:
            ExportError: the folder has no such graph.
        """
        if graph not in self.graphs:
            known = ", ".join(self.graphs)
            raise ExportError(f"{self.folder} has no graph {graph!r}; it has {known}")
        return self.graphs[graph].initial_state(batch, self.folder)

    def stream(self, state: Arrays) -> "Stream":
        """Return a reader that starts from ``state`` and keeps its state to itself."""
        return Stream(self, state)

    def load_state(self, path: str | Path) -> dict[str, np.ndarray]:
        """Return the state in a file that a model of this architecture saved, in torch or here.

        Raises:
            ExportError: no such file, or the state of another model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                info = json.loads((file.metadata() or {})["state"])
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, OSError, ValueError) as error:
            raise ExportError(f"{path} is not a saved state: {error}") from error
        if info["model"] != self.metadata.get("model"):
            raise ExportError(
                f"{path} belongs to another model: it has fingerprint {info['model']}, "
                f"{self.folder} has {self.metadata.get('model')}"
            )
        dtypes = {t.name: t.dtype for graph in self.graphs.values() for t in graph.state}
        return {name: array.astype(dtypes[name], copy=False) for name, array in state.items()}

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

    def session(self, graph: str) -> "InferenceSession":
        """Return the onnxruntime session of a graph, opened when it is first asked for."""
        if graph not in self._sessions:
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.inter_op_num_threads = 1
            path = self.folder / self.graphs[graph].file
            try:
                self._sessions[graph] = onnxruntime.InferenceSession(
                    path, options, ["CPUExecutionProvider"]
                )
            except Exception as error:  # onnxruntime's own classes share no base but this
                raise ExportError(
                    f"onnxruntime {onnxruntime.__version__} does not open {path}: {error}"
                ) from error
        return self._sessions[graph]

    def _check(self, graph: str, inputs: Arrays) -> None:
        info = self.graphs[graph]
        expected = {t.name: t for t in (*info.inputs, *info.state)}
        if missing := expected.keys() - inputs.keys():
            raise ExportError(f"graph {graph!r} also takes {', '.join(sorted(missing))}")
        sizes: dict[str, int] = {}
        for name, array in inputs.items():
            if name not in expected:
                raise ExportError(
                    f"graph {graph!r} has no input {name!r}; it takes {', '.join(expected)}"
                )
            t = expected[name]
            fits = array.dtype == t.dtype and array.ndim == len(t.shape)
            for size, promised in zip(array.shape, t.shape, strict=False):
                known = sizes.setdefault(promised, size) if isinstance(promised, str) else promised
                fits = fits and size == known
            if not fits:
                raise ExportError(
                    f"graph {graph!r} takes {name!r} as {t.dtype} [{', '.join(map(str, t.shape))}]"
                    f"{f' with {sizes}' if sizes else ''}, got {array.dtype} {list(array.shape)}"
                )


class Stream:
    """A state that stays where onnxruntime writes it: two sets of buffers that swap at each call.

    Args:
        runtime: the exported model.
        state: the state before the first call; copied.
    """

    def __init__(self, runtime: Runtime, state: Arrays) -> None:
        from onnxruntime import OrtValue

        self._runtime = runtime
        self._now = _values(OrtValue, state)
        self._next = _values(OrtValue, state)

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Read ``inputs`` and return the outputs of ``graph``, without its state.

        Whole numbers may be of any width, such as int64 where a graph for phones takes int32.
        """
        session, info = self._runtime.session(graph), self._runtime.graphs[graph]
        binding = session.io_binding()
        dtypes = {t.name: t.dtype for t in info.inputs}
        for name, array in inputs.items():
            binding.bind_cpu_input(name, array.astype(dtypes[name], "C", "same_kind", copy=False))
        for name, value in self._now.items():
            binding.bind_ortvalue_input(name, value)
        for name in info.outputs:
            binding.bind_output(name)
        for name, value in self._next.items():
            binding.bind_ortvalue_output(present(name), value)
        session.run_with_iobinding(binding)
        self._now, self._next = self._next, self._now
        outputs = binding.get_outputs()[: len(info.outputs)]
        return {n: v.numpy() for n, v in zip(info.outputs, outputs, strict=True)}

    @property
    def state(self) -> dict[str, np.ndarray]:
        """A copy of the state after the last call."""
        return {name: value.numpy().copy() for name, value in self._now.items()}


def _singly(info: GraphInfo, inputs: Arrays) -> int:
    """Return of how many the batch is if the graph takes them singly, else 0."""
    sizes = {array.shape[0] if array.ndim else 1 for array in inputs.values()}
    if info.state or len(sizes) != 1 or any(t.shape[:1] != (1,) for t in info.inputs):
        return 0
    return sizes.pop() if max(sizes) > 1 else 0


def _values(kind: Any, state: Mapping[str, np.ndarray]) -> "dict[str, OrtValue]":
    # the value is the array's own memory, so it has to be one that nobody else knows
    return {name: kind.ortvalue_from_numpy(array.copy()) for name, array in state.items()}


def load(folder: str | Path, *, threads: int = 0) -> Runtime:
    """Return the model exported to ``folder``; no torch needed.

    Raises:
        ExportError: the folder is no exported model, or a file differs from what was proven.
    """
    return Runtime(folder, threads=threads)
