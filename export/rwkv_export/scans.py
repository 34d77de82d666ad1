"""Loops that read their inputs as they lie: ``Scan`` takes any axis, in either direction.

torch's loop runs over the first axis, forwards, so what lies in another order is swapped or flipped
before it and its outputs after it.
"""

import onnx_ir as ir

__all__ = ["scan_as_it_lies"]

END = -(2**63)  # of a slice that runs backwards to the first element


def scan_as_it_lies(model: ir.Model) -> None:
    """Say by attributes of ``Scan`` what swaps and flips around it do, in place."""
    for node in model.graph:
        if node.op_type == "Scan":
            _inputs(node)
            _outputs(node)


def _inputs(scan: ir.Node) -> None:
    found = []
    first = len(scan.inputs) - scan.attributes["num_scan_inputs"].as_int()
    for i in range(first, len(scan.inputs)):
        x, axis, backwards = scan.inputs[i], 0, 0
        while x is not None and (before := x.producer()) is not None:
            if _swaps(before):
                axis = 1 - axis
            elif _flips(before, axis):
                backwards = 1 - backwards
            else:
                break
            x = before.inputs[0]
        scan.replace_input_with(i, x)
        found.append((axis, backwards))
    _describe(scan, "input", found)


def _outputs(scan: ir.Node) -> None:
    found = []
    n_states = len(scan.inputs) - scan.attributes["num_scan_inputs"].as_int()
    for y in scan.outputs[n_states:]:
        last, axis, backwards = y, 0, 0
        while len(last.uses()) == 1 and not last.is_graph_output():
            ((after, _),) = last.uses()
            if _swaps(after):
                axis = 1 - axis
            elif _flips(after, axis):
                backwards = 1 - backwards
            else:
                break
            last = after.outputs[0]
        if last is not y and not last.is_graph_output():
            y.shape = last.shape
            last.replace_all_uses_with(y)
            found.append((axis, backwards))
        else:
            found.append((0, 0))
    _describe(scan, "output", found)


def _describe(scan: ir.Node, which: str, found: list[tuple[int, int]]) -> None:
    axes, directions = zip(*found, strict=True)
    scan.attributes.add(ir.AttrInt64s(f"scan_{which}_axes", axes))
    scan.attributes.add(ir.AttrInt64s(f"scan_{which}_directions", directions))


def _swaps(node: ir.Node) -> bool:
    """Tell whether a node exchanges the first two axes."""
    if node.op_type != "Transpose" or "perm" not in node.attributes:
        return False
    order = list(node.attributes["perm"].as_ints())
    return order == [1, 0, *range(2, len(order))]


def _flips(node: ir.Node, axis: int) -> bool:
    """Tell whether a node reverses an axis."""
    if node.op_type != "Slice" or len(node.inputs) != 5:
        return False
    bounds = [ir.convenience.get_const_tensor(x) for x in node.inputs[1:] if x is not None]
    known = [None if x is None else x.numpy().tolist() for x in bounds]
    return known == [[-1], [END], [axis], [-1]]
