"""How the end of a run travels: what is averaged in the wanted precision, what must stay exact exactly.

Legend: P floating-point values that are averaged, E values that are added exactly, L length of the payload.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

TransferType = Literal["float32", "bfloat16"]

PIECES = 3
"""bfloat16 numbers that hold a float32 exactly: 8 bits of its 24 each."""


class Transfer:
    """One payload out of a worker's state, and the weighted mean of all workers' states out of the payloads' sum.

    Values travel as they are, in the network's own precision (at least float32).
    """

    def encode(self, values: Tensor, base: Tensor, weight: float, exact: Tensor) -> Tensor:
        """What this worker sends, (L,).

        Args:
            values: this worker's, (P,).
            base: values that all workers know alike, (P,).
            weight: of this worker in the mean.
            exact: float32 or float64 values that the sum must keep exactly, (E,); of each, all workers but one send 0.
        """
        return torch.cat([values * weight, exact])

    def decode(self, total: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """The weighted sum of the values, (P,), to be divided by the workers' total weight, and the exact ones, (E,).

        Args:
            total: sum of the payloads, (L,).
            base: as in `encode`.
            size: E.
        """
        return total[: len(total) - size], total[len(total) - size :]

    def mean(self, divided: Tensor, base: Tensor) -> Tensor:
        """The mean of the workers' values, (P,), from the divided sum (P,)."""
        return divided


class BFloat16Transfer(Transfer):
    """Sends the displacement from `base` in bfloat16, half the bytes; it loses little by it, as DiLoCo's users found.

    Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512) sends even four bits of its pseudo-gradients. The sum is
    formed in bfloat16, too: relative to the workers' displacement its error is about 2^-8 a worker.
    """

    def encode(self, values: Tensor, base: Tensor, weight: float, exact: Tensor) -> Tensor:
        """The weighted displacement, then each exact value as a sum of three bfloat16 numbers."""
        pieces, rest = [], exact.float()
        for _ in range(PIECES):
            pieces.append(rest.bfloat16())
            rest = rest - pieces[-1].float()
        return torch.cat([((values - base) * weight).bfloat16(), *pieces])

    def decode(self, total: Tensor, base: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """As of the base class, in the type of `base` again."""
        displacement, pieces = super().decode(total, base, PIECES * size)
        # From the smallest piece on, so that no bit is lost.
        return displacement.to(base.dtype), pieces.view(PIECES, size).to(base.dtype).flip(0).sum(dim=0)

    def mean(self, divided: Tensor, base: Tensor) -> Tensor:
        """Where the mean displacement leads."""
        return base + divided


TRANSFERS: dict[TransferType, type[Transfer]] = {"float32": Transfer, "bfloat16": BFloat16Transfer}
