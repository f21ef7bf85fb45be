"""Times of peers that are called in turn, so that what disturbs the machine disturbs all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Clock = Callable[[], float]


def clock() -> Clock:
    """CPU time where there is one thread (OMP_NUM_THREADS=1), as other processes lengthen it less; else wall time."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


@dataclass
class Times:
    """Seconds of one call, one figure a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The median round."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """How many times faster than the reference, compared round by round."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def between(cls, reference: Times, other: Times) -> Ratio:
        """The reference's time over the other's."""
        ratios = [mine / theirs for mine, theirs in zip(reference.seconds, other.seconds, strict=True)]
        return cls(statistics.median(ratios), min(ratios), max(ratios))


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    slot: float,
    budget: float,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Call everyone in turn, round after round.

    Args:
        calls: what is timed, by name; each has been called before, so that nothing is made anew.
        rounds: how often everyone's turn comes, at least twice.
        slot: seconds of a turn, which has at least one call.
        budget: seconds after which no further round begins.
        clock: the time in seconds.
    """
    began, times = clock(), {name: Times() for name in calls}
    repeats = {name: max(1, round(slot / max(_once(call, clock), 1e-9))) for name, call in calls.items()}
    for number in range(rounds):
        if number >= 2 and clock() - began > budget:
            break
        for name, call in calls.items():
            if repeats[name] > 1:
                call()  # with caches and threads of one's own
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].seconds.append((clock() - start) / repeats[name])
    return times


def _once(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return clock() - start
