"""What the matrices of an exported model read: sums of x xᵀ over data, one for each matrix."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from rwkv_export.quantize import matrices
from rwkv_export.runtime import Runtime

__all__ = ["moments"]


def moments(runtime: Runtime, data: np.ndarray) -> dict[str, np.ndarray]:
    """Return for each matrix the sum of x xᵀ [K, K] over the inputs x that its products get.

    Args:
        runtime: the folder, in fp32.
        data: tokens [N, T], or for a whole-input graph its inputs [N, ...].
    """
    graph = next(name for name in ("prefill", "step", *runtime.graphs) if name in runtime.graphs)
    info = runtime.graphs[graph]
    listener = _Listener(runtime.folder / info.file)
    for row in data:
        if not info.state:
            (name,) = (t.name for t in info.inputs)
            listener({name: row[None]})
            continue
        state = dict(runtime.initial_state(graph, 1))
        if graph == "prefill":
            listener({"tokens": row[None], "positions": np.arange(len(row)), **state})
        for token in row if graph == "step" else ():
            out = listener({"tokens": np.array([[token]]), **state})
            state = {name: out[f"{name}_out"] for name in state}
    return {weight: listener.sums[x] for weight, x in listener.reads.items()}


class _Listener:
    """A graph that is run and whose products are listened to.

    Args:
        path: the graph, its weights beside it.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime

        model = onnx.load(path, load_external_data=False)
        products = {name for name, kind in matrices(model).items() if kind == "MatMul"}
        self.reads = {
            node.input[1]: node.input[0]
            for node in model.graph.node
            if node.op_type == "MatMul" and node.input[1] in products
        }
        self.sums: dict[str, Any] = dict.fromkeys(self.reads.values(), 0.0)
        known = {value.name for value in (*model.graph.output, *model.graph.input)}
        for x in self.sums:
            if x not in known:
                model.graph.output.append(helper.make_tensor_value_info(x, TensorProto.FLOAT, None))
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, ["CPUExecutionProvider"]
        )

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the graph and return its outputs."""
        names = [output.name for output in self._session.get_outputs()]
        found = dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        for x in self.sums:
            read = inputs[x] if x in inputs else found[x]
            rows = read.reshape(-1, read.shape[-1]).astype(np.float64)
            self.sums[x] = self.sums[x] + rows.T @ rows
        return found
