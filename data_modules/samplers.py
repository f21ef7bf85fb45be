"""Which classes and samples a task is made of: chosen for many tasks at once, or by learn2learn's transforms.

Both sample from the same distribution, whether classes have equally many samples or not: N of the classes, in an order
that gives them their labels, and of each K + Q samples, in an order that makes them support or query; every choice and
order is as likely as any other. And in both a task follows from its own seed alone, whatever is sampled before it or
beside it. learn2learn's transforms define what a task is, so they stay: tests compare the batched sampler with them,
and `data.sampler` selects them.

Legend: T tasks, N ways, K shots, Q queries a class.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dmaml_pl import _learn2learn
from dmaml_pl.errors import ConfigError
from dmaml_pl.tasks import derive_seed

SamplerName = Literal["batched", "learn2learn"]

# Of SplitMix64.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
TO_53_BITS = np.uint64(11)


class Sampler(ABC):
    """Samples tasks from classes whose samples are numbered on from a first one.

    Args:
        samples: how many samples each class has, (classes,).
        ways: N, classes of a task.
        per_class: K + Q, samples of each of them.
        starts: number of the first sample of each class, (classes,); by default they follow one on another from 0.
    """

    def __init__(
        self,
        samples: Sequence[int] | NDArray[np.int64],
        *,
        ways: int,
        per_class: int,
        starts: NDArray[np.int64] | None = None,
    ) -> None:
        self.samples: NDArray[np.int64] = np.asarray(samples, dtype=np.int64)
        self.starts = self.samples.cumsum() - self.samples if starts is None else starts
        self.ways = ways
        self.per_class = per_class
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """What is done once, before any task is sampled."""

    @abstractmethod
    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds, (T, N, K + Q), the classes in the order of their labels.

        Leaves every global random generator as it found it.
        """


def sampler_named(name: SamplerName) -> type[Sampler]:
    """The class of the sampler of that name.

    Raises:
        ConfigError: there is none of that name.
    """
    samplers: dict[str, type[Sampler]] = {"batched": BatchedSampler, "learn2learn": Learn2LearnSampler}
    if name not in samplers:
        raise ConfigError(f"data.sampler is {name!r}, but must be one of {', '.join(samplers)}.")
    return samplers[name]


