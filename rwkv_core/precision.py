r"""A model in 16 bit, for inference: which tensors stay in fp32, and a stream that fits in fp16.

In fp32 stay the recurrent state, the norms' statistics, the unit keys of generation 7, and every
parameter that a mixer names ``full_precision``: those that become a decay, which sits so close to 1
that half precision cannot tell it from 1, and the bonus. All else is rounded once.

The residual stream of generations 4 to 6 grows beyond 65,504, the largest number of fp16, in deep
models. Their blocks read it through a LayerNorm, which does not see its scale; so embeddings and
everything added to them are scaled by 2^-⌊depth/6⌋, and the norms' eps by its square. A power of
two costs no digit: in fp32 the scaled model computes the same bits. (The official inference code
halves the stream after every sixth layer instead: BlinkDL/ChatRWKV, RWKV_RESCALE_LAYER.)
"""

import copy
from typing import TypeVar

import torch
from torch import nn

from rwkv_core.backbone import Backbone
from rwkv_core.errors import ConfigError
from rwkv_core.mixers.base import Mixer

__all__ = ["cast", "scale_stream"]

LAYERS_PER_HALVING = 6

Model = TypeVar("Model", bound=nn.Module)


def cast(model: Model, dtype: torch.dtype) -> Model:
    """Return a copy of a model for inference in fp16, bf16 or fp32; the model itself is untouched.

    Args:
        model: any model of the toolkit.
        dtype: ``torch.float16``, ``torch.bfloat16`` or ``torch.float32``.

    Raises:
        ConfigError: another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ConfigError(f"cannot cast a model to {dtype}: expected float16, bfloat16 or float32")
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype == torch.float16:
        for trunk in (m for m in model.modules() if isinstance(m, Backbone)):
            scale_stream(trunk, len(trunk.blocks) // LAYERS_PER_HALVING)
    for module in model.modules():
        kept = module.full_precision if isinstance(module, Mixer) else frozenset()
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_floating_point():
                value = parameter.to(torch.float32 if name in kept else dtype)
                # in 16 bit a matrix by columns is slow, see mixers/base.py
                parameter.data = value if value.dtype == torch.float32 else value.contiguous()
    return model


@torch.no_grad()
def scale_stream(trunk: Backbone, halvings: int) -> None:
    """Halve a trunk's residual stream so many times, in place, where its mixers allow it."""
    mixers = [m for m in trunk.modules() if isinstance(m, Mixer)]
    if not halvings or not all(m.fp16_scaled for m in mixers):
        return
    scale = 0.5**halvings
    trunk.ln_in.weight.mul_(scale)
    trunk.ln_in.bias.mul_(scale)
    for mixer in mixers:
        for name in mixer.fp16_scaled:
            mixer.get_parameter(f"{name}.weight").mul_(scale)
    for norm in (m for m in trunk.modules() if isinstance(m, nn.LayerNorm)):
        if norm is not trunk.ln_in:
            norm.eps *= scale**2
