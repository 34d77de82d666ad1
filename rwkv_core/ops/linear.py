"""A linear map, ``y = W x``, which for one token reads its weights as fast as memory gives them.

Decoding reads every weight once per token, so that nothing counts but the rate of reading. The
native form (``native/src/gemv.h``) takes one token on the CPU, in fp32 or bf16, where no gradient
will be asked for; all else is ``F.linear``. It is called by its address, not as an operator of
torch, which would cost as much as a small matrix.
"""

import ctypes
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from rwkv_core.ops._common import is_traced
from rwkv_core.ops.native.library import Library, available, loaded

__all__ = ["linear", "product"]

BY_ROWS, BY_COLUMNS = 0, 1  # how a matrix lies in memory, as in gemv.h
FORMATS = {torch.float32: 0, torch.bfloat16: 2}


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.mT``: x [..., in], weight [out, in] → [..., out].

    A weight may lie in memory by rows or, like the ``mT`` of a tensor [in, out], by columns. Of the
    latter the native form does not read the columns whose x is 0: an infinite weight among them
    does not become NaN.
    """
    if type(x) is not Tensor or is_watched():
        return F.linear(x, weight)
    form = _form(x, weight)
    if form is None:
        if _is_slow(x, weight):
            return F.linear(x.float(), weight.float()).to(x.dtype)
        return F.linear(x, weight)
    rows, columns = weight.shape
    library = loaded()
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], rows)
    addresses = (weight.data_ptr(), x.data_ptr(), y.data_ptr())
    if _gemv(library)(library._parallel, form, rows, columns, *addresses):
        raise MemoryError("native linear: no memory for the workspace")
    return y


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """Return ``x @ matrix``: x [..., in], matrix [in, out] → [..., out]."""
    if type(x) is Tensor and not is_watched() and _is_slow(x, matrix):
        return (x.float() @ matrix.float()).to(x.dtype)
    return x @ matrix


def _is_slow(x: Tensor, weight: Tensor) -> bool:
    """Tell whether torch would multiply bf16 one number at a time, several times as slowly as fp32.

    It does without AVX-512 and the like; a weight is widened in far less time than it is used.
    """
    return x.dtype == weight.dtype == torch.bfloat16 and weight.is_cpu and not _has_bf16_kernels()


@functools.lru_cache(maxsize=1)
def _has_bf16_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _form(x: Tensor, weight: Tensor) -> int | None:
    """Return how the native form reads the weight, or None if it does not take these tensors."""
    columns = weight.shape[1]
    if x.numel() != columns or x.shape[-1] != columns:
        return None
    dtype = FORMATS.get(x.dtype)
    if dtype is None or weight.dtype != x.dtype or not (x.is_cpu and weight.is_cpu):
        return None
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return None
    if type(weight) not in (Parameter, Tensor) or not available():
        return None
    order = memory_order(weight)
    return None if order is None else order + dtype


def memory_order(weight: Tensor) -> int | None:
    """Return BY_ROWS or BY_COLUMNS of a matrix, or None if it lies in memory in another way."""
    rows, columns = weight.shape
    strides = weight.stride()
    if strides == (columns, 1):
        return BY_ROWS
    return BY_COLUMNS if strides == (1, rows) else None


def is_watched() -> bool:
    """Tell whether a mode of torch would have to see an operation or to change it."""
    return bool(
        is_traced()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
    )


@functools.lru_cache(maxsize=8)
def _gemv(library: Library) -> Any:
    function = ctypes.CDLL(str(library.path))[f"gemv_{library.isa}"]
    address, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = (address, size, size, size, address, address, address)
    return function
