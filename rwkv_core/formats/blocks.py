"""ggml's quantised blocks: 32 weights of a row in 18 to 34 bytes, turned back into float32.

Every block begins with its scale d as float16, and the types ``_1`` go on with their minimum m as
float16. Then, of 4-bit types, 16 bytes: the low halves are weights 0 to 15, the high halves 16 to
31. 5-bit types keep the fifth bits in 4 bytes before those, bit j of them of weight j. Weights are
q·d + m, with m = -8·d for Q4_0 and -16·d for Q5_0. Source: RWKV/rwkv.cpp with ggml, quantize code.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["BLOCK", "TYPES", "BlockType", "dequantise"]

BLOCK = 32


class BlockType(NamedTuple):
    """How a block is laid out; ``bits`` per weight, ``zero`` subtracted before scaling."""

    name: str
    bits: int
    zero: int
    has_minimum: bool

    @property
    def nbytes(self) -> int:
        """Bytes of a block."""
        return 2 + 2 * self.has_minimum + BLOCK * self.bits // 8


TYPES = {
    2: BlockType("Q4_0", 4, 8, False),
    3: BlockType("Q4_1", 4, 0, True),
    7: BlockType("Q5_0", 5, 16, False),
    8: BlockType("Q5_1", 5, 0, True),
    9: BlockType("Q8_0", 8, 0, False),
}
"""By ggmf's number of the type."""


def dequantise(kind: BlockType, data: np.ndarray) -> np.ndarray:
    """Return the weights of whole blocks as float32 [32 · blocks].

    Args:
        kind: how the blocks are laid out.
        data: bytes [blocks · kind.nbytes].
    """
    rows = data.reshape(-1, kind.nbytes)
    n_halves = 1 + kind.has_minimum
    halves = np.ascontiguousarray(rows[:, : 2 * n_halves]).view("<f2").astype(np.float32)
    quants = rows[:, 2 * n_halves :]
    out = np.empty((len(rows), BLOCK), np.float32)
    if kind.bits == 8:
        out[:] = quants.view(np.int8)
    else:
        fifth, low = quants[:, :-16], quants[:, -16:]
        out[:, :16] = low & 15
        out[:, 16:] = low >> 4
        if kind.bits == 5:
            out += np.unpackbits(fifth, axis=1, bitorder="little") * np.uint8(16)
    out -= np.float32(kind.zero)
    out *= halves[:, :1]
    if kind.has_minimum:
        out += halves[:, 1:]
    return out.reshape(-1)
