"""What every recurrence shares: the result, the state's dtype, the shape check."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad


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


def learns(*tensors: Tensor) -> bool:
    """Tell whether autograd records what is done with these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def is_traced(*inputs: Tensor) -> bool:
    """Tell whether anything but autograd looks at the operations on these tensors.

    Compilers, tracers, exporters, ``torch.func`` and forward-mode differentiation then get plain
    operations; eager code may get an adjoint of our own.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


def differentiable_again(
    plain: Callable[..., Any],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate the ``backward`` of an adjoint of our own, which itself is not differentiated.

    Where its result will be (``create_graph=True``), the gradients are those that autograd finds
    for ``plain``, the same function in plain operations. The inputs are the first saved tensors.
    Autocast, which may be on where ``backward()`` is called, does not reach either.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> Any:
            with torch.autocast(grads[0].device.type, enabled=False):
                if not torch.is_grad_enabled():
                    return backward(ctx, *grads)
                needs = ctx.needs_input_grad
                inputs = ctx.saved_tensors[: len(needs)]
                found = torch.autograd.grad(
                    plain(*inputs),
                    [x for x, is_needed in zip(inputs, needs, strict=True) if is_needed],
                    grads,
                    create_graph=True,
                    allow_unused=True,
                )
                rest = iter(found)
                return tuple(next(rest) if is_needed else None for is_needed in needs)

        return run

    return decorate
