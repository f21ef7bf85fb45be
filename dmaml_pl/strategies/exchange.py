"""The one all-reduce at the end of a run: the workers' weighted mean, and what they tell each other beside it.

Legend: W workers, P floating-point values that are merged, Z optimizer moments, M series, H meta-iterations of a run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.transfer import Transfer
from dmaml_pl.strategies.worker_table import SIGNALS, WorkerTable, pack_row, unpack_table

POLL_SECONDS = 0.0002


class Offer(NamedTuple):
    """What a worker brings to the end of a run.

    Attributes:
        values: its floating-point state, (P + Z,).
        base: values that all workers know alike, near the state where that is possible, (P + Z,).
        squared_displacement: squared distance of its weights and buffers from the run's start.
        integers: its integer buffers as digits; worker 0's count.
        report: of its run.
        weight: of the worker in the mean.
    """

    values: Tensor
    base: Tensor
    squared_displacement: float
    integers: Tensor
    report: RunReport
    weight: float


class Place(NamedTuple):
    """Where a run stands.

    Attributes:
        worker: rank of this worker.
        workers: W.
        run: number of the run.
        steps: meta-iterations of a worker before the run.
    """

    worker: int
    workers: int
    run: int
    steps: int


@dataclass
class Sent:
    """An exchange under way.

    Attributes:
        offer: what this worker brought.
        place: of the run.
        payload: what it sent; the sum of all workers' payloads when `work` is done.
        work: the all-reduce; None when it has been waited for.
        exact: number of values that are carried exactly.
        series: M and H.
    """

    offer: Offer
    place: Place
    payload: Tensor
    work: Any
    exact: int
    series: tuple[int, int]


class Merged(NamedTuple):
    """What all workers hold alike after the exchange.

    Attributes:
        mean: the workers' weighted mean state, (P + Z,).
        integers: worker 0's integer buffers as digits.
        table: all workers' metrics of the run; its failures are of workers that were left out.
        report: of the run, completed by what the other workers told.
    """

    mean: Tensor
    integers: Tensor
    table: WorkerTable
    report: RunReport


class Exchange:
    """Sends, waits, and reads what came of it; each worker does the same arithmetic on the same bits.

    Args:
        even: whether all workers make the same number of meta-iterations; if not, a run's series are told as means.
        exclude: whether a worker that is not finite is left out, or ends the training.
    """

    def __init__(self, *, even: bool, exclude: bool) -> None:
        self.transfer = Transfer()
        self._even = even
        self._exclude = exclude
        self._last_seconds = 0.0

    def send(self, offer: Offer, place: Place) -> Sent:
        """Start the all-reduce.

        Raises:
            RuntimeError: another worker is gone.
        """
        report, values, weight = offer.report, offer.values, offer.weight
        series = torch.stack(list(report["series"].values()))
        if not self._even:
            series = series.nanmean(dim=1, keepdim=True)
        failure = report.get("failure")
        if failure is not None and failure.worker != place.worker:
            failure = None
        if failure is not None and self._exclude:
            values, weight = offer.base, 0.0
        row = pack_row(
            worker=place.worker,
            workers=place.workers,
            metrics={
                "weight": weight,
                "squared_displacement": offer.squared_displacement if weight else 0.0,
                "tasks": report["tasks"],
                "iterations": report["iterations"],
                "seconds": report["seconds"],
                "cpu_seconds": report["cpu_seconds"],
                "transfer_seconds": self._last_seconds,
            },
            failure=failure,
            series=series,
            like=values,
        )
        integers = offer.integers if place.worker == 0 else torch.zeros_like(offer.integers)
        exact = torch.cat([integers, row])
        payload = self.transfer.encode(values, offer.base, weight, exact)
        work = torch.distributed.all_reduce(payload, async_op=True)
        return Sent(offer, place, payload, work, exact.numel(), (series.shape[0], series.shape[1]))

    def wait(self, sent: Sent) -> Sent:
        """Wait for the all-reduce, and hear signals meanwhile: the other workers may have to be told of one.

        Raises:
            RuntimeError: another worker is gone, or did not come in time.
        """
        began = time.perf_counter()
        work, sent.work = sent.work, None  # it keeps the connections open for as long as it lives
        while not work.is_completed():
            time.sleep(POLL_SECONDS)
        work.wait()
        self._last_seconds = time.perf_counter() - began
        return sent

    def read(self, sent: Sent) -> Merged:
        """Read the sum of the payloads.

        Raises:
            NonFiniteError: of the first worker that could not finish its run, where it is not left out.
            SIGTERMException: a worker was asked to end.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        offer, place = sent.offer, sent.place
        values, exact = self.transfer.decode(sent.payload, offer.base, sent.exact)
        integers, rows = exact.split([offer.integers.numel(), sent.exact - offer.integers.numel()])
        table = unpack_table(rows, workers=place.workers, run=place.run, shape=sent.series)
        for failure in table.failures:
            if failure.what in SIGNALS:
                raise SIGNALS[failure.what]
        if table.failures and (not self._exclude or len(table.failures) == place.workers):
            raise table.failures[0]
        mean = self.transfer.mean(values / table.metrics["weight"].sum(), offer.base)
        return Merged(mean, integers, table, self._complete(sent, table))

    def _complete(self, sent: Sent, table: WorkerTable) -> RunReport:
        """A worker's report, made the report of all workers."""
        report, by_worker, metrics = sent.offer.report, table.series.cpu(), table.metrics
        finished = metrics["iterations"][metrics["weight"] > 0]
        workers = {name: by_worker[:, number] for number, name in enumerate(report["series"])}
        series = {name: values.nanmean(dim=0) for name, values in workers.items()}
        merge = {"merge/bytes": float(sent.payload.numel() * sent.payload.element_size())}
        if (transfer_seconds := float(metrics["transfer_seconds"].min())) > 0:
            merge["merge/transfer_seconds"] = transfer_seconds
        if self._exclude:
            merge["merge/excluded"] = float(len(table.failures))
        own: RunReport = {
            "workers": workers,
            "series": series,
            "loss": series["loss"].nanmean(),
            "tasks": round(float(metrics["tasks"].sum())),
            "iterations": round(float(finished.max() if self._even else finished.mean())),
            "seconds": float(metrics["seconds"].max()),
            "cpu_seconds": float(metrics["cpu_seconds"].max()),
            "failure": None,
            "merge": merge,
        }
        return report | own
