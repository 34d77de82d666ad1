"""WKV-7, the generalised delta rule of RWKV-7: public op, its implementations, its single step."""

from collections.abc import Callable

import torch
from torch import Tensor

from rwkv_core.errors import ConfigError, did_you_mean
from rwkv_core.ops._common import WKVOutput, check_shapes, check_state, is_traced, state_dtype
from rwkv_core.ops.native.library import choose
from rwkv_core.ops.wkv7.chunked import WKV7Chunked, wkv7_chunked
from rwkv_core.ops.wkv7.native import wkv7_native
from rwkv_core.ops.wkv7.reference import wkv7_reference, wkv7_step

__all__ = ["IMPLS", "wkv7", "wkv7_step"]

TORCH_FORM = "chunked"  # what "auto" is where the native form cannot run


def _chunked(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Choose between the adjoint and plain operations, outside whatever is traced."""
    if is_traced(*inputs) or inputs[0].shape[1] == 0:
        return wkv7_chunked(*inputs)
    if not torch.is_grad_enabled():
        inputs = tuple(x.detach() for x in inputs)  # nothing is kept for those
    return WKV7Chunked.apply(*inputs)


IMPLS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "reference": wkv7_reference,
    "chunked": _chunked,
    "native": wkv7_native,
}


def wkv7(
    r_BTHK: Tensor,
    w_BTHK: Tensor,
    k_BTHK: Tensor,
    v_BTHV: Tensor,
    a_BTHK: Tensor,
    b_BTHK: Tensor,
    state_BHKV: Tensor | None = None,
    *,
    impl: str = "auto",
) -> WKVOutput:
    """Run the RWKV-7 recurrence over a sequence.

    Args:
        r_BTHK: receptance [B, T, H, K]: what is read from the state.
        w_BTHK: log-decay [B, T, H, K], ≤ 0.
        k_BTHK: key [B, T, H, K]: where the value is written.
        v_BTHV: value [B, T, H, V].
        a_BTHK: removal key [B, T, H, K]; RWKV-7 passes −κ̂.
        b_BTHK: replacement key [B, T, H, K]; RWKV-7 passes κ̂ ⊙ in-context learning rate.
        state_BHKV: state before the first token [B, H, K, V]; zeros if None.
        impl: ``"reference"`` (time loop), ``"chunked"`` (matrix products; needs |w| ≤ 5) or
            ``"native"`` (C++ on CPU in fp32, any w; first derivatives only). ``"auto"`` is native
            where that is built and takes the tensors, else chunked. Chunked uses its own adjoint in
            eager code, derivatives of any order; what is compiled, exported or transformed by
            ``torch.func`` holds the plain operations.

    Returns:
        ``WKVOutput(y_BTHV, state_BHKV)``: y in the dtype of ``v``, the state in fp32 (fp64 for fp64
        inputs). T = 0 returns an empty y and the state unchanged.

    Raises:
        ValueError: a shape that does not fit the others.
        ConfigError: an unknown ``impl``; the nearest one is named.
        NativeError: ``impl="native"`` cannot run here; the reason is named.
    """
    *_, K = check_shapes("wkv7", r_BTHK, {"w": w_BTHK, "k": k_BTHK, "a": a_BTHK, "b": b_BTHK})
    check_shapes("wkv7", r_BTHK[..., :1], {"v": v_BTHV[..., :1]})
    state_BHKV = check_state("wkv7", state_BHKV, K, v_BTHV)
    run = IMPLS.get(choose(impl, TORCH_FORM, v_BTHV))
    if run is None:
        raise ConfigError(f"wkv7: unknown impl {impl!r}; {did_you_mean(impl, ['auto', *IMPLS])}")
    dtype = state_dtype(v_BTHV)
    inputs = (r_BTHK, w_BTHK, k_BTHK, v_BTHV, a_BTHK, b_BTHK, state_BHKV)
    with torch.autocast(v_BTHV.device.type, enabled=False):
        y_BTHV, state_BHKV = run(*(x.to(dtype) for x in inputs))
    return WKVOutput(y_BTHV.to(v_BTHV.dtype), state_BHKV)
