"""Smaller weights in an exported folder: fp16, 8 and 4 bits; kept only if the answers stay close.

    fp16          weights stored in 16 bits, computed with in 32: half the bytes, the same speed
    int8          8 bits in blocks of 32 along a column (MatMulNBits), activations in 8 bits
    int8-dynamic  8 bits per column, activations quantised whole: best at reading long prompts, and
                  what onnxruntime's web build runs fast
    int4          4 bits in blocks of 32, embedding and head included; what rounds badly gets 8
    int4-16       the same in blocks of 16, the values of time mixing in 8 bits: 15 % larger, closer

Both recurrent graphs get the same weights and go on sharing them. What stays as it is: vectors, the
recurrence, and matrices smaller than 64 × 64.
"""

import functools
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rwkv_core.errors import ExportError, did_you_mean
from rwkv_export.clean import strip

__all__ = ["SCHEMES", "layers_of", "matrices", "quantized"]

LEAST = 64  # rows and columns of a matrix that is worth it
BLOCK = 32
INT8_MATMUL = 4  # accuracy level: activations in 8 bits; the others are half as fast
CUTS = (1.0, 0.93, 0.86, 0.79)  # shares of a block's largest weight, and of its smallest
OUTLIER = 1.5  # times the median rounding error: such a matrix gets 8 bits instead of 4


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


def quantized(model: ModelProto, scheme: str, *, keep: Iterable[str] = ()) -> ModelProto:
    """Return a graph with its matrices quantised.

    Args:
        model: the graph, weights inside.
        scheme: one of ``SCHEMES``.
        keep: weights that stay as they are.

    Raises:
        ExportError: an unknown scheme, or a matrix that was left out without being asked for.
    """
    if scheme not in SCHEMES:
        raise ExportError(f"unknown quantisation {scheme!r}; {did_you_mean(scheme, SCHEMES)}")
    wanted = [name for name in matrices(model) if name not in set(keep)]
    result = SCHEMES[scheme](model, wanted)
    left = [name for name in matrices(result) if name in wanted]
    if left:
        raise ExportError(f"{len(left)} matrices were not quantised, such as {left[0]!r}")
    strip(result)
    return result


def _fp16(model: ModelProto, wanted: list[str]) -> ModelProto:
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


def _int4(
    model: ModelProto, wanted: list[str], block: int = BLOCK, in_8_bits: str = ""
) -> ModelProto:
    rough = outliers(model, wanted)
    rough += [n for n in wanted if in_8_bits and in_8_bits in n and n not in rough]
    fine = [name for name in wanted if name not in rough]
    model = _blocks(_clipped(model, fine, block), fine, bits=4, block=block)
    return _blocks(model, rough, bits=8)


def _clipped(model: ModelProto, wanted: list[str], block: int) -> ModelProto:
    """Return the graph with the largest weights of every block cut where that moves it least."""
    result, kinds = ModelProto(), matrices(model)
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        if tensor.name in wanted:
            array = numpy_helper.to_array(tensor)
            is_table = kinds[tensor.name] == "Gather"  # its blocks lie along the rows
            best = clipped(array.T if is_table else array, block)
            tensor.CopyFrom(numpy_helper.from_array(best.T if is_table else best, tensor.name))
    return result


def clipped(matrix_KN: np.ndarray, block: int) -> np.ndarray:
    """Return a matrix with every block's range narrowed to what 4 bits round best.

    The quantiser spans a block's range with 16 values. Where a narrower range brings the weights of
    the block closer in the mean square, those outside are cut to it.
    """
    K, N = matrix_KN.shape
    result = np.pad(matrix_KN, ((0, -K % block), (0, 0))).reshape(-1, block, N)
    for rows in np.array_split(np.arange(len(result)), max(1, result.size >> 22)):
        blocks = result[rows]
        low, high = (f(blocks, 1, keepdims=True, initial=0.0) for f in (np.min, np.max))
        least = np.full(low.shape, np.inf, np.float32)
        for below, above in itertools.product(CUTS, CUTS):
            first, last = below * low, above * high
            step = np.where(last == first, 1, (last - first) / 15)
            zero = np.round(-first / step)
            rounded = (np.clip(np.round(blocks / step) + zero, 0, 15) - zero) * step
            error = np.square(rounded - blocks).sum(1, keepdims=True)
            cut = np.clip(blocks, first, last)
            result[rows] = np.where(error < least, cut, result[rows])
            least = np.minimum(error, least)
    return np.ascontiguousarray(result.reshape(-1, N)[:K])


def _int8(model: ModelProto, wanted: list[str]) -> ModelProto:
    return _blocks(model, wanted, bits=8)


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


def _blocks(model: ModelProto, wanted: list[str], *, bits: int, block: int = BLOCK) -> ModelProto:
    """Quantise in blocks: MatMul → MatMulNBits, Gather → GatherBlockQuantized.

    The quantiser knows rows of a table in 4 bits only; in 8 they are standard operators.
    """
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    if not wanted:
        return model
    kinds = matrices(model)
    if bits == 8:
        model = _rows(model, [name for name in wanted if kinds[name] == "Gather"])
        wanted = [name for name in wanted if kinds[name] == "MatMul"]
    readers = set(_readers(model, wanted))
    quantizer = MatMulNBitsQuantizer(
        model,
        bits=bits,
        block_size=block,
        is_symmetric=False,
        accuracy_level=INT8_MATMUL,
        nodes_to_exclude=[node.name for node in model.graph.node if node.name not in readers],
        op_types_to_quantize=("MatMul", "Gather"),
        quant_axes=(("MatMul", 0), ("Gather", 1)),
    )
    with _quiet():
        quantizer.process()
    return quantizer.model.model


