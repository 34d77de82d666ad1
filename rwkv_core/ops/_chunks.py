"""What the chunked forms share: how a sequence is cut, and how it is put together again.

Shapes: B batch, T time, H heads, G = B·H, N chunks of L tokens, X any axis of keys or values.
"""

from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from torch import Tensor

SEGMENT = 2**18  # numbers per tensor that an eager pass works on at a time: they fit into a cache


def segments(tensors_BTHX: Sequence[Tensor], L: int) -> Iterator[list[Tensor]]:
    """Yield parts of the tensors along T, each of whole chunks but for the end of the last."""
    B, T, H, X = tensors_BTHX[0].shape
    step = L * max(1, SEGMENT // max(1, B * H * L * X))
    for start in range(0, T, step):
        yield [x[:, start : start + step] for x in tensors_BTHX]


def chunks(x_BTHX: Tensor, L: int) -> Tensor:
    """Cut [B, T, H, X] into [N, G, L, X]; tokens that fill the last chunk are all 0."""
    B, T, H, X = x_BTHX.shape
    if T % L:
        x_BTHX = F.pad(x_BTHX, (0, 0, 0, 0, 0, -T % L))
    N = -(-T // L)
    return x_BTHX.reshape(B, N, L, H, X).permute(1, 0, 3, 2, 4).reshape(N, B * H, L, X)


def tokens(x_NGLX: Tensor, like_BTHX: Tensor) -> Tensor:
    """Join [N, G, L, X] to [B, T, H, X], with the batch, length and heads of another tensor."""
    (B, T, H, _), (N, _, L, X) = like_BTHX.shape, x_NGLX.shape
    return x_NGLX.view(N, B, H, L, X).permute(1, 0, 3, 2, 4).reshape(B, N * L, H, X)[:, :T]
