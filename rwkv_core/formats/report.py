"""What ``rwkv info`` says of somebody else's weights, from shapes alone."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from rwkv_core.formats.weights import Architecture, Weights

__all__ = ["lines", "state_bytes"]


def lines(weights: Weights, config: Callable[[Architecture], Any]) -> list[tuple[str, str]]:
    """Return (label, value) of everything that is known of a model.

    Args:
        weights: the model; its tensors may be without data.
        config: gives the configuration it would be loaded with, for its tokenizer.
    """
    a, tensors = weights.architecture, weights.tensors
    options = dict(a.options)
    head_dim = options.pop("head_dim", None)
    rows = [
        ("format", weights.format),
        ("version", f"RWKV-{a.version}"),
        ("mixer", a.mixer),
        ("layers", str(a.depth)),
        ("width", str(a.dim)),
    ]
    if head_dim:
        rows.append(("heads", f"{a.dim // head_dim} of {head_dim}"))
    rows.append(("hidden", str(options.pop("hidden_dim"))))
    rows += [(name.replace("_", " "), str(value)) for name, value in options.items()]
    dtypes = Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())
    rows += [
        ("vocabulary", f"{a.vocab_size} rows, tokenizer {config(a).tokenizer}"),
        ("parameters", f"{sum(t.numel() for t in tensors.values()):,}"),
        ("dtypes", ", ".join(f"{name} of {n} tensors" for name, n in dtypes.items())),
        ("state", f"{state_bytes(a):,} bytes per sequence"),
    ]
    rows += [("assumed", sentence) for sentence in weights.assumed]
    if weights.dropped:
        rows.append(("unused", ", ".join(weights.dropped)))
    return rows


def state_bytes(architecture: Architecture) -> int:
    """Return the size of the state of one sequence, in fp32."""
    a = architecture
    if a.mixer == "rwkv4":
        return 4 * a.depth * 5 * a.dim  # two shifted tokens; numerator, denominator, maximum
    return 4 * a.depth * a.dim * (2 + a.options["head_dim"])