def _rows(model: ModelProto, wanted: list[str]) -> ModelProto:
    """Store the rows of tables in 8 bits with a scale each, in standard operators."""
    result = ModelProto()
    result.CopyFrom(model)
    graph, nodes = result.graph, []
    tables = {t.name: t for t in graph.initializer if t.name in wanted}
    for node in result.graph.node:
        tensor = tables.get(node.input[0]) if node.op_type == "Gather" else None
        if tensor is None:
            nodes.append(node)
            continue
        table, out = numpy_helper.to_array(tensor), node.output[0]
        scale = np.abs(table).max(1, keepdims=True) / 127
        rounded = np.round(table / np.where(scale == 0, 1, scale)).astype(np.int8)
        names = [f"{tensor.name}.int8", f"{tensor.name}.scale"]
        for name, array in zip(names, (rounded, scale.astype(np.float32)), strict=True):
            graph.initializer.append(numpy_helper.from_array(array, name))
        parts = [f"{out}.int8", f"{out}.scale", f"{out}.float"]
        for name, part in zip(names, parts, strict=False):
            nodes.append(helper.make_node("Gather", [name, node.input[1]], [part]))
        nodes.append(helper.make_node("Cast", [parts[0]], [parts[2]], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [parts[2], parts[1]], [out]))
        graph.initializer.remove(tensor)
    nodes = list(nodes)
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _dynamic(model: ModelProto, wanted: list[str]) -> ModelProto:
    """Quantise per column, and activations when the graph runs, in standard operators.

    Weights are stored unsigned: of signed ones processors without VNNI (AVX2, AVX-512) add pairs of
    products in 16 bits, which overflow. Products of the same activations share their quantisation.
    """
    kinds = matrices(model)
    result = _rows(model, [name for name in wanted if kinds[name] == "Gather"])
    graph, nodes = result.graph, []
    tensors = {t.name: t for t in graph.initializer if t.name in wanted}
    ready: dict[str, list[str]] = {}  # activations → in 8 bits, their scale, their zero
    activations = _as_one if _reads_one_token(model) else _by_row
    for name, value in (("int8.128", np.uint8(128)), ("int8.low", np.float32(1e-30)),
                        ("int8.middle", np.float32(128)), ("int8.last", np.array([-1])),
                        ("int8.step", np.float32(1 / 127))):  # fmt: skip
        if activations is _by_row:
            graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    for node in graph.node:
        tensor = tensors.get(node.input[1]) if node.op_type == "MatMul" else None
        if tensor is None:
            nodes.append(node)
            continue
        (x, weight), (out,) = node.input, node.output
        if x not in ready:
            made, ready[x] = activations(x)
            nodes += made
        matrix = numpy_helper.to_array(tensor)
        scale_N = np.abs(matrix).max(0) / 127
        rounded = np.round(matrix / np.where(scale_N == 0, 1, scale_N)) + 128
        names = [f"{weight}.uint8", f"{weight}.scale", f"{weight}.zero"]
        zeros = np.full(scale_N.shape, 128, np.uint8)
        arrays = (rounded.astype(np.uint8), scale_N.astype(np.float32), zeros)
        for name, array in zip(names, arrays, strict=True):
            graph.initializer.append(numpy_helper.from_array(array, name))
        x_uint8, x_scale, x_zero = ready[x]
        sums, scale, cast = f"{out}.int32", f"{out}.both_scales", f"{out}.sums"
        inputs = [x_uint8, names[0], x_zero, names[2]]
        nodes.append(helper.make_node("MatMulInteger", inputs, [sums]))
        nodes.append(helper.make_node("Cast", [sums], [cast], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [x_scale, names[1]], [scale]))
        nodes.append(helper.make_node("Mul", [cast, scale], [out]))
        graph.initializer.remove(tensor)
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _reads_one_token(model: ModelProto) -> bool:
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return len(dims) in (2, 3) and dims[1].dim_value == 1


def _as_one(x: str) -> tuple[list[NodeProto], list[str]]:
    """Quantise activations by their common range, which onnxruntime makes one node with a product.

    The best of one row; of many the largest would set the steps of all.
    """
    found = [f"{x}.uint8", f"{x}.scale", f"{x}.zero"]
    return [helper.make_node("DynamicQuantizeLinear", [x], found)], found


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


def _readers(model: ModelProto, wanted: list[str]) -> list[str]:
    """Return the names of the nodes that read some weights; every node is given one."""
    found = []
    for i, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
        if any(name in wanted for name in node.input):
            found.append(node.name)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the quantisers, which print a line for every matrix."""
    names = ("onnxruntime.quantization.matmul_nbits_quantizer", None)  # None: the root
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


SCHEMES: dict[str, Callable[[ModelProto, list[str]], ModelProto]] = {
    "fp16": _fp16,
    "int8": _int8,
    "int8-dynamic": _dynamic,
    "int4": _int4,
    "int4-16": functools.partial(_int4, block=16, in_8_bits="time_mix.value"),
}
