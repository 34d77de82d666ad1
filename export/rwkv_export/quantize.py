"""Smaller weights in an exported folder: fp16, 8 and 4 bits; kept only if the answers stay close.

    fp16          weights stored in 16 bits, computed with in 32: half the bytes, the same speed
    int8          8 bits in blocks of 32 along a column (MatMulNBits), activations in 8 bits
    int8-dynamic  8 bits per column, activations quantised whole: best at reading long prompts, and
                  what onnxruntime's web build runs fast
    int4          4 bits in blocks of 32, embedding and head included, rounded by what the matrices
                  read of some data (``rounding.py``); what rounds badly gets 8

Both recurrent graphs get the same weights and go on sharing them. What stays as it is: vectors, the
recurrence, and matrices smaller than 64 × 64.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rwkv_core.errors import ExportError, did_you_mean
from rwkv_export.clean import strip
from rwkv_export.rounding import BLOCK, Rounder

__all__ = ["ROUNDED_BY_DATA", "SCHEMES", "layers_of", "matrices", "quantized"]

LEAST = 64  # rows and columns of a matrix that is worth it
INT8_MATMUL = 4  # accuracy level: activations in 8 bits; the others are half as fast
OUTLIER = 1.5  # times the median rounding error: such a matrix gets 8 bits instead of 4
MICROSOFT = "com.microsoft"


def matrices(model: ModelProto) -> dict[str, str]:
    """Return weight → operator that reads it, for every matrix that is to be quantised."""
    dims = {i.name: tuple(i.dims) for i in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        at = {"MatMul": 1, "Gather": 0}.get(node.op_type)
        if at is None or node.input[at] not in dims:
            continue
        shape = dims[node.input[at]]
        if len(shape) == 2 and min(shape) >= LEAST:
            found[node.input[at]] = node.op_type
    return found


def layers_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Return layer → its weights: ``blocks.3``, or what is no block's, such as ``head``."""
    layers: dict[str, list[str]] = {}
    for name in names:
        block = re.search(r"blocks\.\d+", name)
        layers.setdefault(block.group() if block else name.split(".")[0], []).append(name)
    return layers


def quantized(
    model: ModelProto, scheme: str, *, keep: Iterable[str] = (), rounder: Rounder | None = None
) -> ModelProto:
    """Return a graph with its matrices quantised.

    Args:
        model: the graph, weights inside.
        scheme: one of ``SCHEMES``.
        keep: weights that stay as they are.
        rounder: of blocks, for graphs that share weights; None rounds every weight by itself.

    Raises:
        ExportError: an unknown scheme, or a matrix that was left out without being asked for.
    """
    if scheme not in SCHEMES:
        raise ExportError(f"unknown quantisation {scheme!r}; {did_you_mean(scheme, SCHEMES)}")
    wanted = [name for name in matrices(model) if name not in set(keep)]
    result = SCHEMES[scheme](model, wanted, rounder or Rounder())
    left = [name for name in matrices(result) if name in wanted]
    if left:
        raise ExportError(f"{len(left)} matrices were not quantised, such as {left[0]!r}")
    strip(result)
    return result


def _fp16(model: ModelProto, wanted: list[str], _: Rounder) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    casts = []
    for tensor in result.graph.initializer:
        if tensor.name in wanted:
            array = numpy_helper.to_array(tensor)
            if np.abs(array).max() > np.finfo(np.float16).max:
                raise ExportError(f"{tensor.name} holds values that fp16 cannot")
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), f"{name}.fp16"))
            casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *result.graph.node]
    del result.graph.node[:]
    result.graph.node.extend(nodes)
    return result


def _int8(model: ModelProto, wanted: list[str], rounder: Rounder) -> ModelProto:
    model = _replaced(model, "Gather", wanted, _rows_in_8_bits)
    return _replaced(model, "MatMul", wanted, partial(_in_blocks, rounder=rounder, bits=8))


def _int4(model: ModelProto, wanted: list[str], rounder: Rounder) -> ModelProto:
    rough = outliers(model, wanted)
    fine = [name for name in wanted if name not in rough]
    model = _replaced(model, "Gather", rough, _rows_in_8_bits)
    model = _replaced(model, "Gather", fine, partial(_rows_in_4_bits, rounder=rounder))
    model = _replaced(model, "MatMul", rough, partial(_in_blocks, rounder=rounder, bits=8))
    return _replaced(model, "MatMul", fine, partial(_in_blocks, rounder=rounder, bits=4))


def outliers(model: ModelProto, wanted: list[str]) -> list[str]:
    """Return the matrices that 4 bits round far worse than most, which a few large weights do."""
    errors = {}
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            errors[tensor.name] = rounding_error(numpy_helper.to_array(tensor), 4)
    limit = OUTLIER * float(np.median(list(errors.values()) or [0.0]))
    return [name for name, error in errors.items() if error > limit]


