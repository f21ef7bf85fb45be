"""Which classes and samples an image task is made of: drawn for many tasks at once, or by learn2learn's transforms.

Both draw from the same distribution: N of the classes, in an order that gives them their labels, and of each K + Q
samples, in an order that makes them support or query; every choice and order is as likely as any other. And in both a
task follows from its own seed alone, whatever is drawn before it or beside it. learn2learn's transforms define what a
task is, so they stay: tests compare the batched sampler with them, and `data.sampler` selects them.

Legend: T tasks, N ways, K shots, Q queries a class.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dmaml_pl import _learn2learn
from dmaml_pl.errors import ConfigError

SamplerName = Literal["batched", "learn2learn"]

# Of SplitMix64.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)
TO_53_BITS = np.uint64(11)


class Sampler(Protocol):
    """Draws tasks from classes that all have equally many samples; sample s of class c has the number c * samples + s.

    Its arguments are `classes` and `samples`, of each class, to draw from, `ways` (N), and `draws` (K + Q).
    """

    def __init__(self, *, classes: int, samples: int, ways: int, draws: int) -> None: ...

    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds, (T, N, K + Q), the classes in the order of their labels.

        Leaves every global random generator as it found it.
        """
        ...


def sampler_named(name: SamplerName) -> type[Sampler]:
    """The class of the sampler of that name.

    Raises:
        ConfigError: there is none of that name.
    """
    samplers: dict[str, type[Sampler]] = {"batched": BatchedSampler, "learn2learn": Learn2LearnSampler}
    if name not in samplers:
        raise ConfigError(f"data.sampler is {name!r}, but must be one of {', '.join(samplers)}.")
    return samplers[name]


class BatchedSampler:
    """All tasks of a meta-batch in about thirty operations on small arrays.

    A generator for every task would cost more than all else together. So a task's random numbers are those of
    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") seeded with the task's
    seed: the n-th is a function of seed and n alone, and they are computed for all tasks at once.

    See `Sampler` for the arguments.
    """

    def __init__(self, *, classes: int, samples: int, ways: int, draws: int) -> None:
        self.samples = samples
        self.ways = ways
        self._classes = _Draws(classes, ways)
        self._samples = _Draws(samples, draws)
        numbers = self._classes.numbers + ways * self._samples.numbers
        self._steps = np.arange(1, numbers + 1, dtype=np.uint64) * GAMMA

    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds, each from 0 to 2^64 - 1; see `Sampler`."""
        bits = self.random_bits(seeds)
        classes = self._classes(bits[:, : self._classes.numbers])
        samples = self._samples(bits[:, self._classes.numbers :].reshape(-1, self._samples.numbers))
        return samples.reshape(len(seeds), self.ways, -1) + self.samples * classes[:, :, None]

    def random_bits(self, seeds: Sequence[int]) -> NDArray[np.uint64]:
        """The first outputs of SplitMix64 from each seed, as many as a task takes, uniform 64-bit integers (T, ...)."""
        bits = np.array(seeds, dtype=np.uint64)[:, None] + self._steps
        bits ^= bits >> SHIFTS[0]
        bits *= FACTORS[0]
        bits ^= bits >> SHIFTS[1]
        bits *= FACTORS[1]
        bits ^= bits >> SHIFTS[2]
        return bits


class _Draws:
    """Ordered draws without replacement from the numbers 0 .. `among` - 1, all equally likely.

    Sorting random keys is the fastest way from few numbers; from many it would make a key for each, so there each draw
    takes one random number: its rank among the numbers not drawn before.

    Args:
        among: how many numbers there are.
        draws: how many of them to draw.
    """

    SORTED_UP_TO = 64
    """Measured: from more numbers, sorting takes longer."""

    def __init__(self, among: int, draws: int) -> None:
        self.draws = draws
        self.sorts = among <= self.SORTED_UP_TO
        self.numbers = among if self.sorts else draws
        """Random numbers that the draws take."""
        self._left = (among - np.arange(draws)) * 2.0**-53

    def __call__(self, bits: NDArray[np.uint64]) -> NDArray[np.int64]:
        """From uniform 64-bit integers (rows, `numbers`) to draws (rows, `draws`)."""
        if self.sorts:
            return bits.argsort(axis=1)[:, : self.draws]
        ranks = ((bits >> TO_53_BITS) * self._left).astype(np.int64)  # with 53 bits a double stays below its limit
        drawn = np.ascontiguousarray(ranks.T)
        for draw in range(self.draws - 2, -1, -1):
            later = drawn[draw + 1 :]
            later += later >= drawn[draw]  # from ranks among what this draw leaves to ranks among what it chose from
        return drawn.T


class Learn2LearnSampler:
    """The reference: one task after another through learn2learn's own task transforms.

    They draw from Python's global generator, which is seeded for each task and then put back.

    See `Sampler` for the arguments.
    """

    def __init__(self, *, classes: int, samples: int, ways: int, draws: int) -> None:
        self.ways = ways
        data = _learn2learn.load().data
        # The bookkeeping is given because MetaDataset would else load every sample; labels are integers because
        # RemapLabels goes through a set of them, whose order would change from process to process with strings.
        numbers = {label: list(range(label * samples, (label + 1) * samples)) for label in range(classes)}
        dataset = data.MetaDataset(_Samples(classes, samples), labels_to_indices=numbers)
        transforms = [
            data.transforms.NWays(dataset, n=ways),
            data.transforms.KShots(dataset, k=draws),
            data.transforms.LoadData(dataset),
            data.transforms.RemapLabels(dataset),
            data.transforms.ConsecutiveLabels(dataset),
        ]
        self._tasks: Any = data.Taskset(dataset, task_transforms=transforms, num_tasks=-1, task_collate=np.array)

    def __call__(self, seeds: Sequence[int]) -> NDArray[np.int64]:
        """Sample numbers of the tasks with these seeds; see `Sampler`."""
        return np.stack([self._draw(seed) for seed in seeds])

    def _draw(self, seed: int) -> NDArray[np.int64]:
        state = random.getstate()
        random.seed(seed)
        try:
            task: NDArray[np.int64] = self._tasks[0]
        finally:
            random.setstate(state)
        # ConsecutiveLabels has put each class's samples together, so the classes are an axis of their own.
        numbers, labels = task.reshape(self.ways, -1, 2).transpose(2, 0, 1)
        return numbers[labels[:, 0].argsort()]


class _Samples(Dataset[tuple[int, int]]):
    """Sample number -> (sample number, class number): all that the transforms need; the images stay in one tensor."""

    def __init__(self, classes: int, samples: int) -> None:
        self.classes = classes
        self.samples = samples

    def __len__(self) -> int:
        return self.classes * self.samples

    def __getitem__(self, index: int) -> tuple[int, int]:
        return index, index // self.samples
