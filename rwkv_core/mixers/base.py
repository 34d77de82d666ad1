"""The contract every mixer keeps, and the small pieces that several generations share."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.ops.head_norm import head_norm
from rwkv_core.ops.linear import linear

__all__ = [
    "Generation", "HeadNorm", "LayerState", "Linear", "MatrixState", "Mixer", "ParamGroup",
    "Shared",
]  # fmt: skip

LayerState = Any  # a NamedTuple of tensors, declared in the mixer's own file


class Shared(NamedTuple):
    """What crosses layers within one forward pass and belongs to the token, not to the state."""

    tokens: Tensor | None = None  # token ids, for mixers indexed by token
    v_first: Tensor | None = None  # RWKV-7: the value of the first layer


class MatrixState(NamedTuple):
    """What a layer of generations 5, 6 and 7 remembers.

    Two last tokens in the dtype of the activations, and one matrix per head in fp32.
    """

    att_shift_BD: Tensor
    wkv_BHKV: Tensor
    ffn_shift_BD: Tensor

    @classmethod
    def zeros(cls, batch: int, dim: int, head_dim: int, *, device: Any, dtype: Any) -> MatrixState:
        """Return the state before the first token; ``dtype`` is that of the activations."""
        new = functools.partial(torch.zeros, device=device)
        wkv_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        return cls(
            new(batch, dim, dtype=dtype),
            new(batch, dim // head_dim, head_dim, head_dim, dtype=wkv_dtype),
            new(batch, dim, dtype=dtype),
        )

    def tuned(self, start_HKV: Tensor) -> MatrixState:
        """Return the same shifts with the given matrices in every row of the batch."""
        start_BHKV = start_HKV.expand_as(self.wkv_BHKV)
        return self._replace(wkv_BHKV=start_BHKV.to(self.wkv_BHKV.dtype))

    def mix(self, other: MatrixState, weight: float) -> MatrixState:
        """Return ``(1 - weight)·self + weight·other``: the recurrence is linear in its state."""
        return MatrixState(*(torch.lerp(a, b, weight) for a, b in zip(self, other, strict=True)))


class ParamGroup(NamedTuple):
    """Parameters of one module that train alike: names, learning-rate factor, weight decay."""

    names: tuple[str, ...]
    lr_scale: float
    weight_decay: bool


class Mixer(nn.Module):
    """One half of a block: a map over tokens that carries a state and its own training recipe.

    A mixer implements ``forward(x_BTD, state, shared) -> (y_BTD, state, shared)``, ``step`` (the
    same for one token of each sequence, in plain operations that export) and ``reset_parameters``.
    A time mixer also owns ``init_state``. Parameters bear the names of the official files; what is
    particular about some of them stands in class attributes:

        lr_scales         name → factor of the learning rate
        official_rows     vectors [D] that official files hold as [1, 1, D]
        full_precision    parameters that stay in fp32 when a model is cast to 16 bit
        fp16_scaled       weights that feed the residual stream of a generation whose stream
                          outgrows fp16, and shrink with it; none where it does not

    A step works time first: its token is [1, B, D], and its state tensors [1, B, ...] are one row
    of the states of all layers [L, B, ...]. So nothing is squeezed or stacked on the way, which is
    a fifth of the nodes of an exported graph.
    """

    causal: ClassVar[bool] = True
    exportable: ClassVar[bool] = True
    lr_scales: ClassVar[Mapping[str, float]] = {}
    official_rows: ClassVar[frozenset[str]] = frozenset()
    full_precision: ClassVar[frozenset[str]] = frozenset()
    fp16_scaled: ClassVar[tuple[str, ...]] = ()
    state_type: ClassVar[Any] = tuple

    def init_state(self, batch: int, *, device: Any = None, dtype: Any = torch.float32) -> Any:
        """Return one layer's state before the first token; a time mixer's to implement."""
        raise NotImplementedError

    def step(self, x_1BD: Tensor, state: Any, shared: Shared) -> tuple[Tensor, Any, Shared]:
        """Mix one token of each sequence, time first [1, B, D]; so are the state's tensors."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise every parameter; the docstring is a table parameter → law."""
        raise NotImplementedError

    def param_groups(self) -> list[ParamGroup]:
        """Return the optimiser groups of this mixer's own parameters.

        Weight decay falls on matrices of linear maps alone (``*.weight`` of rank 2): not on norms,
        interpolation vectors or low-rank factors, where it makes RWKV clearly worse. Source:
        BlinkDL/RWKV-LM, RWKV-v7/train_temp/src/model.py, configure_optimizers.
        """
        groups: dict[tuple[float, bool], list[str]] = {}
        for name, p in self.named_parameters():
            decays = p.ndim >= 2 and name.endswith(".weight")
            groups.setdefault((self.lr_scales.get(name, 1.0), decays), []).append(name)
        return [ParamGroup(tuple(names), *key) for key, names in groups.items()]


class Generation(NamedTuple):
    """What the mixer registry holds: the two halves of a block of one RWKV generation."""

    time_mix: type[Mixer]
    channel_mix: type[Mixer]

    def options(self) -> set[str]:
        """Return the names of the options that this generation's mixers take."""
        both = _parameters(self.time_mix) | _parameters(self.channel_mix)
        return both - {"dim", "layer", "depth"}

    def build(
        self, dim: int, *, layer: int, depth: int, options: Mapping[str, Any]
    ) -> tuple[Mixer, Mixer]:
        """Return the two mixers of one layer, each given the options its signature names.

        Raises:
            ConfigError: an option that neither mixer takes (the nearest ones are named), or a value
                that does not fit.
        """
        known = self.options()
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown mixer option {name!r}; {did_you_mean(name, known)}")
        own = [{n: v for n, v in options.items() if n in _parameters(cls)} for cls in self]
        try:
            return (
                self.time_mix(dim, layer=layer, depth=depth, **own[0]),
                self.channel_mix(dim, layer=layer, depth=depth, **own[1]),
            )
        except TypeError as error:
            raise ConfigError(f"mixer options {dict(options)} do not fit: {error}") from error


def _parameters(cls: type[Mixer]) -> set[str]:
    return set(inspect.signature(cls).parameters)


class Linear(nn.Linear):
    """``nn.Linear`` without a bias, whose product with one token is that of ``ops/linear.py``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(x, self.weight)

    def lay_by_columns(self) -> None:
        """Keep the weight by columns in memory, for inference; its shape and values stay.

        Of one token the product then reads only the columns whose input is not zero, which after a
        squared ReLU are half of them or fewer. FSDP takes no such weight.
        """
        self.weight.data = self.weight.mT.contiguous().mT


class HeadNorm(nn.Module):
    """Normalise each head on its own, then scale and shift per channel (GroupNorm over heads).

    The official eps 64e-5 is no part of any checkpoint: it is the GroupNorm eps 1e-5 of a trainer
    that first divides by 8.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, y_H1V: Tensor) -> Tensor:
        """Map rows [..., H, 1, V] to normalised rows."""
        return head_norm(y_H1V, self.weight, self.bias, self.eps)


def check_heads(dim: int, head_dim: int) -> None:
    """Raise ConfigError if heads of this size do not fill the width."""
    if head_dim < 1 or dim % head_dim:
        raise ConfigError(f"dim {dim} is not a multiple of head_dim {head_dim}")


def lora_rank(dim: int, factor: float) -> int:
    """Return the official rank rule: factor·√dim to the nearest multiple of 32, at least 32."""
    return max(32, round(factor * math.sqrt(dim) / 32) * 32)
