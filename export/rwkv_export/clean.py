"""What a file must not tell: the machine that it was made on."""

from collections.abc import Iterable

import onnx

__all__ = ["strip"]


def strip(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes of this machine: source paths, code lines, its own names."""
    model.producer_name, model.producer_version = "rwkv-toolkit", ""
    model.doc_string = ""
    del model.metadata_props[:]
    model.graph.name = "graph"
    _strip_graph(model.graph)
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        _strip_nodes(function.node)


def _strip_graph(graph: onnx.GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    for value in [*graph.value_info, *graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]
    _strip_nodes(graph.node)


def _strip_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        node.doc_string = ""
        del node.metadata_props[:]
        for attribute in node.attribute:  # the body of a Scan, the branches of an If
            if attribute.HasField("g"):
                _strip_graph(attribute.g)
            for graph in attribute.graphs:
                _strip_graph(graph)
