"""Fewer and cheaper nodes, for what torch says at more length than ONNX needs.

What is replaced, and by what:

    flip, CumSum, flip            CumSum(reverse=1)
    CumSum, moved by one          CumSum(exclusive=1)
    swaps and flips, Scan         Scan along that axis, in that direction (scans.py)
    Reshape, Reshape              the second
    Slice, Slice                  one, of both axes
    Squeeze, Unsqueeze            nothing, where both are of one axis
    Pow(x, 2)                     Mul(x, x), which onnxruntime computes in half the time
"""

from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import (
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
)
from onnxscript import rewriter
from onnxscript.rewriter.pattern import RewriteRule

from rwkv_export.scans import scan_as_it_lies

__all__ = ["fuse"]

END = -(2**63)  # of a slice that runs backwards to the first element


def fuse(model: ir.Model) -> None:
    """Replace the sequences above, in place."""
    scan_as_it_lies(model)
    rewriter.rewrite(model, [REVERSE, EXCLUSIVE, RESHAPE, SQUARE, UNSQUEEZE])
    # of three axes after of two; matches that overlap are not all found at once
    for _ in range(2):
        rewriter.rewrite(model, [SLICE])
    for tidy in (
        IdentityEliminationPass(),
        RemoveUnusedNodesPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateInitializersPass(),
    ):
        tidy(model)


def _flipped(op: Any, x: Any, axis: Any, flip_axis: Any, flip_back_axis: Any) -> Any:
    flipped = op.Slice(x, [-1], [END], flip_axis, [-1])
    sums = op.CumSum(flipped, axis, _outputs=["sums"])
    return op.Slice(sums, [-1], [END], flip_back_axis, [-1])


def _is_reverse(
    _: Any, sums: ir.Value, axis: ir.Value, flip_axis: ir.Value, flip_back_axis: ir.Value, **__: Any
) -> bool:
    at = _numbers(axis)
    same_axis = bool(at) and at == _numbers(flip_axis) == _numbers(flip_back_axis)
    return same_axis and not _attribute(sums, "reverse") and not _attribute(sums, "exclusive")


def _reverse(op: Any, x: ir.Value, axis: ir.Value, **_: Any) -> ir.Value:
    return op.CumSum(x, axis, reverse=1)


def _moved(op: Any, x: Any, axis: Any, pads: Any) -> Any:
    return op.Pad(op.CumSum(x, axis, _outputs=["sums"]), pads, _outputs=["moved"])


def _is_exclusive(
    _: Any, sums: ir.Value, axis: ir.Value, pads: ir.Value, moved: ir.Value, **__: Any
) -> bool:
    at, amounts, node = _numbers(axis), _numbers(pads), moved.producer()
    if not at or not amounts or node is None or _attribute(sums, "exclusive"):
        return False
    rank, by = len(amounts) // 2, -1 if _attribute(sums, "reverse") else 1
    expected = [0] * len(amounts)
    expected[at[0] % rank], expected[rank + at[0] % rank] = by, -by
    return amounts == expected and node.attributes.get_string("mode", "constant") == "constant"


def _exclusive(op: Any, x: ir.Value, axis: ir.Value, sums: ir.Value, **_: Any) -> ir.Value:
    return op.CumSum(x, axis, exclusive=1, reverse=_attribute(sums, "reverse"))


def _reshaped_twice(op: Any, x: Any, first: Any, second: Any) -> Any:
    return op.Reshape(op.Reshape(x, first), second, _outputs=["y"])


def _is_literal(_: Any, second: ir.Value, y: ir.Value, **__: Any) -> bool:
    # else a 0 would stand for a size of what is left out
    return bool(_attribute(y, "allowzero")) or 0 not in (_numbers(second) or [0])


def _reshaped(op: Any, x: ir.Value, second: ir.Value, y: ir.Value, **_: Any) -> ir.Value:
    return op.Reshape(x, second, allowzero=_attribute(y, "allowzero"))


def _sliced_twice(
    op: Any, x: Any, start: Any, end: Any, axes: Any, step: Any,
    start_2: Any, end_2: Any, axes_2: Any, step_2: Any,
) -> Any:  # fmt: skip
    return op.Slice(op.Slice(x, start, end, axes, step), start_2, end_2, axes_2, step_2)


def _is_of_two_axes(
    _: Any, axes: ir.Value, axes_2: ir.Value, x: ir.Value, **bounds: ir.Value
) -> bool:
    first, second = _numbers(axes), _numbers(axes_2)
    if not first or not second or None in map(_numbers, bounds.values()):
        return False
    # a negative axis may be the same as another
    return min(first + second) >= 0 and not set(first) & set(second)


def _sliced(op: Any, x: ir.Value, **bounds: ir.Value) -> ir.Value:
    both = [
        op.Constant(
            value_ints=(_numbers(bounds[name]) or []) + (_numbers(bounds[f"{name}_2"]) or [])
        )
        for name in ("start", "end", "axes", "step")
    ]
    return op.Slice(x, *both)


def _power(op: Any, x: Any) -> Any:
    return op.Pow(x, 2.0)


def _square(op: Any, x: ir.Value) -> ir.Value:
    return op.Mul(x, x)


def _unsqueezed(op: Any, x: Any, axes: Any, axes_back: Any) -> Any:
    return op.Unsqueeze(op.Squeeze(x, axes), axes_back)


def _is_one_axis(_: Any, axes: ir.Value, axes_back: ir.Value, **__: Any) -> bool:
    known = _numbers(axes)
    return known is not None and len(known) == 1 and known == _numbers(axes_back)


def _same(op: Any, x: ir.Value, **_: Any) -> ir.Value:
    return op.Identity(x)


REVERSE = RewriteRule(_flipped, _reverse, _is_reverse)
EXCLUSIVE = RewriteRule(_moved, _exclusive, _is_exclusive)
RESHAPE = RewriteRule(_reshaped_twice, _reshaped, _is_literal, remove_nodes=False)
SLICE = RewriteRule(_sliced_twice, _sliced, _is_of_two_axes, remove_nodes=False)
SQUARE = RewriteRule(_power, _square)
UNSQUEEZE = RewriteRule(_unsqueezed, _same, _is_one_axis, remove_nodes=False)


def _numbers(value: ir.Value) -> list[int] | None:
    """Return what a constant holds, flat; None if it is none."""
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy().ravel().tolist()


def _attribute(value: ir.Value, name: str) -> int:
    """Return a whole number of the node that makes a value."""
    node = value.producer()
    return 0 if node is None else node.attributes.get_int(name, 0)
