"""What each generation's official files hold, name by name, as a function of the sizes.

    C width   H heads   N head size   F hidden width   further ranks by the names of the options

Source: BlinkDL/RWKV-LM, the trainers' model.py of each generation.
"""

from rwkv_core.formats.weights import Architecture
from rwkv_core.registry import MIXERS

__all__ = ["official_shapes"]

Shapes = dict[str, tuple[int, ...]]


def official_shapes(architecture: Architecture) -> Shapes:
    """Return official name → shape of every tensor of a model.

    Vectors that official files hold as [1, 1, C] are those that the mixers declare in
    ``official_rows``.
    """
    a = architecture
    shapes: Shapes = {
        "emb.weight": (a.vocab_size, a.dim),
        "blocks.0.ln0.weight": (a.dim,),
        "blocks.0.ln0.bias": (a.dim,),
    }
    halves = dict(zip(("att", "ffn"), MIXERS[a.mixer], strict=True))
    for i in range(a.depth):
        for name, shape in _layer(a, first=i == 0).items():
            half, _, rest = name.partition(".")
            rows = half in halves and rest in halves[half].official_rows
            shapes[f"blocks.{i}.{name}"] = (1, 1, *shape) if rows else shape
    shapes |= {"ln_out.weight": (a.dim,), "ln_out.bias": (a.dim,)}
    shapes["head.weight"] = (a.vocab_size, a.dim)
    return shapes


def _layer(a: Architecture, *, first: bool) -> Shapes:
    """Return the shapes within a layer; all vectors as [C]."""
    C, F = a.dim, a.options["hidden_dim"]
    shapes: Shapes = {f"ln{i}.{kind}": (C,) for i in (1, 2) for kind in ("weight", "bias")}
    for name in ("receptance", "key", "value", "output"):
        shapes[f"att.{name}.weight"] = (C, C)
    shapes |= {"ffn.key.weight": (F, C), "ffn.value.weight": (C, F)}
    if a.mixer != "rwkv7":
        shapes["ffn.receptance.weight"] = (C, C)
    if a.mixer != "rwkv4":
        shapes |= {"att.ln_x.weight": (C,), "att.ln_x.bias": (C,)}
    if a.options.get("tuned_state"):
        N = a.options["head_dim"]
        shapes["att.time_state"] = (C // N, N, N)
    own = {"rwkv4": _layer4, "rwkv5": _layer5, "rwkv6": _layer6}
    return shapes | (own[a.mixer](a) if a.mixer in own else _layer7(a, first))


def _layer4(a: Architecture) -> Shapes:
    names = ("time_decay", "time_first", *(f"time_mix_{c}" for c in "kvr"))
    vectors = [f"att.{name}" for name in names] + [f"ffn.time_mix_{c}" for c in "kr"]
    return dict.fromkeys(vectors, (a.dim,))


def _layer5(a: Architecture) -> Shapes:
    C, N = a.dim, a.options["head_dim"]
    heads = (C // N, N) if a.options["per_channel"] else (C // N,)
    bonus = "time_first" if a.options["exp_bonus"] else "time_faaaa"
    shapes: Shapes = {"att.time_decay": heads, f"att.{bonus}": heads}
    if a.options["gate"]:
        shapes |= {"att.gate.weight": (C, C), "att.time_mix_g": (C,)}
    vectors = [f"att.time_mix_{c}" for c in "kvr"] + [f"ffn.time_mix_{c}" for c in "kr"]
    return shapes | dict.fromkeys(vectors, (C,))


def _layer6(a: Architecture) -> Shapes:
    C, N = a.dim, a.options["head_dim"]
    R, W = a.options["mix_rank"], a.options["decay_rank"]
    vectors = [f"att.time_maa_{c}" for c in "xwkvrg"] + [f"ffn.time_maa_{c}" for c in "kr"]
    return {
        **dict.fromkeys(vectors, (C,)),
        "att.time_maa_w1": (C, 5 * R),
        "att.time_maa_w2": (5, R, C),
        "att.time_decay": (C,),
        "att.time_decay_w1": (C, W),
        "att.time_decay_w2": (W, C),
        "att.time_faaaa": (C // N, N),
        "att.gate.weight": (C, C),
    }


def _layer7(a: Architecture, first: bool) -> Shapes:
    C, N = a.dim, a.options["head_dim"]
    vectors = [f"att.x_{c}" for c in "rwkvag"] + [f"att.{n}" for n in ("w0", "a0", "k_k", "k_a")]
    ranks = {"w": "decay_rank", "a": "iclr_rank", "g": "gate_rank"}
    if not first:  # layer 0 provides the first value and mixes none in
        vectors.append("att.v0")
        ranks["v"] = "value_rank"
    shapes: Shapes = {"att.r_k": (C // N, N), **dict.fromkeys([*vectors, "ffn.x_k"], (C,))}
    for c, option in ranks.items():
        R = a.options[option]
        shapes |= {f"att.{c}1": (C, R), f"att.{c}2": (R, C)}
    return shapes
