"""Causal models as graphs of flat tensors: what a host calls and what an export writes."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor, nn

from rwkv_core.adapter import Arrays, ExportSpec
from rwkv_core.backbone import Backbone
from rwkv_core.state import pack, packed_names, unpack

__all__ = ["SequenceGraph", "StepGraph", "recurrent_spec"]


class StepGraph(nn.Module):
    """One token of each sequence [B, 1, ...] and packed state in; head's output [B, ...] and state.

    Args:
        embed: from inputs to embeddings [B, T, D].
        backbone: the trunk.
        head: from features to outputs.
    """

    def __init__(self, embed: nn.Module, backbone: Backbone, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.backbone, self.head = embed, backbone, head
        self.names = list(packed_names(backbone.state_type).values())

    def forward(self, inputs: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
        """Run the trunk's single-token path, time first."""
        state: Mapping[str, Tensor] = dict(zip(self.names, packed, strict=True))
        inputs = inputs.transpose(0, 1)
        x_1BD, state = self.backbone.step(self.embed(inputs), state, _tokens(inputs))
        return self.head(x_1BD)[0], *state.values()


class SequenceGraph(StepGraph):
    """Any number of tokens [B, T, ...] at once, outputs [B, R, ...] after R of them."""

    def forward(self, inputs: Tensor, *packed: Tensor) -> tuple[Tensor, ...]:
        """Run the trunk over the sequence; first of ``packed`` is where outputs are wanted [R].

        The head of a language model is as large as half of its trunk, and of a prompt only the last
        output is of use.
        """
        positions_R, *rows = packed
        state = unpack(self.backbone.state_type, dict(zip(self.names, rows, strict=True)))
        x_BTD, state = self.backbone(self.embed(inputs), state, _tokens(inputs))
        x_BRD = x_BTD.index_select(1, positions_R)
        return self.head(x_BRD), *pack(state).values()


def recurrent_spec(
    name: str,
    module: StepGraph,
    *,
    inputs: Arrays,
    outputs: tuple[str, ...],
    sample: Callable[[np.random.Generator, Mapping[str, int]], Arrays],
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    sizes: tuple[Mapping[str, int], ...] = ({"batch": 1}, {"batch": 3}),
) -> ExportSpec:
    """Return the specification of a graph with state.

    ``dynamic`` and ``sizes`` are those of :class:`rwkv_core.adapter.ExportSpec`, for the inputs;
    the state's batch is free. By default so is that of every input, verified at 1 and 3.
    """
    weight = next(module.parameters())
    layers = module.backbone.init_state(1, device=weight.device, dtype=weight.dtype)
    state = {n: t.numpy(force=True) for n, t in pack(layers).items()}
    return ExportSpec(
        name=name,
        module=module,
        inputs=inputs,
        outputs=outputs,
        state=state,
        dynamic={
            **(dynamic or {n: {0: "batch"} for n in inputs}),
            **{n: {1: "batch"} for n in state},
        },
        sample=sample,
        sizes=sizes,
    )


def _tokens(inputs: Tensor) -> Tensor | None:
    return None if inputs.is_floating_point() else inputs
