"""The domain contract: what a task must say so that train, eval and export work for it.

An adapter is any object with the members of :class:`Adapter`; there is no base class. Its module
must not import torch at the top, because :meth:`Adapter.predict` also serves exported models where
torch is not installed.

More members are used where an adapter has them: ``generate(run, prompt, **settings)`` for domains
that write; ``draw(model, config, split, folder)`` for those whose answers are better looked at than
read (it returns the files' paths); ``optimizer(model, settings)`` and
``schedule(model, optim, settings)`` for those that do not train as :mod:`rwkv_core.train.optim` and
:mod:`rwkv_core.train.schedule` do; ``portable(config)`` and ``located(config, folder)`` for those
whose models need further files, such as a vocabulary: the configuration as it is stored and the
files (name → bytes) to store beside it, and, when it is read again, the configuration that uses the
files in that folder; ``foreign(architecture)``, the configuration of a model found in somebody
else's file, for the domain that :mod:`rwkv_core.formats` hands language models to. The ``build`` of
an adapter that has it reads no values while it builds, so that it works on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Adapter", "Arrays", "ExportSpec", "Run", "Stream"]

Arrays = Mapping[str, np.ndarray]


class Run(Protocol):
    """A model as a function of named arrays: a torch module or an onnxruntime session.

    Calling it runs one graph. A recurrent graph takes and returns its state tensors by name.
    """

    metadata: Mapping[str, Any]
    graphs: Mapping[str, Any]

    @property
    def folder(self) -> Path | None:
        """Where the model's files lie; None for a model in memory."""
        ...

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Return the outputs of ``graph``, state tensors under their input names."""
        ...

    def initial_state(self, graph: str, batch: int) -> dict[str, np.ndarray]:
        """Return the state before the first token, for ``batch`` sequences."""
        ...

    def stream(self, state: Arrays) -> Stream:
        """Return a reader that starts from ``state`` and keeps its state to itself."""
        ...


class Stream(Protocol):
    """A recurrent model that is being read: as :class:`Run`, with the state out of sight."""

    @property
    def state(self) -> Mapping[str, np.ndarray]:
        """The state after the last call."""
        ...

    def __call__(self, graph: str, inputs: Arrays) -> dict[str, np.ndarray]:
        """Read ``inputs`` and return the outputs of ``graph``, without its state."""
        ...


@dataclass(frozen=True, kw_only=True)
class ExportSpec:
    """One graph to write.

    Attributes:
        name: the file is ``<name>.onnx``.
        module: wraps the model so that it takes ``inputs`` then ``state``, positionally, and
            returns ``outputs`` then the state in the same order.
        inputs: example arrays; for a recurrent graph those of one token.
        outputs: names of the results.
        state: initial value of every state tensor, for a batch of one.
        dynamic: input or state name → {axis: name of the free dimension}.
        sample: draws inputs to verify with, given a generator and the free dimensions' sizes;
            None repeats the example's values in random order.
        sizes: settings of the free dimensions to verify at; empty is the example's and twice that.
        tolerance: largest disagreement allowed, relative to the largest value.
    """

    name: str
    module: Any
    inputs: Arrays
    outputs: tuple[str, ...]
    state: Arrays = field(default_factory=dict)
    dynamic: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    sample: Callable[[np.random.Generator, Mapping[str, int]], Arrays] | None = None
    sizes: tuple[Mapping[str, int], ...] = ()
    tolerance: float = 2e-5


class Adapter(Protocol):
    """A domain: its configuration, model, data, loss, prediction, figures and graphs."""

    Config: type
    """Frozen dataclass, stored with every checkpoint."""

    def build(self, config: Any) -> nn.Module:
        """Return a freshly initialised model."""
        ...

    def data(self, config: Any, split: str, *, start: int = 0, seed: int = 0) -> Iterator[Any]:
        """Yield batches: for ``"train"`` without end, from step ``start``; for ``"eval"`` once.

        A training batch is a function of seed and step alone, so that a run resumes exactly.
        """
        ...

    def loss(
        self, model: nn.Module, batch: Any, rng: torch.Generator
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | float]]:
        """Return the scalar to minimise, and sums (not means) for :meth:`metrics`."""
        ...

    def metrics(self, config: Any, sums: Mapping[str, float]) -> dict[str, float]:
        """Return the figures of sums gathered over batches, the headline first."""
        ...

    def predict(self, run: Run, inputs: Any) -> Any:
        """Return predictions, without torch; the same code for every kind of ``run``."""
        ...

    def exports(self, model: nn.Module) -> list[ExportSpec]:
        """Return the graphs that make up the exported model."""
        ...

    def metadata(self, model: nn.Module) -> dict[str, Any]:
        """Return what a host needs beside the graphs: tokenizer, labels, normalisation."""
        ...
