"""What every recurrence shares: the result, the state's dtype, the shape check."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class WKVOutput(NamedTuple):
    """Result of a causal op, the same for every implementation.

    ``y_BTHV`` [B, T, H, V] is in the dtype of the value; ``state_BHKV`` [B, H, K, V] in fp32.
    """

    y_BTHV: Tensor
    state_BHKV: Tensor


def state_dtype(x: Tensor) -> torch.dtype:
    """Return fp64 for fp64 inputs, else fp32: a state in half precision forgets."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_shapes(op: str, first: Tensor, others: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Return the shape [B, T, H, K] of ``first``; raise ValueError for an input that differs."""
    if first.ndim != 4:
        raise ValueError(f"{op}: expected inputs of rank 4 [B, T, H, K], got {tuple(first.shape)}")
    for name, x in others.items():
        if x.shape != first.shape:
            raise ValueError(
                f"{op}: {name} has shape {tuple(x.shape)}, expected {tuple(first.shape)}"
            )
    return tuple(first.shape)


def check_state(op: str, state_BHKV: Tensor | None, key_dim: int, v_BTHV: Tensor) -> Tensor:
    """Return the state before the first token, zeros for None; raise ValueError if it misfits."""
    B, _, H, V = v_BTHV.shape
    shape = (B, H, key_dim, V)
    if state_BHKV is None:
        return v_BTHV.new_zeros(shape, dtype=state_dtype(v_BTHV))
    if state_BHKV.shape != shape:
        raise ValueError(
            f"{op}: state has shape {tuple(state_BHKV.shape)}, expected {shape} [B, H, K, V]"
        )
    return state_BHKV