class BatchedSampler(Sampler):
    """All tasks of a meta-batch in about thirty operations on small arrays.

    A generator for every task would cost more than all else together. So a task's random numbers are those of
    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") seeded with the task's
    seed: the n-th is a function of seed and n alone, and they are computed for all tasks at once.
    """

    def prepare(self) -> None:
        """How many random numbers a task takes."""
        first = self.samples[0]
        self._alike = bool((self.samples == first).all())
        self._choose_classes = _Choice(len(self.samples), self.ways)
        self._choose_samples = _Choice(int(first) if self._alike else None, self.per_class)
        numbers = self._choose_classes.numbers + self.ways * self._choose_samples.numbers
        self._steps = np.arange(1, numbers + 1, dtype=np.uint64) * GAMMA

    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds, each from 0 to 2^64 - 1; see `Sampler`."""
        bits = self.random_bits(seeds)
        first = self._choose_classes.numbers
        classes = self._choose_classes(bits[:, :first])
        among = None if self._alike else self.samples[classes].reshape(-1)
        samples = self._choose_samples(bits[:, first:].reshape(-1, self._choose_samples.numbers), among)
        return samples.reshape(len(seeds), self.ways, -1) + self.starts[classes][:, :, None]

    def random_bits(self, seeds: Sequence[int]) -> NDArray[np.uint64]:
        """The first outputs of SplitMix64 from each seed, as many as a task takes, uniform 64-bit integers (T, ...)."""
        bits = np.array(seeds, dtype=np.uint64)[:, None] + self._steps
        bits ^= bits >> SHIFTS[0]
        bits *= FACTORS[0]
        bits ^= bits >> SHIFTS[1]
        bits *= FACTORS[1]
        bits ^= bits >> SHIFTS[2]
        return bits


class _Choice:
    """Ordered choice without replacement from the numbers 0 .. `among` - 1, every order equally likely.

    Sorting random keys is the fastest way from few numbers; from many it would make a key for each, so there each place
    takes one random number: the rank of its own among the numbers not chosen before.

    Args:
        among: how many numbers there are; None where each row has as many as it is told.
        count: how many of them to choose.
    """

    SORTED_UP_TO = 64
    """Measured: from more numbers, sorting takes longer."""

    def __init__(self, among: int | None, count: int) -> None:
        self.count = count
        self.sorts = among is not None and among <= self.SORTED_UP_TO
        self.numbers = among if among is not None and self.sorts else count
        """Random numbers that it takes."""
        self._left = self._leaves(np.array([among or 0]))

    def _leaves(self, among: NDArray[np.int64]) -> NDArray[np.float64]:
        """How many numbers each place chooses from (rows, `count`), as multiples of 2^-53."""
        left: NDArray[np.float64] = np.multiply(among[:, None] - np.arange(self.count), 2.0**-53, dtype=np.float64)
        return left

    def __call__(self, bits: NDArray[np.uint64], among: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """From uniform 64-bit integers (rows, `numbers`) to choices (rows, `count`), `among` so many, (rows,)."""
        if self.sorts:
            return bits.argsort(axis=1)[:, : self.count]
        left = self._left if among is None else self._leaves(among)
        ranks = ((bits >> TO_53_BITS) * left).astype(np.int64)  # with 53 bits a double stays below its limit
        chosen = np.ascontiguousarray(ranks.T)
        for place in range(self.count - 2, -1, -1):
            later = chosen[place + 1 :]
            later += later >= chosen[place]  # from ranks among what this place leaves to ranks among what it chose from
        return chosen.T


class Learn2LearnSampler(Sampler):
    """The reference: one task after another through learn2learn's own task transforms.

    They use Python's global generator, which is seeded for each task and then put back.
    """

    def prepare(self) -> None:
        """Hand the bookkeeping to learn2learn's transforms.

        Raises:
            ConfigError: learn2learn is not installed.
        """
        if not _learn2learn.installed():
            raise ConfigError(f"data.sampler is learn2learn, but {_learn2learn.MISSING}: set it to batched.")
        data = _learn2learn.load().data
        # The bookkeeping is given because MetaDataset would else load every sample; labels are integers because
        # RemapLabels goes through a set of them, whose order would change from process to process with strings.
        blocks = zip(self.starts.tolist(), self.samples.tolist(), strict=True)
        numbers = {label: list(range(start, start + count)) for label, (start, count) in enumerate(blocks)}
        dataset = data.MetaDataset(_Numbers(self.starts, int(self.samples.sum())), labels_to_indices=numbers)
        transforms = [
            data.transforms.NWays(dataset, n=self.ways),
            data.transforms.KShots(dataset, k=self.per_class),
            data.transforms.LoadData(dataset),
            data.transforms.RemapLabels(dataset),
            data.transforms.ConsecutiveLabels(dataset),
        ]
        self._tasks: Any = data.Taskset(dataset, task_transforms=transforms, num_tasks=-1, task_collate=np.array)

    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds; see `Sampler`."""
        return np.stack([self._sample(seed) for seed in seeds])

    def _sample(self, seed: int) -> NDArray[np.int64]:
        state = random.getstate()
        random.seed(seed)
        try:
            task: NDArray[np.int64] = self._tasks[0]
        finally:
            random.setstate(state)
        # ConsecutiveLabels has put each class's samples together, so the classes are an axis of their own.
        numbers, labels = task.reshape(self.ways, -1, 2).transpose(2, 0, 1)
        return numbers[labels[:, 0].argsort()]


class WithinGroups(Sampler):
    """Tasks whose classes are of one group, such as an alphabet; each group with enough classes is equally likely.

    Args:
        sampler: what samples within a group.
        groups: number of the group of each class, (classes,).
        samples, ways, per_class, starts: as of `Sampler`.
    """

    def __init__(
        self,
        sampler: type[Sampler],
        groups: NDArray[np.int64],
        samples: NDArray[np.int64],
        *,
        ways: int,
        per_class: int,
        starts: NDArray[np.int64],
    ) -> None:
        self._within = [
            sampler(samples[groups == group], ways=ways, per_class=per_class, starts=starts[groups == group])
            for group, size in zip(*np.unique(groups, return_counts=True), strict=True)
            if size >= ways
        ]
        super().__init__(samples, ways=ways, per_class=per_class, starts=starts)

    def prepare(self) -> None:
        """Nothing but what the samplers of the groups have done."""

    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds; see `Sampler`."""
        group = np.array([derive_seed("group", seed) % len(self._within) for seed in seeds])
        numbers = np.empty((len(seeds), self.ways, self.per_class), dtype=np.int64)
        for number in np.unique(group).tolist():
            numbers[group == number] = self._within[number](
                [s for s, g in zip(seeds, group, strict=True) if g == number]
            )
        return numbers


class _Numbers(Dataset[tuple[int, int]]):
    """Sample number -> (sample number, class number): all that the transforms need; the images stay in one tensor."""

    def __init__(self, starts: NDArray[np.int64], samples: int) -> None:
        self.order = starts.argsort()
        self.starts = starts[self.order]
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, int(self.order[self.starts.searchsorted(index, side="right") - 1])