def rounding_error(matrix_KN: np.ndarray, bits: int) -> float:
    """Return how far weights in blocks of 32 along the columns move, over a typical weight.

    Typical is the median: a few large weights make the steps wide and are no excuse for it.
    """
    K, N = matrix_KN.shape
    blocks = np.pad(matrix_KN, ((0, -K % BLOCK), (0, 0))).reshape(-1, BLOCK, N)
    scale = np.abs(blocks).max(1, keepdims=True) / (2 ** (bits - 1) - 1)
    rounded = np.round(blocks / np.where(scale == 0, 1, scale)) * scale
    typical = float(np.median(np.abs(matrix_KN)))
    return float(np.square(rounded - blocks).mean()) ** 0.5 / typical if typical else 0.0


Stored = Mapping[str, np.ndarray | TensorProto]
Parts = tuple[list[NodeProto], Stored]


def _replaced(
    model: ModelProto, kind: str, wanted: list[str], make: Callable[[NodeProto, np.ndarray], Parts]
) -> ModelProto:
    """Return the graph with the nodes of a kind that read some weights made of others.

    ``make`` gets a node and the weight, and returns nodes and what they read by name.
    """
    result, at = ModelProto(), {"MatMul": 1, "Gather": 0}[kind]
    result.CopyFrom(model)
    graph, read = result.graph, set()
    nodes: list[NodeProto] = []
    arrays: dict[str, np.ndarray | TensorProto] = {}
    tensors = {t.name: t for t in graph.initializer if t.name in wanted}
    for node in graph.node:
        if node.op_type != kind or node.input[at] not in tensors:
            nodes.append(node)
            continue
        made, stored = make(node, numpy_helper.to_array(tensors[node.input[at]]))
        nodes += made
        arrays.update(stored)
        read.add(node.input[at])
    for name in read:
        graph.initializer.remove(tensors[name])
    for name, array in arrays.items():
        whole = isinstance(array, TensorProto)  # what numpy has no type for
        graph.initializer.append(array if whole else numpy_helper.from_array(array, name))
    del graph.node[:]
    graph.node.extend(nodes)
    if any(node.domain == MICROSOFT for node in nodes) and not any(
        opset.domain == MICROSOFT for opset in result.opset_import
    ):
        result.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return result


