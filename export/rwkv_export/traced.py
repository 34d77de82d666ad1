"""What tracing sees of the causal ops: one node ``rwkv::WKV…`` each, whatever the length.

Which operations the node stands for is said by the file's functions (``recurrences.py``), after
tracing. Of RWKV-7 it sees whole layers in another form (``rwkv7_layers.py``).
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from rwkv_core.graphs import SequenceGraph, StepGraph
from rwkv_core.mixers.base import Mixer
from rwkv_export.recurrences import DOMAIN
from rwkv_export.rwkv7_layers import Sequence7, Step7, is_rwkv7

__all__ = ["as_nodes"]

OPS = ("wkv4", "wkv6", "wkv7")
LAYERS_7: dict[type, type] = {StepGraph: Step7, SequenceGraph: Sequence7}


@contextmanager
def as_nodes(module: nn.Module) -> Iterator[dict[str, tuple[int, int]]]:
    """Make the causal ops inside a module's mixers trace to one node each.

    Yields:
        What was traced: ``"WKV7"`` → (heads, size of a key). It fills while tracing.
    """
    found: dict[str, tuple[int, int]] = {}
    tables = {op: importlib.import_module(f"rwkv_core.ops.{op}").IMPLS for op in OPS}
    mixers: list[Any] = [
        m for m in module.modules() if isinstance(m, Mixer) and m.causal and hasattr(m, "impl")
    ]
    graphs: list[Any] = [
        m for m in module.modules() if type(m) in LAYERS_7 and is_rwkv7(cast(Any, m).backbone)
    ]
    before = [mixer.impl for mixer in mixers]
    kinds = [type(graph) for graph in graphs]
    try:
        for op, table in tables.items():
            table["node"] = _node(op.upper(), found)
        for mixer in mixers:
            mixer.impl = "node"
        for graph in graphs:
            graph.__class__ = LAYERS_7[type(graph)]
        yield found
    finally:
        for table in tables.values():
            table.pop("node", None)
        for mixer, impl in zip(mixers, before, strict=True):
            mixer.impl = impl
        for graph, kind in zip(graphs, kinds, strict=True):
            graph.__class__ = kind


def _node(op: str, found: dict[str, tuple[int, int]]) -> Callable[..., Any]:
    def matrices(*inputs: Tensor) -> tuple[Tensor, ...]:
        state_BHKV, v_BTHV = inputs[-1], inputs[3]
        found[op] = (state_BHKV.shape[1], state_BHKV.shape[2])
        return _trace(op, inputs, (v_BTHV, state_BHKV))

    def sums(
        w_D: Tensor, u_D: Tensor, k_BTD: Tensor, v_BTD: Tensor, state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        found[op] = (1, len(w_D))
        y_BTD, *after = _trace(op, (w_D, u_D, k_BTD, v_BTD, *state), (v_BTD, *state))
        return y_BTD, tuple(after)

    return sums if op == "WKV4" else matrices


def _trace(op: str, inputs: tuple[Tensor, ...], like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    found = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op}",
        inputs,
        dtypes=[x.dtype for x in like],
        shapes=[x.shape for x in like],
        version=1,
    )
    return tuple(found)
