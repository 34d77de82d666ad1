"""Bidirectional WKV over rows and columns of an image: public op and its implementations."""

import torch
from torch import Tensor

from rwkv_core.ops._common import state_dtype
from rwkv_core.ops.bi_wkv_2d.prefix import bi_wkv_2d_prefix
from rwkv_core.ops.bi_wkv_2d.reference import bi_wkv_2d_reference

__all__ = ["IMPLS", "bi_wkv_2d"]


def bi_wkv_2d(
    w_x_C: Tensor,
    w_y_C: Tensor,
    u_C: Tensor,
    k_BHWC: Tensor,
    v_BHWC: Tensor,
    *,
    impl: str = "auto",
) -> Tensor:
    """Return, for every patch, the mean of all patches' values, weighted by key and distance.

    Patch q weighs e^{-(|Δx|·w_x/W + |Δy|·w_y/H) + k_q} for patch p, and e^{u/(H·W) + k_p} for
    itself. As in :func:`rwkv_core.ops.bi_wkv` the op divides by the sizes, so that one parameter
    serves every image size; a positive decay forgets distant patches, a negative one prefers them.
    Unlike there, what counts is the distance in the plane: transposing the image and exchanging the
    decays transposes the result.

    Args:
        w_x_C: decay over the whole width [C].
        w_y_C: decay over the whole height [C].
        u_C: bonus of the patch itself, times H·W [C].
        k_BHWC: key [B, H, W, C]: the log of a patch's weight.
        v_BHWC: value [B, H, W, C].
        impl: ``"reference"`` (every patch with every other, any decay) or ``"prefix"`` (cumulative
            sums along each axis; needs |w_x| + |w_y| and |u| ≤ ``MAX_DECAY`` of
            :mod:`rwkv_core.ops.bi_wkv`). ``"auto"`` is prefix.

    Returns:
        y [B, H, W, C] in the dtype of ``v``; computed in fp32 (fp64 for fp64 values), autocast off.

    Raises:
        ValueError: a shape that does not fit the others, an image without patches, or an unknown
            ``impl``.
    """
    run = IMPLS.get("prefix" if impl == "auto" else impl)
    if run is None:
        raise ValueError(
            f"bi_wkv_2d: unknown impl {impl!r}; expected 'auto' or one of {sorted(IMPLS)}"
        )
    if k_BHWC.ndim != 4 or 0 in k_BHWC.shape[1:3]:
        raise ValueError(
            f"bi_wkv_2d: expected k of shape [B, H, W, C] with H, W ≥ 1, got {tuple(k_BHWC.shape)}"
        )
    if v_BHWC.shape != k_BHWC.shape:
        raise ValueError(
            f"bi_wkv_2d: v has shape {tuple(v_BHWC.shape)}, expected {tuple(k_BHWC.shape)}"
        )
    for name, x in (("w_x", w_x_C), ("w_y", w_y_C), ("u", u_C)):
        if x.shape != k_BHWC.shape[-1:]:
            raise ValueError(
                f"bi_wkv_2d: {name} has shape {tuple(x.shape)}, expected {tuple(k_BHWC.shape[-1:])}"
            )
    dtype = state_dtype(v_BHWC)
    with torch.autocast(v_BHWC.device.type, enabled=False):
        y_BHWC = run(*(x.to(dtype) for x in (w_x_C, w_y_C, u_C, k_BHWC, v_BHWC)))
    return y_BHWC.to(v_BHWC.dtype)


IMPLS = {"reference": bi_wkv_2d_reference, "prefix": bi_wkv_2d_prefix}
