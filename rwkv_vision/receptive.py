"""The effective receptive field: which pixels one place of the last layer looks at."""

from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rwkv_core.errors import RWKVError
from rwkv_vision.config import ClassifyConfig
from rwkv_vision.data import batches
from rwkv_vision.model import Classifier

__all__ = ["fields_of", "receptive_field"]

N_BATCHES = 4


def fields_of(model: Classifier, config: ClassifyConfig, split: str) -> dict[str, np.ndarray]:
    """Return the fields [H, W] of a new network like the model's, and of the model's own.

    Over the first pictures of a part of the data. Empty for a network without
    ``forward_intermediates``.
    """
    if not hasattr(model.deployed, "forward_intermediates"):
        return {}
    first = islice(batches(config, split), N_BATCHES)
    device = next(model.parameters()).device
    images_BCHW = torch.cat([batch.images_BCHW for batch in first]).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        new = Classifier(model.config).to(device)
    return {
        "before training": receptive_field(new.net, images_BCHW),
        "after training": receptive_field(model.deployed, images_BCHW),
    }


def receptive_field(net: Any, images_BCHW: Tensor) -> np.ndarray:
    """Return how much each pixel moves the features in the middle [H, W], at most 1.

    That is the gradient of the last block's features at the middle place, summed over channels,
    with respect to the pixels: its size, averaged over channels and pictures. Source: arXiv
    1701.04128.

    Args:
        net: model of timm's registry with ``forward_intermediates``; put into evaluation mode.
        images_BCHW: normalised pictures.

    Raises:
        RWKVError: a model without intermediate features.
    """
    if not hasattr(net, "forward_intermediates"):
        raise RWKVError(
            f"{type(net).__name__} gives no intermediate features, so that no place of its last "
            "layer can be asked what it looks at; most models of timm have forward_intermediates"
        )
    was_training = net.training
    net.eval()
    with torch.enable_grad():
        x_BCHW = images_BCHW.detach().requires_grad_()
        (y_BCHW,) = net.forward_intermediates(x_BCHW, indices=1, intermediates_only=True)
        rows, columns = y_BCHW.shape[2:]
        # of all channels' sum a last LayerNorm would leave nothing; the block is before it
        middle = y_BCHW[:, :, rows // 2, columns // 2].sum()
        (slope_BCHW,) = torch.autograd.grad(middle, x_BCHW)
    net.train(was_training)
    field_HW = slope_BCHW.abs().mean((0, 1))
    return (field_HW / field_HW.max().clamp(min=torch.finfo(field_HW.dtype).tiny)).numpy(force=True)
