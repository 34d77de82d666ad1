"""Scans: the orders in which an image's tokens can be read, and the way back.

A scan maps tokens that stand row by row to its own order, so that a recurrence over time becomes
one over the image. What is mixed or gated by position must wait until after :meth:`Scan.undo`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["ColumnScan", "FourWayScan", "RowScan", "Scan", "StrideScan", "ZigzagScan"]

Grid = tuple[int, int]  # rows and columns


class Scan(ABC):
    """One or several orders of reading a grid of tokens."""

    @abstractmethod
    def orders(self, index_HW: Tensor) -> list[Tensor]:
        """Return the orders, each the entries of ``index_HW`` [H, W] as it reads them [H·W]."""

    def apply(self, x_BTC: Tensor, grid: Grid) -> Tensor:
        """Reorder tokens [B, T, C] that stand row by row; n orders give a batch of n·B.

        Raises:
            ValueError: the grid does not have T places.
        """
        orders = self._orders(x_BTC, grid)
        return torch.cat([x_BTC[:, order] for order in orders])

    def undo(self, y_BTC: Tensor, grid: Grid) -> Tensor:
        """Put tokens [n·B, T, C] back row by row, and average the n orders [B, T, C].

        Raises:
            ValueError: the grid does not have T places.
        """
        orders = self._orders(y_BTC, grid)
        parts = y_BTC.chunk(len(orders))
        back = [part[:, order.argsort()] for part, order in zip(parts, orders, strict=True)]
        return torch.stack(back).mean(0)

    def _orders(self, x_BTC: Tensor, grid: Grid) -> list[Tensor]:
        rows, columns = grid
        if x_BTC.shape[1] != rows * columns:
            raise ValueError(f"{x_BTC.shape[1]} tokens do not fill a grid of {rows} × {columns}")
        return self.orders(torch.arange(rows * columns, device=x_BTC.device).view(rows, columns))


class RowScan(Scan):
    """Row by row, each from left to right."""

    def orders(self, index_HW: Tensor) -> list[Tensor]:
        """Return the order as it is."""
        return [index_HW.flatten()]


class ColumnScan(Scan):
    """Column by column, each from top to bottom."""

    def orders(self, index_HW: Tensor) -> list[Tensor]:
        """Return the order of the transposed grid."""
        return [index_HW.T.flatten()]


class ZigzagScan(Scan):
    """Row by row, every other one from right to left: successive tokens are neighbours."""

    def orders(self, index_HW: Tensor) -> list[Tensor]:
        """Return the order with odd rows reversed."""
        odd = torch.arange(len(index_HW), device=index_HW.device)[:, None] % 2 == 1
        return [torch.where(odd, index_HW.flip(1), index_HW).flatten()]


class StrideScan(Scan):
    """Every ``step``-th row and column first, then the same from each other start.

    Args:
        step: at least 1; need not divide the grid.
    """

    def __init__(self, step: int) -> None:
        if step < 1:
            raise ValueError(f"step must be at least 1, got {step}")
        self.step = step

    def orders(self, index_HW: Tensor) -> list[Tensor]:
        """Return the sub-grids one after another."""
        step = self.step
        starts = [(i, j) for i in range(step) for j in range(step)]
        return [torch.cat([index_HW[i::step, j::step].flatten() for i, j in starts])]


class FourWayScan(Scan):
    """Rows and columns, each forwards and backwards: symmetric under transposing the image."""

    def orders(self, index_HW: Tensor) -> list[Tensor]:
        """Return four orders."""
        row, column = index_HW.flatten(), index_HW.T.flatten()
        return [row, row.flip(0), column, column.flip(0)]
