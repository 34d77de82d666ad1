"""Equal graphs in the operators that the accelerators of phones have.

NNAPI and CoreML take what they know and hand the rest back to the processor; each crossing copies.
These operators of the traced graphs one or the other lacks (onnxruntime's own lists, in
``onnxruntime/tools/mobile_helpers``), and each is a few of those that both have:

    Neg x                  -1 · x
    ReduceSum x            N · mean(x), N elements
    ReduceL2 x             √(N · mean(x²))
    LayerNormalization x   (x - μ) / √(mean((x - μ)²) + ε) · weight + bias
    Gather x, one index    Squeeze x, where the axis has one element
    Transpose x            x, where it is one element
    CumSum x               L · x, L a triangle of ones
    ReduceMax x            the larger of both halves, again and again
    Pad x, zeros           zeros and x concatenated, a slice of x where it is cut
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from rwkv_core.errors import ExportError

__all__ = ["for_phones"]


def for_phones(model: onnx.ModelProto) -> None:
    """Replace the operators above, in place.

    Raises:
        ExportError: a free dimension, or a sum over no axis in particular.
    """
    _Rewriter(model).run()


class _Rewriter:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        shaped = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self.shapes = {
            v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in [*shaped.input, *shaped.value_info, *shaped.output]
            if v.type.tensor_type.HasField("shape")
        }
        for v in self.graph.input:
            if 0 in self.shapes[v.name]:
                raise ExportError(f"phones need fixed sizes; {v.name!r} has a free dimension")
        self.shapes |= {i.name: list(i.dims) for i in self.graph.initializer}
        self.constants = {i.name: i for i in self.graph.initializer}
        self.count = 0

    def run(self) -> None:
        rules: dict[str, Callable[[NodeProto], Iterator[NodeProto]]] = {
            "Neg": self.negation,
            "ReduceSum": self.sum,
            "ReduceL2": self.length,
            "LayerNormalization": self.layer_norm,
            "Gather": self.gather,
            "Transpose": self.transpose,
            "CumSum": self.prefix_sums,
            "ReduceMax": self.maximum,
            "Pad": self.padding,
        }
        nodes = list(self.graph.node)
        del self.graph.node[:]
        for node in nodes:
            rule = rules.get(node.op_type)
            self.graph.node.extend(rule(node) if rule else [node])
        used = {name for node in self.graph.node for name in node.input}
        kept = [i for i in self.graph.initializer if i.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def negation(self, node: NodeProto) -> Iterator[NodeProto]:
        yield helper.make_node("Mul", [node.input[0], self.constant(-1.0)], node.output)

    def sum(self, node: NodeProto) -> Iterator[NodeProto]:
        mean = self.name()
        yield self.mean(
            node.input[0], self.axes(node), mean, keep=int(_attribute(node, "keepdims", 1))
        )
        n = self.constant(self.size(node.input[0], self.axes(node)))
        yield helper.make_node("Mul", [mean, n], node.output)

    def length(self, node: NodeProto) -> Iterator[NodeProto]:
        x, axes = node.input[0], self.axes(node)
        square, mean, total = self.name(), self.name(), self.name()
        yield helper.make_node("Mul", [x, x], [square])
        yield self.mean(square, axes, mean, keep=int(_attribute(node, "keepdims", 1)))
        yield helper.make_node("Mul", [mean, self.constant(self.size(x, axes))], [total])
        yield helper.make_node("Sqrt", [total], node.output)

    def layer_norm(self, node: NodeProto) -> Iterator[NodeProto]:
        x, weight, *bias = node.input
        axes = list(range(int(_attribute(node, "axis", -1)), 0))
        if not axes or len(node.output) > 1:
            raise ExportError(f"cannot write {node.name or 'LayerNormalization'} for phones")
        mean, centred, square, variance, sure, deviation, normal, scaled = (
            self.name() for _ in range(8)
        )
        yield self.mean(x, axes, mean)
        yield helper.make_node("Sub", [x, mean], [centred])
        yield helper.make_node("Mul", [centred, centred], [square])
        yield self.mean(square, axes, variance)
        eps = self.constant(_attribute(node, "epsilon", 1e-5))
        yield helper.make_node("Add", [variance, eps], [sure])
        yield helper.make_node("Sqrt", [sure], [deviation])
        yield helper.make_node("Div", [centred, deviation], [normal])
        last = scaled if bias else node.output[0]
        yield helper.make_node("Mul", [normal, weight], [last])
        if bias:
            yield helper.make_node("Add", [scaled, *bias], node.output)

    def gather(self, node: NodeProto) -> Iterator[NodeProto]:
        x, index = node.input
        axis = int(_attribute(node, "axis", 0))
        known = self.constants.get(index)
        if known is not None and not known.dims and self.shapes.get(x, [0])[axis] == 1:
            yield helper.make_node("Squeeze", [x, self.constant([axis])], node.output)
        else:
            yield node

    def transpose(self, node: NodeProto) -> Iterator[NodeProto]:
        one = math.prod(self.shapes.get(node.input[0], [0])) == 1
        yield helper.make_node("Identity", node.input, node.output) if one else node

    def prefix_sums(self, node: NodeProto) -> Iterator[NodeProto]:
        x, shape = node.input[0], self.shapes.get(node.input[0], [])
        if self.axes(node)[0] % max(len(shape), 1) != len(shape) - 2 or not shape[-2]:
            yield node
            return
        exclusive, reverse = _attribute(node, "exclusive", 0), _attribute(node, "reverse", 0)
        ones_TT = np.tri(shape[-2], k=-int(exclusive), dtype=np.float32)
        name = self.constant(ones_TT.T if reverse else ones_TT)
        yield helper.make_node("MatMul", [name, x], node.output)

    def maximum(self, node: NodeProto) -> Iterator[NodeProto]:
        x, axes = node.input[0], self.axes(node)
        n = int(self.size(x, axes[:1]))
        if len(axes) > 1:
            yield node
            return
        while n > 1:
            half = -(-n // 2)
            halves, larger = [self.name(), self.name()], self.name()
            for part, begin in zip(halves, (0, n - half), strict=True):
                cut = ([begin], [begin + half], axes)
                yield helper.make_node("Slice", [x, *map(self.constant, cut)], [part])
            yield helper.make_node("Max", halves, [larger])
            x, n = larger, half
        if _attribute(node, "keepdims", 1):
            yield helper.make_node("Identity", [x], node.output)
        else:
            yield helper.make_node("Squeeze", [x, self.constant(axes)], node.output)

    def padding(self, node: NodeProto) -> Iterator[NodeProto]:
        x, pads, *more = node.input
        shape = list(self.shapes.get(x, []))
        value = self.constants.get(more[0]) if more and more[0] else None
        zeros = value is None or not numpy_helper.to_array(value).any()
        plain = _attribute(node, "mode", b"constant") == b"constant" and len(more) < 2
        if pads not in self.constants or 0 in shape or not (shape and zeros and plain):
            yield node
            return
        amounts = numpy_helper.to_array(self.constants[pads]).reshape(2, -1).T
        for axis, (before, after) in enumerate(amounts.tolist()):
            if before < 0 or after < 0:
                begin, end = max(0, -before), shape[axis] - max(0, -after)
                cut = self.name()
                bounds = map(self.constant, ([begin], [end], [axis]))
                yield helper.make_node("Slice", [x, *bounds], [cut])
                x, shape[axis], before, after = cut, end - begin, max(0, before), max(0, after)
            if before or after:
                around = [np.zeros([*shape[:axis], n, *shape[axis + 1 :]], np.float32)
                          for n in (before, after)]  # fmt: skip
                first, last = ([self.constant(z)] if z.size else [] for z in around)
                joined = self.name()
                yield helper.make_node("Concat", [*first, x, *last], [joined], axis=axis)
                x, shape[axis] = joined, shape[axis] + before + after
        yield helper.make_node("Identity", [x], node.output)

    def mean(self, x: str, axes: list[int], out: str, *, keep: int = 1) -> NodeProto:
        return helper.make_node("ReduceMean", [x, self.constant(axes)], [out], keepdims=keep)

    def axes(self, node: NodeProto) -> list[int]:
        if len(node.input) < 2 or node.input[1] not in self.constants:
            raise ExportError(f"cannot write {node.op_type} without known axes for phones")
        return [int(a) for a in numpy_helper.to_array(self.constants[node.input[1]]).ravel()]

    def size(self, x: str, axes: list[int]) -> float:
        n = math.prod(self.shapes[x][axis] for axis in axes) if x in self.shapes else 0
        if not n:
            raise ExportError(f"phones need fixed sizes; that of {x!r} is not known")
        return float(n)

    def constant(self, value: "float | list[int] | np.ndarray") -> str:
        """Return the name of an initializer: fp32, or int64 of a list."""
        array = np.array(value, np.int64 if isinstance(value, list) else np.float32)
        name = f"phone_{hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()}"
        if name not in self.constants:
            self.graph.initializer.append(numpy_helper.from_array(array, name))
            self.constants[name] = self.graph.initializer[-1]
        return name

    def name(self) -> str:
        self.count += 1
        return f"phone:{self.count}"


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    found = (helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    return next(found, default)
