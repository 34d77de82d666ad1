"""Weights in blocks of 8 or 4 bits along the columns, rounded so that products change least.

A row of a matrix that is rounded moves every product it is part of. GPTQ (Frantar et al. 2023,
arXiv:2210.17323) rounds row by row, and after each moves those still to come by what best makes up
for it. All it has to know of the inputs x is their sum of x xᵀ.
"""

import hashlib
import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

__all__ = ["BLOCK", "Blocks", "Rounder", "in_blocks"]

BLOCK = 32
# shares of a block's largest weight, and of its smallest, that its levels may span
CUTS = {4: (1.0, 0.93, 0.86, 0.79), 8: (1.0,)}
DAMPING = 0.01  # of the mean square of an input, for those that hardly ever are anything
COLUMNS = 4096  # at a time


class Blocks(NamedTuple):
    """A matrix as levels: a weight is ``(level - zero) * step`` of its block of rows."""

    levels_KN: np.ndarray  # uint8
    step_nN: np.ndarray
    zero_nN: np.ndarray  # uint8

    @property
    def matrix_KN(self) -> np.ndarray:
        """The weights, as fp32."""
        block = np.arange(len(self.levels_KN)) // BLOCK
        return (self.levels_KN - self.zero_nN[block].astype(np.float32)) * self.step_nN[block]


class Rounder:
    """Rounds matrices, each once, however many graphs it is in.

    Args:
        moments: sum of x xᵀ over inputs, by the weight's name; see ``moments.py``.
    """

    def __init__(self, moments: Mapping[str, np.ndarray] | None = None) -> None:
        self._moments = moments or {}
        self._done: dict[tuple[bytes, int], Blocks] = {}

    def __call__(self, name: str, matrix_KN: np.ndarray, bits: int) -> Blocks:
        """Return a weight in 4 or 8 bits, by what it reads where that is known."""
        key = hashlib.sha256(matrix_KN.tobytes()).digest(), bits
        if key not in self._done:
            self._done[key] = in_blocks(matrix_KN, bits, self._moments.get(name))
        return self._done[key]


def in_blocks(matrix_KN: np.ndarray, bits: int, moments_KK: np.ndarray | None = None) -> Blocks:
    """Round a matrix that multiplies rows of inputs from the right, in blocks of 32 rows.

    Args:
        matrix_KN: the weights, fp32.
        bits: 4 or 8.
        moments_KK: sum of x xᵀ over inputs; None rounds every weight by itself.
    """
    K, N = matrix_KN.shape
    upper_KK = None if moments_KK is None else _makes_up(moments_KK)
    parts = []
    for columns in np.array_split(np.arange(N), -(-N // COLUMNS)):
        weights = matrix_KN[:, columns].astype(np.float32)
        levels, steps, zeros = np.empty(weights.shape, np.uint8), [], []
        for first in range(0, K, BLOCK):
            last = min(first + BLOCK, K)
            step, zero = _grid(weights[first:last], bits)
            errors = np.zeros((last - first, len(columns)), np.float32)
            for k in range(first, last):
                level = np.clip(np.round(weights[k] / step) + zero, 0, 2**bits - 1)
                levels[k] = level
                if upper_KK is not None:
                    errors[k - first] = (weights[k] - (level - zero) * step) / upper_KK[k, k]
                    weights[k + 1 : last] -= np.outer(upper_KK[k, k + 1 : last], errors[k - first])
            if upper_KK is not None:
                weights[last:] -= upper_KK[first:last, last:].T @ errors
            steps.append(step)
            zeros.append(zero.astype(np.uint8))
        parts.append((levels, np.stack(steps), np.stack(zeros)))
    return Blocks(*(np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))


def _makes_up(moments_KK: np.ndarray) -> np.ndarray:
    """Return the upper Cholesky factor of the inverse moments: row k says what makes up for k."""
    damping = DAMPING * float(np.mean(np.diag(moments_KK))) or 1.0
    inverse_KK = np.linalg.inv(moments_KK.astype(np.float64) + damping * np.eye(len(moments_KK)))
    return np.ascontiguousarray(np.linalg.cholesky(inverse_KK).T, np.float32)


def _grid(block: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the step between levels and the level of 0, for every column of a block of rows.

    The levels span the weights and 0, or where that brings them closer in the mean square, a bit
    less: what lies outside is cut.
    """
    low, high = (f(block, 0, initial=0.0) for f in (np.min, np.max))
    least = np.full(low.shape, np.inf, np.float32)
    best_step, best_zero = np.empty_like(least), np.empty_like(least)
    for below, above in itertools.product(CUTS[bits], CUTS[bits]):
        first, last = below * low, above * high
        step = np.where(last == first, 1, (last - first) / (2**bits - 1)).astype(np.float32)
        zero = np.round(-first / step)
        rounded = (np.clip(np.round(block / step) + zero, 0, 2**bits - 1) - zero) * step
        error = np.square(rounded - block).sum(0)
        closer = error < least
        best_step[closer], best_zero[closer] = step[closer], zero[closer]
        least[closer] = error[closer]
    return best_step, best_zero
