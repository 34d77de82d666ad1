"""Bidirectional WKV of Vision-RWKV: public op, its implementations, the range of its decay."""

import torch
from torch import Tensor

from rwkv_core.errors import RWKVError
from rwkv_core.ops._common import is_traced, state_dtype
from rwkv_core.ops.bi_wkv.native import bi_wkv_native
from rwkv_core.ops.bi_wkv.prefix import MAX_DECAY, BiWKVPrefix, bi_wkv_prefix
from rwkv_core.ops.bi_wkv.reference import bi_wkv_reference
from rwkv_core.ops.native.library import choose

__all__ = ["IMPLS", "MAX_DECAY", "bi_wkv", "check_decay"]


def bi_wkv(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor, *, impl: str = "auto") -> Tensor:
    """Return, for every token, the weighted mean of all tokens' values, each way through time.

    Token i weighs e^{-(|t-i|-1)·w/T + k_i} for token t, and e^{u/T + k_t} for itself. Unlike the
    decay of the causal ops, ``w`` is scaled by the length: the op divides it, and ``u``, by T, so
    that one parameter serves every image size. It is no log-decay either: positive forgets distant
    tokens, negative prefers them.

    Args:
        w_C: decay over the whole sequence [C].
        u_C: bonus of the token itself, times T [C].
        k_BTC: key [B, T, C]: the log of a token's weight.
        v_BTC: value [B, T, C].
        impl: ``"reference"`` (time loop, any decay), ``"prefix"`` (two cumulative sums; needs
            |w|, |u| ≤ ``MAX_DECAY``, see :func:`check_decay`) or ``"native"`` (C++ on CPU in fp32,
            any decay; first derivatives only). ``"auto"`` is native where that is built and takes
            the tensors, else prefix.

    Returns:
        y [B, T, C] in the dtype of ``v``; computed in fp32 (fp64 for fp64 values), autocast off.
        Prefix uses its own adjoint where autograd records eager code on CPU or CUDA, derivatives of
        any order; what is compiled, exported or transformed by ``torch.func`` holds the plain
        operations.

    Raises:
        ValueError: a shape that does not fit the others, T = 0, or an unknown ``impl``.
        NativeError: ``impl="native"`` cannot run here; the reason is named.
    """
    run = IMPLS.get(choose(impl, TORCH_FORM, v_BTC))
    if run is None:
        raise ValueError(
            f"bi_wkv: unknown impl {impl!r}; expected 'auto' or one of {sorted(IMPLS)}"
        )
    if k_BTC.ndim != 3 or k_BTC.shape[1] == 0:
        raise ValueError(
            f"bi_wkv: expected k of shape [B, T, C] with T ≥ 1, got {tuple(k_BTC.shape)}"
        )
    if v_BTC.shape != k_BTC.shape:
        raise ValueError(f"bi_wkv: v has shape {tuple(v_BTC.shape)}, expected {tuple(k_BTC.shape)}")
    for name, x in (("w", w_C), ("u", u_C)):
        if x.shape != k_BTC.shape[-1:]:
            raise ValueError(
                f"bi_wkv: {name} has shape {tuple(x.shape)}, expected {tuple(k_BTC.shape[-1:])}"
            )
    dtype = state_dtype(v_BTC)
    with torch.autocast(v_BTC.device.type, enabled=False):
        y_BTC = run(*(x.to(dtype) for x in (w_C, u_C, k_BTC, v_BTC)))
    return y_BTC.to(v_BTC.dtype)


def check_decay(w_C: Tensor, u_C: Tensor, *, layer: str, error: type[RWKVError]) -> None:
    """Raise ``error`` naming the layer if a decay or bonus is beyond what prefix sums hold.

    For loading, training and exporting, where values may be looked at; the op itself cannot. NaN is
    beyond, too.
    """
    for what, x in (("decay", w_C), ("bonus", u_C)):
        largest = x.detach().abs().amax().item()
        if not largest <= MAX_DECAY:
            raise error(
                f"{layer}: |{what}| reaches {largest:g}; prefix sums are exact to {MAX_DECAY:g}. "
                "Lower the learning rate if training drove it there, or build the layer with "
                "impl='reference', which has no limit"
            )


def _prefix(w_C: Tensor, u_C: Tensor, k_BTC: Tensor, v_BTC: Tensor) -> Tensor:
    """Choose between the adjoint and plain autograd, outside whatever is traced."""
    inputs = (w_C, u_C, k_BTC, v_BTC)
    if is_traced(*inputs) or not torch.is_grad_enabled() or k_BTC.device.type not in HAVE_FP64:
        return bi_wkv_prefix(*inputs)
    return BiWKVPrefix.apply(*inputs)


HAVE_FP64 = ("cpu", "cuda")  # devices
TORCH_FORM = "prefix"  # what "auto" is where the native form cannot run
IMPLS = {"reference": bi_wkv_reference, "prefix": _prefix, "native": bi_wkv_native}
