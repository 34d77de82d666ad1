"""From any format that can be read to one of three that are written."""

from pathlib import Path

from rwkv_core import checkpoint, formats
from rwkv_core.errors import CheckpointError
from rwkv_core.formats import huggingface, ours, pth
from rwkv_core.formats.official import NORM_EPS

__all__ = ["convert"]


def convert(source: str | Path, out: str | Path, to: str) -> list[str]:
    """Write the model at ``source`` to ``out``, every tensor with the dtype and bits it has.

    Args:
        source: anything that :func:`rwkv_core.checkpoint.load` takes.
        out: a file or folder that does not exist.
        to: ``"official"`` (a ``.pth``), ``"hf"`` or ``"safetensors"`` (our checkpoint folder).

    Returns:
        What was left out or cannot be said in that format, one sentence each.

    Raises:
        CheckpointError: the source cannot be read, or the format cannot hold it.
        FileExistsError: something is at ``out`` already.
    """
    source, out = formats.resolve(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; remove it or choose another name")
    if not formats.is_foreign(source):
        source = checkpoint.find(source)
    weights = formats.read(source)
    notes = []
    if weights.dropped:
        notes.append(f"left out, since no model uses them: {', '.join(weights.dropped)}")
    notes += [f"assumed: {sentence}" for sentence in weights.assumed]
    options = weights.architecture.options
    if to == "safetensors":
        if weights.format == ours.FORMAT:
            raise CheckpointError(f"{source} is a checkpoint folder already; copy it")
        checkpoint.save_weights(weights, out, source if source.is_dir() else source.parent)
    elif to == "hf":
        notes += huggingface.write(weights, out)
    else:
        pth.write(weights.tensors, out)
        if options.get("norm_eps", NORM_EPS) != NORM_EPS:
            notes.append(
                f"a .pth holds no eps: readers take {NORM_EPS:g} for the norm over heads, this "
                f"model has {options['norm_eps']:g}"
            )
        if options.get("stabilize_key"):
            notes.append("a .pth does not hold stabilize_key: readers compute without it")
    return notes
