"""The one all-reduce at the end of a run: the workers' weighted mean, and beside it what they tell each other.

Of the metrics each worker writes its own row of a table and leaves the others' at zero, so that the sum is the table of
all workers.

Legend: W workers, P floating-point values that are merged, Z optimizer moments, M series, H meta-iterations of a run.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from dmaml_pl.errors import NonFiniteError
from dmaml_pl.runs import RunReport

POLL_SECONDS = 0.0002

SIGNALS: dict[str, type[BaseException]] = {"SIGTERM": SIGTERMException, "SIGINT": KeyboardInterrupt}
"""What ends the training of all workers where one has heard a signal. It travels as what is not finite does."""

CAUSES = ("", "the query loss", "a weight", *SIGNALS)

METRICS = (
    "weight",
    "squared_displacement",
    "tasks",
    "iterations",
    "seconds",
    "cpu_seconds",
    "transfer_seconds",
    "cause",
    "iteration",
)
"""Of a worker's run: how much it counts in the mean; squared distance from the run's start; tasks that it saw;
meta-iterations that it made; wall time; time that a core computed; time in the all-reduce of the merge before; why it
was not finished, a number of `CAUSES`, and in which meta-iteration."""


class Offer(NamedTuple):
    """What a worker brings to the end of a run.

    Attributes:
        values: its floating-point state, (P + Z,).
        base: values that all workers know alike, near the state where that is possible, (P + Z,).
        squared_displacement: squared distance of its weights and buffers from the run's start.
        integers: its integer buffers as bytes; worker 0's count.
        report: of its run.
        weight: of the worker in the mean.
        run: number of the run.
        steps: meta-iterations of a worker before the run.
        parameters: how many of the values are of parameters; they come first.
    """

    values: Tensor
    base: Tensor
    squared_displacement: float
    integers: Tensor
    report: RunReport
    weight: float
    run: int
    steps: int
    parameters: int


@dataclass
class Sent:
    """An exchange under way.

    Attributes:
        offer: what this worker brought.
        payload: what it sent; the sum of all workers' payloads when `work` is done.
        work: the all-reduce; None when it has been waited for.
        series: M and H.
    """

    offer: Offer
    payload: Tensor
    work: Any
    series: torch.Size


class Merged(NamedTuple):
    """What all workers hold alike after the exchange.

    Attributes:
        mean: the workers' weighted mean state, (P + Z,).
        integers: worker 0's integer buffers as bytes.
        metrics: of each worker, (W,) by the names in `METRICS`.
        failures: one error per worker that was left out.
        report: of the run, completed by what the other workers told.
    """

    mean: Tensor
    integers: Tensor
    metrics: dict[str, Tensor]
    failures: list[NonFiniteError]
    report: RunReport


class Exchange:
    """Sends, waits, and reads what came of it; each worker does the same arithmetic on the same bits.

    Args:
        exclude: whether a worker that is not finite is left out, or ends the training.
        even: whether all workers make the same number of meta-iterations; if not, a run's series are told as means.
        bfloat16: whether to send each worker's displacement from `Offer.base` in bfloat16, half the bytes, instead of
            its values as they are. It loses little by it: Streaming DiLoCo (Douillard et al. 2025, arXiv:2501.18512)
            sends even four bits of its pseudo-gradients. The sum is formed in bfloat16, too: relative to the workers'
            displacement its error is about 2^-8 a worker.
    """

    def __init__(self, *, exclude: bool, even: bool = True, bfloat16: bool = False) -> None:
        self._exclude = exclude
        self._even = even
        self._bfloat16 = bfloat16
        self._pieces = 3 if bfloat16 else 1  # numbers that hold a float32 exactly: 8 bits of its 24 each
        self._last_seconds = 0.0

    def send(self, offer: Offer, worker: int, workers: int) -> Sent:
        """Start the all-reduce of so many workers, as this one of them.

        Raises:
            RuntimeError: another worker is gone.
        """
        sent = self.pack(offer, worker, workers)
        sent.work = torch.distributed.all_reduce(sent.payload, async_op=True)
        return sent

    def pack(self, offer: Offer, worker: int, workers: int) -> Sent:
        """What is to be summed over so many workers, of this one of them."""
        report, values, weight = offer.report, offer.values, offer.weight
        series = torch.stack(list(report["series"].values()))
        if not self._even:
            series = series.nanmean(dim=1, keepdim=True)
        failure = report.get("failure")
        if failure is not None and self._exclude:
            values, weight = offer.base, 0.0
        metrics = {
            "weight": weight,
            "squared_displacement": offer.squared_displacement if weight else 0.0,
            "tasks": report["tasks"],
            "iterations": report["iterations"],
            "seconds": report["seconds"],
            "cpu_seconds": report["cpu_seconds"],
            "transfer_seconds": self._last_seconds,
            "cause": 0 if failure is None else CAUSES.index(failure.what),
            "iteration": 0 if failure is None else failure.iteration,
        }
        table = values.new_zeros(workers, len(METRICS) + series.numel())
        head = values.new_tensor([metrics[name] for name in METRICS])
        table[worker] = torch.cat([head, series.reshape(-1).to(values)])
        integers = offer.integers if worker == 0 else torch.zeros_like(offer.integers)
        payload = self._encode((values - self._base(offer)) * weight, torch.cat([integers, table.reshape(-1)]))
        return Sent(offer, payload, None, series.shape)

    def _base(self, offer: Offer) -> Tensor:
        """What is sent is the difference from this; of buffers always, so that one that nobody writes stays the same.

        The mean of equal values is not that value to the bit, but that of zeros is zero.
        """
        if self._bfloat16:
            return offer.base
        base = offer.base.clone()
        base[: offer.parameters] = 0.0
        return base

    def _encode(self, values: Tensor, exact: Tensor) -> Tensor:
        """What this worker sends; of each value that the sum must keep exactly, all workers but one send 0."""
        dtype, pieces = torch.bfloat16 if self._bfloat16 else values.dtype, []
        for _ in range(self._pieces):
            pieces.append(exact.to(dtype))
            exact = exact - pieces[-1].to(exact)
        return torch.cat([values.to(dtype), *pieces])

    def _decode(self, payload: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The sums of the values and of the exact ones."""
        exact = payload[like.numel() :].view(self._pieces, -1).to(like.dtype)
        # From the smallest piece on, so that no bit is lost.
        return payload[: like.numel()].to(like.dtype), exact.flip(0).sum(dim=0)

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
            NonFiniteError: of the first worker that could not finish its run, where it is not left out; that of a
                worker that has heard a signal comes first.
        """
        offer = sent.offer
        values, exact = self._decode(sent.payload, offer.values)
        integers, rows = exact.tensor_split([offer.integers.numel()])
        heads, series = rows.view(-1, len(METRICS) + sent.series.numel()).tensor_split([len(METRICS)], dim=1)
        metrics = dict(zip(METRICS, heads.unbind(dim=1), strict=True))
        failures = [
            NonFiniteError(CAUSES[int(cause)], worker=worker, run=offer.run, iteration=int(iteration))
            for worker, (cause, iteration) in enumerate(heads[:, -2:].tolist())
            if cause
        ]
        for failure in failures:
            if failure.what in SIGNALS:
                raise failure
        if failures and (not self._exclude or len(failures) == len(heads)):
            raise failures[0]
        report = self._complete(offer.report, metrics, series.reshape(-1, *sent.series).cpu())
        report["merge"]["merge/bytes"] = float(sent.payload.nbytes)
        if self._exclude:
            report["merge"]["merge/excluded"] = float(len(failures))
        mean = self._base(offer) + values / metrics["weight"].sum()
        return Merged(mean, integers, metrics, failures, report)

    def _complete(self, report: RunReport, metrics: dict[str, Tensor], by_worker: Tensor) -> RunReport:
        """A worker's report, made the report of all workers; `by_worker` are their series, (W, M, H)."""
        finished = metrics["iterations"][metrics["weight"] > 0]
        workers = {name: by_worker[:, number] for number, name in enumerate(report["series"])}
        series = {name: values.nanmean(dim=0) for name, values in workers.items()}
        transfer_seconds = float(metrics["transfer_seconds"].min())
        own: RunReport = {
            "workers": workers,
            "series": series,
            "loss": series["loss"].nanmean(),
            "tasks": round(float(metrics["tasks"].sum())),
            "iterations": round(float(finished.max() if self._even else finished.mean())),
            "seconds": float(metrics["seconds"].max()),
            "cpu_seconds": float(metrics["cpu_seconds"].max()),
            "failure": None,
            "merge": {"merge/transfer_seconds": transfer_seconds} if transfer_seconds > 0 else {},
        }
        return report | own
