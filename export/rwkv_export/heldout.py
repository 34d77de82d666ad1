"""Held-out data of a model's own domain, in the form that the gate of quantisation takes."""

import dataclasses
from typing import Any

import numpy as np
from torch import nn

from rwkv_core.checkpoint import adapter_of
from rwkv_core.errors import ExportError

__all__ = ["held_out"]

ROWS, LENGTH, PICTURES = 8, 256, 256


def held_out(model: nn.Module, data: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """Return up to 8 rows of 256 tokens, or up to 256 pictures and their classes.

    Args:
        model: made by a registered domain.
        data: a file or folder instead of the data that the model was trained with.

    Raises:
        ExportError: the domain's batches hold neither tokens nor images, or too few tokens.
    """
    _, adapter = adapter_of(model)
    config: Any = model.config
    if data is not None:
        config = dataclasses.replace(config, data=data)
    tokens, images, targets = [], [], []
    for batch in adapter.data(config, "eval"):
        if hasattr(batch, "tokens_BT"):
            tokens.append(batch.tokens_BT.numpy().reshape(-1))
        elif hasattr(batch, "images_BCHW"):
            images.append(batch.images_BCHW.numpy())
            targets.append(batch.targets.numpy())
        else:
            raise ExportError(
                f"{type(batch).__name__} holds neither tokens nor images; call "
                "rwkv_export.compress with data of your own"
            )
        if sum(map(len, tokens)) >= ROWS * LENGTH or sum(map(len, images)) >= PICTURES:
            break
    if images:
        return np.concatenate(images)[:PICTURES], np.concatenate(targets)[:PICTURES]
    flat = np.concatenate(tokens) if tokens else np.empty(0, np.int64)
    length = min(LENGTH, len(flat) // 2)  # two rows: one to round by, one to judge by
    if length < 2:
        raise ExportError(f"too little held-out text to measure quality: {len(flat)} tokens")
    rows = min(ROWS, len(flat) // length)
    return flat[: rows * length].reshape(rows, length).astype(np.int64), None
