"""Graphs for phones: one size, operators that their accelerators have, onnxruntime's own format.

Beside ``<graph>.ort`` come two files: ``required_operators.config``, from which onnxruntime builds
a library of those operators alone, and ``mobile.json``, what its checker of usability on phones
says of the graph: for each accelerator the parts it would be cut into, the nodes that it takes, and
the operators that it does not.
"""

import dataclasses
import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from rwkv_core.adapter import Arrays, ExportSpec
from rwkv_core.errors import ExportError
from rwkv_export.phone_operators import for_phones

__all__ = ["OPERATORS", "USABILITY", "fixed", "for_one", "in_32_bits", "to_ort"]

OPERATORS, USABILITY = "required_operators.config", "mobile.json"


def fixed(spec: ExportSpec, sizes: Mapping[str, int]) -> ExportSpec:
    """Return a graph for these sizes of its free dimensions alone."""
    inputs = {}
    for name, array in spec.inputs.items():
        axes = {axis: sizes[dim] for axis, dim in spec.dynamic.get(name, {}).items()}
        shape = [axes.get(axis, size) for axis, size in enumerate(array.shape)]
        inputs[name] = np.resize(array, shape)
    return dataclasses.replace(spec, inputs=inputs, dynamic={}, sizes=(dict(sizes),))


def for_one(spec: ExportSpec) -> ExportSpec:
    """Return a graph for one input of the first size that it is verified at, tokens as int32."""
    dims = {dim for axes in spec.dynamic.values() for dim in axes.values()}
    first = {**(spec.sizes[0] if spec.sizes else {}), "batch": 1}
    if missing := dims - first.keys():
        raise ExportError(f"graph {spec.name!r} has no size of its own for {sorted(missing)}")
    return in_32_bits(fixed(spec, {dim: first[dim] for dim in dims}))


def in_32_bits(spec: ExportSpec) -> ExportSpec:
    """Return a graph whose whole numbers are int32: accelerators know few operators for more."""
    sample = spec.sample
    return dataclasses.replace(
        spec,
        inputs=_short(spec.inputs),
        sample=sample and (lambda rng, sizes: _short(sample(rng, sizes))),
    )


def to_ort(path: Path) -> tuple[Path, dict[str, bytes]]:
    """Replace an ONNX file by one in onnxruntime's format; return it and what is said about it.

    Args:
        path: the file, its weights inside.

    Raises:
        ExportError: an operation that cannot be rewritten, or onnxruntime does not write it.
    """
    import onnxruntime
    from onnxruntime.tools.onnx_model_utils import optimize_model
    from onnxruntime.tools.ort_format_model import create_config_from_models

    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it reports success
    # what onnxruntime fuses for processors, accelerators would not know; so the basic level alone
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.save_model_format", "ORT")
    target = path.with_suffix(".ort")
    options.optimized_model_filepath = str(target)
    with tempfile.TemporaryDirectory() as folder:
        basic, config = Path(folder) / path.name, Path(folder) / OPERATORS
        try:
            optimize_model(path, basic)  # folds what follows from the sizes
            model = onnx.load(basic)
            for_phones(model)
            onnx.save(model, basic)
            onnxruntime.InferenceSession(basic, options, ["CPUExecutionProvider"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)  # it leaves the file open
                create_config_from_models([target], config, False)
            report = json.dumps({target.stem: usability(basic)}, indent=2) + "\n"
        except ExportError:
            raise
        except Exception as error:  # onnxruntime's own classes share no base but this
            raise ExportError(f"onnxruntime does not write {target.name}: {error}") from error
        lines = config.read_text().splitlines()
    path.unlink()
    operators = "".join(f"{line}\n" for line in lines if not line.startswith("#"))
    return target, {OPERATORS: operators.encode(), USABILITY: report.encode()}


def usability(path: Path) -> dict[str, Any]:
    """Return what onnxruntime's checker says of an ONNX file, for each accelerator."""
    from onnxruntime.tools.mobile_helpers import usability_checker as checker
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    with tempfile.TemporaryDirectory() as folder:
        basic = Path(folder) / path.name
        optimize_model(path, basic)
        shaped = ModelProtoWithShapeInfo(basic)
        model = shaped.model_with_shape_info
        found = {
            "NNAPI": checker.check_nnapi_partitions(model, True),
            **{
                f"CoreML {name}": checker.check_coreml_partitions(
                    model, True, f"coreml_supported_{name.lower()}_ops.md"
                )
                for name in ("MLProgram", "NeuralNetwork")
            },
        }
    return {
        name: {
            "usable": info.suitability().name,
            "parts": info.num_partitions,
            "nodes": info.num_nodes,
            "taken": info.num_supported_nodes,
            "unsupported": sorted(info.unsupported_ops),
        }
        for name, info in found.items()
    }


def _short(arrays: Arrays) -> dict[str, np.ndarray]:
    return {n: x.astype(np.int32) if x.dtype == np.int64 else x for n, x in arrays.items()}
