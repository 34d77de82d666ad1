"""A torch model as a function of named arrays, so that hosts need not know it from an ONNX file."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from rwkv_core.adapter import Arrays, ExportSpec

__all__ = ["TorchRun", "expand_state"]


class TorchRun:
    """Run a model's graphs with PyTorch; the counterpart of the exported model's runtime.

    Args:
        model: put into evaluation mode while a graph runs.
        specs: the graphs.
        metadata: what the model's host needs to know.
    """

    folder = None

    def __init__(
        self, model: nn.Module, specs: Sequence[ExportSpec], metadata: Mapping[str, Any]
    ) -> None:
        self.model, self.metadata = model, metadata
        self.graphs: Mapping[str, ExportSpec] = {spec.name: spec for spec in specs}

    @torch.inference_mode()
    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs of ``graph``, state tensors under their input names."""
        spec = self.graphs[graph]
        names = [*spec.inputs, *spec.state]
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        out = spec.module(*(torch.from_numpy(inputs[n]).to(device) for n in names))
        self.model.train(was_training)
        out = out if isinstance(out, tuple) else (out,)
        names = [*spec.outputs, *spec.state]
        return {n: t.numpy(force=True) for n, t in zip(names, out, strict=True)}

    def initial_state(self, graph: str, batch: int) -> dict[str, np.ndarray]:
        """Return the state before the first token, for ``batch`` sequences."""
        spec = self.graphs[graph]
        return expand_state(spec.state, spec.dynamic, batch)

    def stream(self, state: Arrays) -> "TorchStream":
        """Return a reader that starts from ``state`` and keeps its state to itself."""
        return TorchStream(self, state)


class TorchStream:
    """A state that follows the calls, so that a host need not carry it: see ``Run.stream``."""

    def __init__(self, run: TorchRun, state: Arrays) -> None:
        self._run, self.state = run, dict(state)

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Read ``inputs`` and return the outputs of ``graph``, without its state."""
        out = self._run(graph, {**inputs, **self.state})
        self.state = {name: out.pop(name) for name in self.state}
        return out


def expand_state(
    state: Arrays, dynamic: Mapping[str, Mapping[int, str]], batch: int
) -> dict[str, np.ndarray]:
    """Repeat the initial state of one sequence along the axis named ``batch``."""
    expanded = {}
    for name, array in state.items():
        axes = [axis for axis, dim in dynamic.get(name, {}).items() if dim == "batch"]
        expanded[name] = np.repeat(array, batch, axes[0]) if axes else array.copy()
    return expanded
