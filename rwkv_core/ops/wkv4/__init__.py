"""WKV-4, the exponential moving average of RWKV-4: public op, its implementations, its step."""

from typing import NamedTuple

import torch
from torch import Tensor

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.ops._common import state_dtype
from rwkv_core.ops.native.library import choose
from rwkv_core.ops.wkv4.native import wkv4_native
from rwkv_core.ops.wkv4.reference import wkv4_reference, wkv4_step
from rwkv_core.ops.wkv4.scan import wkv4_scan

__all__ = ["EMPTY", "IMPLS", "WKV4Output", "WKV4State", "wkv4", "wkv4_step"]

TORCH_FORM = "scan"  # what "auto" is where the native form cannot run
IMPLS = {"reference": wkv4_reference, "scan": wkv4_scan, "native": wkv4_native}

EMPTY = -1e30
"""``max_BD`` before the first token: with 0 instead, small first keys divide 0 by 0."""


class WKV4State(NamedTuple):
    """Two sums per channel and the exponent they are scaled by; each [B, D], fp32.

    They stand for ``num·e^max`` and ``den·e^max``.
    """

    num_BD: Tensor
    den_BD: Tensor
    max_BD: Tensor

    @classmethod
    def empty(cls, like_BD: Tensor) -> "WKV4State":
        """Return the state before the first token, for a tensor of its shape and dtype."""
        zeros = torch.zeros_like(like_BD)
        return cls(zeros, zeros.clone(), torch.full_like(like_BD, EMPTY))


class WKV4Output(NamedTuple):
    """Output [B, T, D] in the dtype of the value, and the state after the last token in fp32."""

    y_BTD: Tensor
    state: WKV4State


def wkv4(
    w_D: Tensor,
    u_D: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    state: WKV4State | None = None,
    *,
    impl: str = "auto",
) -> WKV4Output:
    """Run the RWKV-4 recurrence over a sequence.

    Args:
        w_D: log-decay [D], ≤ 0; RWKV-4 passes -exp(time_decay).
        u_D: bonus of the current token [D], in the exponent.
        k_BTD: key [B, T, D], in the exponent, of any size.
        v_BTD: value [B, T, D].
        state: state before the first token; None is an empty one.
        impl: ``"reference"`` (time loop), ``"scan"`` (log₂ T rounds) or ``"native"`` (C++ on CPU in
            fp32; first derivatives only). ``"auto"`` is native where that is built and takes the
            tensors, else scan.

    Returns:
        ``WKV4Output(y_BTD, state)``. T = 0 returns an empty y and the state unchanged.

    Raises:
        ValueError: a shape that does not fit the others.
        ConfigError: an unknown ``impl``; the nearest one is named.
        NativeError: ``impl="native"`` cannot run here; the reason is named.
    """
    if k_BTD.ndim != 3:
        raise ValueError(f"wkv4: expected keys of rank 3 [B, T, D], got {tuple(k_BTD.shape)}")
    B, _, D = k_BTD.shape
    expected = {"v": (v_BTD, k_BTD.shape), "w": (w_D, (D,)), "u": (u_D, (D,))}
    for name, x in (state._asdict() if state is not None else {}).items():
        expected[f"state {name}"] = (x, (B, D))
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise ValueError(f"wkv4: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    run = IMPLS.get(choose(impl, TORCH_FORM, v_BTD))
    if run is None:
        raise ConfigError(f"wkv4: unknown impl {impl!r}; {did_you_mean(impl, ['auto', *IMPLS])}")
    dtype = state_dtype(v_BTD)
    if state is None:
        state = WKV4State.empty(v_BTD.new_zeros(B, D, dtype=dtype))
    w, u, k, v, num, den, top = (x.to(dtype) for x in (w_D, u_D, k_BTD, v_BTD, *state))
    with torch.autocast(v_BTD.device.type, enabled=False):
        y_BTD, after = run(w, u, k, v, (num, den, top))
    return WKV4Output(y_BTD.to(v_BTD.dtype), WKV4State(*after))
