"""What time workers on machines of their own would take, from how long a meta-iteration was measured to take on one.

A run of H meta-iterations takes as long as the slowest of W workers, and then one message goes round. Where gradients
are averaged, all wait for the slowest at every meta-iteration, and send then.

Legend: W workers, H meta-iterations of a run, N measured meta-iterations.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmaml_pl.errors import ConfigError

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """What joins the workers.

    Attributes:
        name: for people.
        latency: seconds that a short message takes from one worker to another.
        bandwidth: bytes per second that a worker sends.
    """

    name: str
    latency: float
    bandwidth: float

    @classmethod
    def read(cls, given: str) -> "Network":
        """One of `NETWORKS` by its name, or `LATENCY_MS,MBIT_PER_S`.

        Raises:
            ConfigError: it is neither.
        """
        known = {network.name: network for network in NETWORKS}
        if given in known:
            return known[given]
        try:
            latency, rate = map(float, given.split(","))
        except ValueError:
            latency, rate = -1.0, -1.0
        if not (0 <= latency < float("inf") and 0 < rate < float("inf")):
            raise ConfigError(
                f"--network is {given}, but must be {', '.join(known)}, or milliseconds and Mbit/s, such as 5,1000."
            )
        return cls(f"{latency:g} ms, {rate:g} Mbit/s", latency / 1e3, rate * 1e6 / 8)

    def all_reduce(self, workers: int, size: float) -> float:
        """Seconds of an all-reduce of so many bytes: a ring, as PyTorch's gloo makes it.

        2 (W - 1) times each worker sends the W-th part of them to the next, when that has said that it is ready: two
        latencies, as `benchmarks/merge_time.py` finds.
        """
        return 2 * (workers - 1) * (2 * self.latency + size / workers / self.bandwidth)


NETWORKS = (
    Network("machine", 50e-6, 1e9),
    Network("rack", 200e-6, 10e9 / 8),
    Network("internet", 30e-3, 100e6 / 8),
)
"""Processes of one machine; machines joined by 10 Gbit/s Ethernet; machines in distant places, with 100 Mbit/s each."""


def runs_of(measured: Seconds, length: int) -> Seconds:
    """Seconds of each stretch of so many successive meta-iterations, going round at the end, (N,)."""
    laps, rest = divmod(length, len(measured))
    sums = np.concatenate([[0.0], np.cumsum(np.concatenate([measured, measured]))])
    stretches: Seconds = sums[rest : rest + len(measured)] - sums[: len(measured)]
    return np.asarray(stretches + laps * measured.sum())


def slowest(drawn_from: Seconds, workers: int) -> float:
    """The expected maximum of so many independent draws from measured times.

    sum_i t_i ((i / N)^W - ((i - 1) / N)^W) with t_i in order.
    """
    below = (np.arange(len(drawn_from) + 1) / len(drawn_from)) ** workers
    return float(np.sort(drawn_from) @ np.diff(below))


def seconds_of_run(
    measured: Seconds, workers: int, length: int, network: Network, at_end: float, each: float | None = None
) -> float:
    """Expected seconds of a run, with its merge.

    Args:
        measured: seconds of one worker's meta-iterations, (N,).
        workers: W.
        length: H.
        network: that joins them.
        at_end: bytes that a worker sends at the end.
        each: bytes of a meta-gradient, where these are averaged at every meta-iteration.
    """
    merge = network.all_reduce(workers, at_end)
    if each is None:
        return slowest(runs_of(measured, length), workers) + merge
    return length * (slowest(measured, workers) + network.all_reduce(workers, each)) + merge
