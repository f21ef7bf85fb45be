"""What the workers tell each other at a merge, beside their weights, in the same all-reduce (a sum).

Each worker writes its own row and leaves the others' at zero, so that the sum is the table of all workers.

Legend: W workers, M series, H meta-iterations of the run.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import torch
from torch import Tensor

from dmaml_pl.errors import NonFiniteError

CAUSES = ("", "the query loss", "a weight")


@dataclass
class Figures:
    """A worker's figures of a run.

    Attributes:
        weight: how much the worker counts in the mean.
        squared_way: squared distance that it moved from the run's start.
        tasks: that it saw.
        iterations: meta-iterations that it made.
        seconds: wall time of its run.
        cpu_seconds: time that a core computed for its run.
        transfer_seconds: that it spent in the all-reduce of the merge before this one; 0 if there was none.
    """

    weight: float
    squared_way: float
    tasks: float
    iterations: float
    seconds: float
    cpu_seconds: float
    transfer_seconds: float


HEAD = len(fields(Figures)) + 2
"""Values of a worker beside its series: its figures, what failed, and where."""


@dataclass
class WorkerTable:
    """The run as every worker saw it.

    Attributes:
        weight: of each worker in the mean, (W,); the further figures likewise, see `Figures`.
        failures: one error per worker that could not finish.
        series: figures per meta-iteration, (W, M, H).
    """

    weight: Tensor
    squared_way: Tensor
    tasks: Tensor
    iterations: Tensor
    seconds: Tensor
    cpu_seconds: Tensor
    transfer_seconds: Tensor
    failures: list[NonFiniteError]
    series: Tensor


def pack_row(
    *, worker: int, workers: int, figures: Figures, failure: NonFiniteError | None, series: Tensor, like: Tensor
) -> Tensor:
    """This worker's row in an otherwise empty table, flat, (W * (HEAD + M * H),).

    Args:
        worker: rank of this worker.
        workers: W.
        figures: this worker's.
        failure: why the run was not finished, if it was not.
        series: (M, H).
        like: a tensor with the type and the device to use.
    """
    cause = 0 if failure is None else max(CAUSES.index(failure.what), 0)
    place = -1 if failure is None else failure.iteration
    table = like.new_zeros(workers, HEAD + series.numel())
    head = like.new_tensor([*astuple(figures), cause, place + 1])
    table[worker] = torch.cat([head, series.reshape(-1).to(like)])
    return table.reshape(-1)


def unpack_table(flat: Tensor, *, workers: int, run: int, shape: tuple[int, int]) -> WorkerTable:
    """The table of all workers from the sum of their rows.

    Args:
        flat: the sum, (W * (HEAD + M * H),).
        workers: W.
        run: number of the run, for the errors.
        shape: M and H.
    """
    table = flat.view(workers, -1)
    *figures, cause, place = table[:, :HEAD].unbind(dim=1)
    failures = [
        NonFiniteError(CAUSES[int(cause[worker])], worker=worker, run=run, iteration=int(place[worker]) - 1)
        for worker in range(workers)
        if int(cause[worker])
    ]
    names = [field.name for field in fields(Figures)]
    return WorkerTable(
        **dict(zip(names, figures, strict=True)), failures=failures, series=table[:, HEAD:].view(workers, *shape)
    )
