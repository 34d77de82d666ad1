"""From an exported folder to a smaller one: quantise, measure, and only then let it appear."""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from rwkv_core._files import atomic_folder
from rwkv_core.errors import ExportError
from rwkv_export import reference
from rwkv_export.gate import BOUNDS, Bounds, Quality, compare_answers
from rwkv_export.half_states import halve, in_half
from rwkv_export.manifest import MANIFEST, PARITY, Manifest, sha256
from rwkv_export.moments import moments
from rwkv_export.quantize import ROUNDED_BY_DATA, layers_of, matrices, quantized
from rwkv_export.rounding import Rounder
from rwkv_export.runtime import Runtime
from rwkv_export.weights import WEIGHTS, WeightFile

__all__ = ["Compressed", "compress"]

PROBED = 1  # rows of the data that a single layer is judged by


@dataclass(frozen=True)
class Compressed:
    """A quantised folder: how large, of how many matrices, and how good."""

    folder: Path
    bytes: int
    matrices: int
    quality: Quality


def compress(
    source: str | Path,
    folder: str | Path,
    scheme: str,
    data: np.ndarray,
    *,
    labels: np.ndarray | None = None,
    bounds: Bounds | None = None,
    keep: Collection[str] = (),
    half_states: bool = False,
    threads: int = 0,
) -> Compressed:
    """Write an exported folder again with quantised weights, if its answers stay within bounds.

    Args:
        source: a folder that ``export`` wrote.
        folder: where; must not exist.
        scheme: ``"fp16"``, ``"int8"``, ``"int8-dynamic"`` or ``"int4"``; see ``quantize.py``.
        data: tokens [N, T] of held-out text, or inputs of a whole-input graph [N, ...]. ``int4``
            is rounded by the first half of the rows and judged by the others.
        labels: right classes of the inputs [N].
        bounds: None takes ``gate.BOUNDS`` of the scheme.
        keep: layers or weights that stay as they are, such as ``"head"`` or ``"blocks.3"``.
        half_states: states go in and out in fp16.
        threads: of onnxruntime.

    Raises:
        ExportError: the answers leave the bounds; the three layers that cost most are named. Or
            ``int4`` with a single row of data.
    """
    source, folder = Path(source), Path(folder)
    before = Runtime(source, threads=threads)
    if before.metadata.get("quantization"):
        raise ExportError(f"{source} is quantised already; start from the folder in fp32")
    bounds = bounds or BOUNDS.get(scheme, Bounds(kl=0.0))
    rounder = Rounder()
    if scheme in ROUNDED_BY_DATA:
        seen, data = data[: len(data) // 2], data[len(data) // 2 :]
        labels = labels if labels is None else labels[len(seen) :]
        if not len(seen):
            raise ExportError(
                f"{scheme} is rounded by half of the rows of data and judged by the others; "
                f"got {len(data)}, give at least two"
            )
        rounder = Rounder(moments(before, seen))
    with atomic_folder(folder) as temporary:
        kept = _kept(before, keep)
        count = _write(before, temporary, scheme, kept, rounder, half_states)
        after = Runtime(temporary, threads=threads)
        quality = compare_answers(before, after, data, labels)
        broken = bounds.broken(quality)
        if broken:
            worst = _worst_layers(before, scheme, data, labels, kept, rounder, threads)
            named = ", ".join(f"{layer} (KL {kl:.2g})" for layer, kl in worst)
            raise ExportError(
                f"{scheme} is refused: {'; '.join(broken)}. What costs most: {named}. Keep those "
                "as they are, take a finer scheme, or allow more; nothing was written"
            )
        _certify(before, temporary, scheme, kept, quality, bounds, count)
        size = sum(f.stat().st_size for f in temporary.iterdir())
    return Compressed(folder, size, count, quality)


def _kept(before: Runtime, keep: Iterable[str]) -> list[str]:
    """Return the weights that are asked to stay, by their own names or their layers'."""
    names: set[str] = set()
    for graph in before.graphs.values():
        names |= matrices(onnx.load(before.folder / graph.file, load_external_data=False)).keys()
    layers, found = layers_of(sorted(names)), []
    for name in keep:
        if name not in layers and name not in names:
            raise ExportError(f"no layer or weight {name!r}; layers: {', '.join(layers)}")
        found += layers.get(name, [name])
    return found


def _write(
    before: Runtime,
    folder: Path,
    scheme: str,
    keep: Collection[str],
    rounder: Rounder,
    half_states: bool = False,
) -> int:
    """Write the graphs quantised, and everything else as it is; return the matrices quantised."""
    weights = WeightFile(folder / WEIGHTS)
    graphs, counts = {}, set()
    starts: dict[float | str | None, np.ndarray] = {}  # of the states, in fp16
    for name, info in before.graphs.items():
        model = onnx.load(before.folder / info.file)
        counts.add(len([m for m in matrices(model) if m not in keep]))
        model = quantized(model, scheme, keep=keep, rounder=rounder)
        if half_states:
            halve(model, [t.name for t in info.state])
            state = tuple(dataclasses.replace(t, dtype="float16") for t in info.state)
            for t, values in zip(info.state, before.initial_state(name, 1).values(), strict=True):
                starts[t.initial] = in_half(t.name, values)
            info = dataclasses.replace(info, state=state)
        small = ir.from_proto(model)
        weights.take(small)
        proto = ir.to_proto(small)
        onnx.save(proto, folder / info.file)
        (opset,) = (o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
        digest = sha256(folder / info.file)
        graphs[name] = dataclasses.replace(info, sha256=digest, opset=opset)
    files = dict(before.manifest.files)
    for file in files:
        if file != WEIGHTS:
            shutil.copy(before.folder / file, folder / file)
    for file in files.keys() & starts.keys():  # the others start from one number
        (folder / file).write_bytes(starts[file].astype("<f2").tobytes())
        files[file] = sha256(folder / file)
    files[WEIGHTS] = sha256(folder / WEIGHTS)
    metadata = {**before.metadata, "quantization": scheme}
    manifest = dataclasses.replace(before.manifest, graphs=graphs, files=files, metadata=metadata)
    manifest.write(folder)
    return max(counts)


def _worst_layers(
    before: Runtime,
    scheme: str,
    data: np.ndarray,
    labels: np.ndarray | None,
    keep: Collection[str],
    rounder: Rounder,
    threads: int,
) -> list[tuple[str, float]]:
    """Return the three layers that alone cost most, and their divergence."""
    names: set[str] = set()
    for graph in before.graphs.values():
        names |= matrices(onnx.load(before.folder / graph.file, load_external_data=False)).keys()
    costs = []
    for layer, own in layers_of(sorted(names - set(keep))).items():
        with tempfile.TemporaryDirectory() as folder:
            _write(before, Path(folder), scheme, names - set(own), rounder)
            some = None if labels is None else labels[:PROBED]
            quality = compare_answers(before, Runtime(folder, threads=threads), data[:PROBED], some)
        costs.append((layer, quality.kl if np.isfinite(quality.kl) else float("inf")))
    return sorted(costs, key=lambda item: -item[1])[:3]


def _certify(
    before: Runtime,
    folder: Path,
    scheme: str,
    keep: Collection[str],
    quality: Quality,
    bounds: Bounds,
    count: int,
) -> None:
    """Say in ``parity.json`` what was measured, and in the reference how far it is from PyTorch."""
    after = Runtime(folder)
    measured = reference.errors(after)
    allowed = {graph: max(2 * error, 2e-5) for graph, error in measured.items()}
    name = reference.REFERENCE
    (folder / name).write_bytes(reference.rebound((folder / name).read_bytes(), allowed))
    manifest = Manifest.read(folder)
    files = {**manifest.files, name: sha256(folder / name)}
    dataclasses.replace(manifest, files=files).write(folder)
    parity = json.loads((before.folder / PARITY).read_text())
    figures = {**dataclasses.asdict(quality), "perplexity_ratio": quality.perplexity_ratio}
    parity["quantization"] = {
        "scheme": scheme,
        "matrices": count,
        "kept": sorted(keep),
        # without labels there is no loss, some bounds are infinite: JSON has no words for either
        "quality": {name: value for name, value in figures.items() if np.isfinite(value)},
        "bounds": {n: x for n, x in dataclasses.asdict(bounds).items() if np.isfinite(x)},
        "of": sha256(before.folder / MANIFEST),
    }
    (folder / PARITY).write_text(json.dumps(parity, indent=2) + "\n")