def _in_blocks(node: NodeProto, matrix_KN: np.ndarray, *, rounder: Rounder, bits: int) -> Parts:
    """Multiply by a matrix in blocks along its columns."""
    name, (K, N) = node.input[1], matrix_KN.shape
    levels_KN, step_nN, zero_nN = rounder(name, matrix_KN, bits)
    levels_NK = np.pad(levels_KN, ((0, -K % BLOCK), (0, 0))).T
    arrays = {
        f"{name}.int{bits}": _packed(levels_NK, bits).reshape(N, -1, BLOCK * bits // 8),
        f"{name}.step": step_nN.T.reshape(-1),
        f"{name}.zero": _packed(zero_nN.T, bits).reshape(-1),
    }
    product = helper.make_node(
        "MatMulNBits", [node.input[0], *arrays], node.output, domain=MICROSOFT,
        K=K, N=N, bits=bits, block_size=BLOCK, accuracy_level=INT8_MATMUL,
    )  # fmt: skip
    return [product], arrays


def _rows_in_4_bits(node: NodeProto, table_ND: np.ndarray, *, rounder: Rounder) -> Parts:
    """Look up rows of a table in blocks of 4 bits along them."""
    name = node.input[0]
    levels_DN, step_nN, zero_nN = rounder(name, np.ascontiguousarray(table_ND.T), 4)
    arrays: Stored = {
        f"{name}.int4": _four_bits(f"{name}.int4", levels_DN.T),
        f"{name}.step": np.ascontiguousarray(step_nN.T),
        f"{name}.zero": _four_bits(f"{name}.zero", zero_nN.T),
    }
    levels, step, zero = arrays
    lookup = helper.make_node(
        "GatherBlockQuantized", [levels, node.input[1], step, zero], node.output, domain=MICROSOFT,
        gather_axis=0, quantize_axis=1, block_size=BLOCK,
    )  # fmt: skip
    return [lookup], arrays


def _rows_in_8_bits(node: NodeProto, table_ND: np.ndarray) -> Parts:
    """Look up rows of a table in 8 bits with a scale each, in standard operators."""
    name, (out,) = node.input[0], node.output
    scale_N1 = (np.abs(table_ND).max(1, keepdims=True) / 127).astype(np.float32)
    levels_ND = np.round(table_ND / np.where(scale_N1 == 0, 1, scale_N1)).astype(np.int8)
    arrays = {f"{name}.int8": levels_ND, f"{name}.scale": scale_N1}
    levels, scale, cast = f"{out}.int8", f"{out}.scale", f"{out}.float"
    nodes = [
        helper.make_node("Gather", [f"{name}.int8", node.input[1]], [levels]),
        helper.make_node("Gather", [f"{name}.scale", node.input[1]], [scale]),
        helper.make_node("Cast", [levels], [cast], to=TensorProto.FLOAT),
        helper.make_node("Mul", [cast, scale], [out]),
    ]
    return nodes, arrays


def _packed(levels: np.ndarray, bits: int) -> np.ndarray:
    """Return rows of levels as bytes, two of 4 bits in one, the first in its lower half."""
    if bits == 8:
        return np.ascontiguousarray(levels)
    even = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    return even[:, ::2] | even[:, 1::2] << 4


def _four_bits(name: str, levels: np.ndarray) -> TensorProto:
    content = _packed(levels.reshape(1, -1), 4).tobytes()
    return helper.make_tensor(name, TensorProto.UINT4, levels.shape, content, raw=True)


def _dynamic(model: ModelProto, wanted: list[str], _: Rounder) -> ModelProto:
    """Quantise per column, and activations when the graph runs, in standard operators.

    Weights are stored unsigned: of signed ones processors without VNNI (AVX2, AVX-512) add pairs of
    products in 16 bits, which overflow. Products of the same activations share their quantisation.
    """
    model = _replaced(model, "Gather", wanted, _rows_in_8_bits)
    ready: dict[str, list[str]] = {}  # activations → in 8 bits, their scale, their zero
    activations = _as_one if _reads_one_token(model) else _by_row
    constants: Stored = {} if activations is _as_one else BY_ROW

    def product(node: NodeProto, matrix_KN: np.ndarray) -> Parts:
        (x, weight), (out,) = node.input, node.output
        nodes: list[NodeProto] = []
        if x not in ready:
            nodes, ready[x] = activations(x)
        scale_N = (np.abs(matrix_KN).max(0) / 127).astype(np.float32)
        levels_KN = np.round(matrix_KN / np.where(scale_N == 0, 1, scale_N)) + 128
        arrays = {
            f"{weight}.uint8": levels_KN.astype(np.uint8),
            f"{weight}.scale": scale_N,
            f"{weight}.zero": np.full(scale_N.shape, 128, np.uint8),
        }
        levels, step, zero = arrays
        x_uint8, x_scale, x_zero = ready[x]
        sums, scale, cast = f"{out}.int32", f"{out}.both_scales", f"{out}.sums"
        nodes += [
            helper.make_node("MatMulInteger", [x_uint8, levels, x_zero, zero], [sums]),
            helper.make_node("Cast", [sums], [cast], to=TensorProto.FLOAT),
            helper.make_node("Mul", [x_scale, step], [scale]),
            helper.make_node("Mul", [cast, scale], [out]),
        ]
        return nodes, {**constants, **arrays}

    return _replaced(model, "MatMul", wanted, product)


def _reads_one_token(model: ModelProto) -> bool:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return len(dims) in (2, 3) and dims[1].dim_value == 1


def _as_one(x: str) -> tuple[list[NodeProto], list[str]]:
    """Quantise activations by their common range, which onnxruntime makes one node with a product.

    The best of one row; of many the largest would set the steps of all.
    """
    found = [f"{x}.uint8", f"{x}.scale", f"{x}.zero"]
    return [helper.make_node("DynamicQuantizeLinear", [x], found)], found


BY_ROW: Stored = {  # what its nodes read beside the activations
    "int8.128": np.array(128, np.uint8),
    "int8.low": np.array(1e-30, np.float32),
    "int8.middle": np.array(128, np.float32),
    "int8.last": np.array([-1]),
    "int8.step": np.array(1 / 127, np.float32),
}


def _by_row(x: str) -> tuple[list[NodeProto], list[str]]:
    """Quantise every row of activations by its own largest value."""
    size, top, wide, scale, steps, whole, up, out = (
        f"{x}.{part}" for part in ("abs", "top", "wide", "scale", "steps", "whole", "up", "uint8")
    )
    nodes = [
        helper.make_node("Abs", [x], [size]),
        helper.make_node("ReduceMax", [size, "int8.last"], [top], keepdims=1),
        helper.make_node("Mul", [top, "int8.step"], [wide]),
        helper.make_node("Max", [wide, "int8.low"], [scale]),
        helper.make_node("Div", [x, scale], [steps]),
        helper.make_node("Round", [steps], [whole]),
        helper.make_node("Add", [whole, "int8.middle"], [up]),
        helper.make_node("Cast", [up], [out], to=TensorProto.UINT8),
    ]
    return nodes, [out, scale, "int8.128"]


SCHEMES: dict[str, Callable[[ModelProto, list[str], Rounder], ModelProto]] = {
    "fp16": _fp16,
    "int8": _int8,
    "int8-dynamic": _dynamic,
    "int4": _int4,
}
ROUNDED_BY_DATA = ("int4",)
