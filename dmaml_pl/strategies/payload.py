"""What the workers tell each other at a merge, beside their weights, in the same all-reduce (a sum).

Each worker writes its own row and leaves the others' at zero, so that the sum is the table of all workers.

Legend: W workers, M series, H meta-iterations of the run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dmaml_pl.errors import NonFiniteError

HEAD = 6
"""Figures of a worker beside its series: weight, squared length of its way, tasks, seconds, what failed, and where."""

CAUSES = ("", "the query loss", "a weight")


@dataclass
class WorkerTable:
    """The run as every worker saw it.

    Attributes:
        weight: of each worker in the mean, (W,).
        squared_way: squared distance that each worker moved from the run's start, (W,).
        tasks: that each worker saw, (W,).
        seconds: that each worker's run took, (W,).
        failures: one error per worker that could not finish.
        series: figures per meta-iteration, (W, M, H).
    """

    weight: Tensor
    squared_way: Tensor
    tasks: Tensor
    seconds: Tensor
    failures: list[NonFiniteError]
    series: Tensor


def pack_row(
    *,
    worker: int,
    workers: int,
    figures: tuple[float, float, float, float],
    failure: NonFiniteError | None,
    series: Tensor,
    like: Tensor,
) -> Tensor:
    """This worker's row in an otherwise empty table, flat, (W * (6 + M * H),).

    Args:
        worker: rank of this worker.
        workers: W.
        figures: weight, squared way, tasks, seconds.
        failure: why the run was not finished, if it was not.
        series: (M, H).
        like: a tensor with the type and the device to use.
    """
    cause = 0 if failure is None else max(CAUSES.index(failure.what), 0)
    place = -1 if failure is None else failure.iteration
    table = like.new_zeros(workers, HEAD + series.numel())
    head = like.new_tensor([*figures, cause, place + 1])
    table[worker] = torch.cat([head, series.reshape(-1).to(like)])
    return table.reshape(-1)


def unpack_table(flat: Tensor, *, workers: int, run: int, shape: tuple[int, int]) -> WorkerTable:
    """The table of all workers from the sum of their rows.

    Args:
        flat: the sum, (W * (6 + M * H),).
        workers: W.
        run: number of the run, for the errors.
        shape: M and H.
    """
    table = flat.view(workers, -1)
    weight, squared_way, tasks, seconds, cause, place = table[:, :HEAD].unbind(dim=1)
    failures = [
        NonFiniteError(CAUSES[int(cause[worker])], worker=worker, run=run, iteration=int(place[worker]) - 1)
        for worker in range(workers)
        if int(cause[worker])
    ]
    return WorkerTable(weight, squared_way, tasks, seconds, failures, table[:, HEAD:].view(workers, *shape))
