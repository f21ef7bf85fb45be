"""A meta-batch of tasks as tensors, and where tasks and samples come from. Knows nothing but tensors.

Legend: T tasks, S support samples of a task, Q query samples of a task, `...` the axes of one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmaml_pl.errors import DataError


class TaskBatch(NamedTuple):
    """A meta-batch: each task's support set to adapt on, and its query set to be judged on.

    Attributes:
        support_x: inputs of the support sets, (T, S, ...).
        support_y: targets of the support sets: (T, S) class numbers from 0 to N - 1, or (T, S, D) real values.
        query_x: inputs of the query sets, (T, Q, ...).
        query_y: targets of the query sets, (T, Q) or (T, Q, D).
        numbers: number of each task, (T,), where tasks are numbered (validation, test); None in training.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    numbers: Tensor | None = None

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.support_x.shape[0]

    def task(self, number: int) -> TaskBatch:
        """The task at position `number`, without the leading T axis."""
        return self.map(lambda tensor: tensor[number])

    def chunks(self, size: int | None) -> Iterator[TaskBatch]:
        """The same tasks in meta-batches of at most `size`; all in one where that is None."""
        size = self.tasks if size is None else size
        for first in range(0, self.tasks, size):
            yield self.map(lambda tensor, first=first: tensor[first : first + size])  # type: ignore[misc]

    def to(self, device: torch.device) -> TaskBatch:
        """The same tasks on `device`; itself where they are there."""
        if all(tensor is None or tensor.device == device for tensor in self):
            return self
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def map(self, change: Callable[[Tensor], Tensor]) -> TaskBatch:
        """Every tensor changed alike."""
        support_x, support_y, query_x, query_y, numbers = self
        return TaskBatch(
            change(support_x),
            change(support_y),
            change(query_x),
            change(query_y),
            None if numbers is None else change(numbers),
        )


class Scaling(NamedTuple):
    """How the units of a regression's data become those that a network sees: (value - mean) / scale, column by column.

    Attributes:
        x_mean: of each input.
        x_scale: of each input.
        y_mean: of each target.
        y_scale: of each target.
    """

    x_mean: list[float]
    x_scale: list[float]
    y_mean: list[float]
    y_scale: list[float]

    def inputs(self, x: Tensor) -> Tensor:
        """Inputs (..., inputs) as the network sees them."""
        return (x - x.new_tensor(self.x_mean)) / x.new_tensor(self.x_scale)

    def targets(self, y: Tensor) -> Tensor:
        """Targets (..., D) as the network sees them."""
        return (y - y.new_tensor(self.y_mean)) / y.new_tensor(self.y_scale)

    def values(self, output: Tensor) -> Tensor:
        """A network's output (..., D) in the units of the data."""
        return output * output.new_tensor(self.y_scale) + output.new_tensor(self.y_mean)


@runtime_checkable
class TaskSource(Protocol):
    """Where training tasks come from: a pure function, so that there is no position to save or to restore."""

    def sample(self, *, worker: int, run: int, iteration: int) -> TaskBatch:
        """The meta-batch of one worker at one meta-iteration of one run; the same at every call.

        Args:
            worker: rank of the worker, from 0.
            run: number of the run since the start of the training, from 0.
            iteration: number of the meta-iteration within the run, from 0.
        """
        ...


@runtime_checkable
class SampleReader(Protocol):
    """A data module that can make a sample of a user's own picture, like those that it draws tasks of."""

    def read_sample(self, path: Path) -> Tensor:
        """The picture as a sample (...), as in training.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        ...


@runtime_checkable
class NamedColumns(Protocol):
    """A data module whose samples are rows of a table, the columns of which have names."""

    inputs: list[str]
    targets: list[str]


class LabelledSamples(NamedTuple):
    """Training samples with their classes, apart from any task.

    Attributes:
        x: samples, (B, ...).
        y: number of each one's class, from 0 to `classes` - 1, (B,).
        classes: that the training split has.
    """

    x: Tensor
    y: Tensor
    classes: int


@runtime_checkable
class LabelledSource(Protocol):
    """A data module that can tell of which of its training classes a sample is, whatever label a task gives it.

    A network can be trained on it without meta-learning, as the baseline to compare with.
    """

    def sample_labelled(self, samples: int, seed: int) -> LabelledSamples:
        """`samples` of the training split, as a pure function of the arguments."""
        ...


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, the same on every machine.

    Neighbouring inputs give unrelated seeds, which `seed + rank` would not.
    """
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def derive_seeds(*parts: int | str, count: int) -> list[int]:
    """`derive_seed(*parts, number)` for the numbers 0 .. `count` - 1, in a fraction of the time."""
    common = hashlib.blake2b("".join(f"{part}\0" for part in parts).encode(), digest_size=8)
    seeds = []
    for number in range(count):
        own = common.copy()
        own.update(b"%d" % number)
        seeds.append(int.from_bytes(own.digest(), "big") >> 1)
    return seeds


def stack_tasks(tasks: list[TaskBatch]) -> TaskBatch:
    """Join single tasks (no T axis) into a meta-batch, in their order."""
    return TaskBatch(
        torch.stack([task.support_x for task in tasks]),
        torch.stack([task.support_y for task in tasks]),
        torch.stack([task.query_x for task in tasks]),
        torch.stack([task.query_y for task in tasks]),
        None
        if any(task.numbers is None for task in tasks)
        else torch.stack([task.numbers for task in tasks if task.numbers is not None]),
    )


def check_tasks(batch: TaskBatch) -> None:
    """Check that the axes of a meta-batch agree.

    Raises:
        DataError: names the tensor and the shape it should have.
    """
    tasks = batch.tasks
    for name, tensor in zip(batch._fields, batch, strict=True):
        if tensor is not None and (tensor.ndim == 0 or tensor.shape[0] != tasks):
            raise DataError(f"{name} has shape {tuple(tensor.shape)}, but its first axis must hold {tasks} tasks.")
    for part in ("support", "query"):
        x, y = getattr(batch, f"{part}_x"), getattr(batch, f"{part}_y")
        if y.ndim < 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
            raise DataError(
                f"{part}_x has shape {tuple(x.shape)} and {part}_y {tuple(y.shape)}, "
                "but their second axis must hold the same samples, at least one."
            )
