"""How the end of a run travels: what is averaged in the wanted precision, what must stay exact exactly.

Legend: P floating-point values that are averaged, E values that are added exactly, L length of the payload.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

TransferType = Literal["float32", "bfloat16"]

PIECES = 3
"""bfloat16 numbers that hold a float32 exactly: 8 bits of its 24 each."""


class Transfer(ABC):
    """One payload out of a worker's state, and the weighted mean of all workers' states out of the payloads' sum."""

    @abstractmethod
    def encode(self, values: Tensor, base: Tensor, weight: float, exact: Tensor) -> Tensor:
        """What this worker sends, (L,).

        Args:
            values: this worker's, (P,).
            base: values that all workers know alike, (P,).
            weight: of this worker in the mean.
            exact: float32 or float64 values that the sum must keep exactly, (E,); of each, all workers but one send 0.
        """

    @abstractmethod
    def decode(self, total: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The weighted sum of the values relative to `base`, and the exact values.

        Args:
            total: sum of the payloads, (L,).
            base: as in `encode`.
            size: E.

        Returns:
            (P,) and (E,). The first is to be divided by the workers' total weight and then given to `mean`.
        """

    @abstractmethod
    def mean(self, divided: Tensor, base: Tensor) -> Tensor:
        """The mean of the workers' values, (P,), from the divided sum (P,)."""


class FullTransfer(Transfer):
    """Values as they are, in the network's own precision (at least float32)."""

    def encode(self, values: Tensor, base: Tensor, weight: float, exact: Tensor) -> Tensor:
        """Weighted values, then the exact ones."""
        return torch.cat([values * weight, exact])

    def decode(self, total: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Split where they were joined."""
        return total[: len(total) - size], total[len(total) - size :]

    def mean(self, divided: Tensor, base: Tensor) -> Tensor:
        """`divided` itself."""
        return divided


class BFloat16Transfer(Transfer):
    """The way from `base` in bfloat16, half the bytes; a way loses little by it, as DiLoCo's users found.

    Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) sends even four bits of its pseudo-gradients. The sum is
    formed in bfloat16, too: relative to the workers' way its error is about 2^-8 a worker.
    """

    def encode(self, values: Tensor, base: Tensor, weight: float, exact: Tensor) -> Tensor:
        """The weighted way, then each exact value as a sum of three bfloat16 numbers."""
        pieces, rest = [], exact.float()
        for _ in range(PIECES):
            piece = rest.bfloat16()
            pieces.append(piece)
            rest = rest - piece.float()
        return torch.cat([((values - base) * weight).bfloat16(), *pieces])

    def decode(self, total: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """In the type of `base` again."""
        way, pieces = total[: len(total) - PIECES * size], total[len(total) - PIECES * size :]
        # From the smallest piece on, so that no bit is lost on the way.
        exact = pieces.view(PIECES, size).to(base.dtype).flip(0).sum(dim=0)
        return way.to(base.dtype), exact

    def mean(self, divided: Tensor, base: Tensor) -> Tensor:
        """Where the mean way leads."""
        return base + divided


def transfer_in(kind: TransferType) -> Transfer:
    """The transfer of that name."""
    return FullTransfer() if kind == "float32" else BFloat16Transfer()
