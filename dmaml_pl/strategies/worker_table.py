"""What the workers tell each other at a merge, beside their weights, in the same all-reduce (a sum).

Each worker writes its own row and leaves the others' at zero, so that the sum is the table of all workers.

Legend: W workers, M series, H meta-iterations of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from dmaml_pl.errors import NonFiniteError

SIGNALS: dict[str, type[BaseException]] = {"SIGTERM": SIGTERMException, "SIGINT": KeyboardInterrupt}
"""What ends the training of all workers where one has heard a signal. It travels as what is not finite does."""

CAUSES = ("", "the query loss", "a weight", *SIGNALS)

METRICS = ("weight", "squared_displacement", "tasks", "iterations", "seconds", "cpu_seconds", "transfer_seconds")
"""Of a worker's run: how much it counts in the mean; squared distance from the run's start; tasks that it saw;
meta-iterations that it made; wall time; time that a core computed; time in the all-reduce of the merge before."""

HEAD = len(METRICS) + 2
"""Values of a worker beside its series: its metrics, what failed, and where."""


class WorkerTable(NamedTuple):
    """The run as every worker saw it.

    Attributes:
        metrics: of each worker, (W,) by name; see `METRICS`.
        failures: one error per worker that could not finish.
        series: metrics per meta-iteration, (W, M, H).
    """

    metrics: dict[str, Tensor]
    failures: list[NonFiniteError]
    series: Tensor


def pack_row(
    *,
    worker: int,
    workers: int,
    metrics: Mapping[str, float],
    failure: NonFiniteError | None,
    series: Tensor,
    like: Tensor,
) -> Tensor:
    """This worker's row in an otherwise empty table, flat, (W * (HEAD + M * H),).

    Args:
        worker: rank of this worker.
        workers: W.
        metrics: this worker's, by the names in `METRICS`.
        failure: why the run was not finished, if it was not.
        series: (M, H).
        like: a tensor with the type and the device to use.
    """
    cause, iteration = (0, -1) if failure is None else (CAUSES.index(failure.what), failure.iteration)
    table = like.new_zeros(workers, HEAD + series.numel())
    head = like.new_tensor([*(metrics[name] for name in METRICS), cause, iteration + 1])
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
    *metrics, causes, iterations = table[:, :HEAD].unbind(dim=1)
    failures = [
        NonFiniteError(CAUSES[int(cause)], worker=worker, run=run, iteration=int(iteration) - 1)
        for worker, (cause, iteration) in enumerate(zip(causes.tolist(), iterations.tolist(), strict=True))
        if cause
    ]
    return WorkerTable(dict(zip(METRICS, metrics, strict=True)), failures, table[:, HEAD:].view(workers, *shape))
