"""How the ops around the recurrences choose between plain operations and one pass in C++."""

import torch
from torch import Tensor

from rwkv_core.errors import ConfigError, NativeError, did_you_mean
from rwkv_core.ops._common import is_traced
from rwkv_core.ops.native.library import choose, loaded

BLOCK = 64  # tokens whose parameter gradients are summed together, as in native/src/token_mix.h
MIXES = 6  # mixtures of one call, at most, as there


def is_native(op: str, impl: str, *tensors: Tensor) -> bool:
    """Tell whether ``impl``, "plain", "native" or "auto", means the native form for these tensors.

    "auto" is native where the library is built, if all tensors are fp32 and on CPU and nothing but
    autograd is looking.

    Raises:
        ConfigError: an unknown ``impl``.
        NativeError: "native", and there is no library or a tensor it cannot take.
    """
    if impl not in ("plain", "native", "auto"):
        names = ["auto", "plain", "native"]
        raise ConfigError(f"{op}: unknown impl {impl!r}; {did_you_mean(impl, names)}")
    fits = all(x.dtype is torch.float32 and x.is_cpu for x in tensors)
    if impl == "native":
        loaded()
        if not fits:
            kinds = ", ".join(
                sorted({f"{x.dtype} on {x.device}".removeprefix("torch.") for x in tensors})
            )
            raise NativeError(f"{op}: impl='native' takes float32 on cpu, got {kinds}")
    elif impl == "auto":
        fits = fits and choose("auto", "plain", tensors[0]) == "native" and not is_traced(*tensors)
    return impl != "plain" and fits and tensors[0].numel() > 0
