"""States that travel in 16 bits: half the bytes between calls, computed with in 32.

For hosts that keep many sequences, and accelerators whose buffers are fp16. What rounding after
every call costs is measured by the gate, like any other quantisation.
"""

from collections.abc import Iterable

import numpy as np
from onnx import ModelProto, TensorProto, helper

from rwkv_core.errors import ExportError
from rwkv_export.manifest import present

__all__ = ["halve", "in_half"]


def halve(model: ModelProto, states: Iterable[str]) -> None:
    """Make states of a graph fp16 outside and fp32 inside, in place."""
    graph, states = model.graph, list(states)
    inside = {name: f"{name}.fp32" for state in states for name in (state, present(state))}
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = inside.get(name, name)
    for value in [*graph.input, *graph.output]:
        if value.name in inside:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    nodes = [helper.make_node("Cast", [s], [inside[s]], to=TensorProto.FLOAT) for s in states]
    nodes += graph.node
    for out in map(present, states):
        nodes.append(helper.make_node("Cast", [inside[out]], [out], to=TensorProto.FLOAT16))
    del graph.node[:]
    graph.node.extend(nodes)


def in_half(name: str, initial: np.ndarray) -> np.ndarray:
    """Return the initial values of a state in fp16.

    Raises:
        ExportError: values that fp16 cannot hold, such as generation 4's first maximum.
    """
    if np.abs(initial).max(initial=0) > np.finfo(np.float16).max:
        raise ExportError(
            f"the state {name!r} begins at {initial.min():.3g}, which fp16 cannot hold"
        )
    return initial.astype(np.float16)
