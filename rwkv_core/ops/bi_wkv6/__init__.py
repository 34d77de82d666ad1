"""Bidirectional WKV-6 of VRWKV6: public op and its implementations."""

import torch
from torch import Tensor

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.ops._common import check_shapes, is_traced, state_dtype
from rwkv_core.ops.bi_wkv6.chunked import BiWKV6Chunked, bi_wkv6_chunked
from rwkv_core.ops.bi_wkv6.native import bi_wkv6_native
from rwkv_core.ops.bi_wkv6.reference import bi_wkv6_reference
from rwkv_core.ops.bi_wkv6.scan import bi_wkv6_scan
from rwkv_core.ops.native.library import choose

__all__ = ["IMPLS", "bi_wkv6"]


def bi_wkv6(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    u_HK: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Run the RWKV-6 recurrence both ways through time over shared keys, values and decays.

    Args:
        r_BTHK: receptance [B, T, H, K]: what is read from the states.
        w_BTHK: log-decay [B, T, H, K], ≤ 0, of any size; that of the tokens strictly between two.
        k_BTHK: key [B, T, H, K]: where the value is written.
        v_BTHV: value [B, T, H, V].
        u_HK: bonus of the token itself [H, K], which counts once.
        impl: ``"reference"`` (time loop), ``"chunked"`` (matrix products), ``"native"`` (C++ on CPU
            in fp32; first derivatives only) or ``"scan"`` (a loop that stays one in a graph; no
            derivatives). ``"auto"`` is scan in what is exported, native where that is built and
            takes the tensors, else chunked.

    Returns:
        y [B, T, H, V] in the dtype of ``v``; computed in fp32 (fp64 for fp64 values), autocast off.
        Chunked uses its own adjoint where autograd records eager code; what is compiled holds the
        plain operations, differentiable by themselves.

    Raises:
        ValueError: a shape that does not fit the others.
        ConfigError: an unknown ``impl``; the nearest one is named.
        NativeError: ``impl="native"`` cannot run here; the reason is named.
    """
    _, T, H, K = check_shapes("bi_wkv6", r_BTHK, {"w": w_BTHK, "k": k_BTHK})
    check_shapes("bi_wkv6", r_BTHK[..., :1], {"v": v_BTHV[..., :1]})
    if u_HK.shape != (H, K):
        raise ValueError(f"bi_wkv6: u has shape {tuple(u_HK.shape)}, expected {(H, K)} [H, K]")
    if impl == "auto" and torch.compiler.is_exporting():
        impl = "scan"
    run = IMPLS.get(choose(impl, TORCH_FORM, v_BTHV))
    if run is None:
        raise ConfigError(f"bi_wkv6: unknown impl {impl!r}; {did_you_mean(impl, ['auto', *IMPLS])}")
    if T == 0:
        return v_BTHV
    dtype = state_dtype(v_BTHV)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        y_BTHV = run(*(x.to(dtype) for x in (r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK)))
    return y_BTHV.to(v_BTHV.dtype)


def _chunked(
    r_BTHK: Tensor, w_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, u_HK: Tensor
) -> Tensor:
    """Choose between the adjoint and plain autograd, outside whatever is traced."""
    inputs = (r_BTHK, w_BTHK, k_BTHK, v_BTHV, u_HK)
    if is_traced(*inputs) or not torch.is_grad_enabled():
        return bi_wkv6_chunked(*inputs)
    return BiWKV6Chunked.apply(*inputs)


TORCH_FORM = "chunked"  # what "auto" is where the native form cannot run
IMPLS = {
    "reference": bi_wkv6_reference,
    "chunked": _chunked,
    "native": bi_wkv6_native,
    "scan": bi_wkv6_scan,
}
