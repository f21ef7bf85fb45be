"""A meta-batch of tasks as tensors, and where tasks and samples come from. Knows nothing but tensors.

Legend: T tasks, S support samples of a task, Q query samples of a task, `...` the axes of one sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from dmaml_pl.errors import DataError


class Samples(NamedTuple):
    """Samples of T tasks with what is wanted of them.

    Attributes:
        x: inputs, (T, B, ...); in reinforcement learning observations.
        y: targets: (T, B) class numbers from 0 to N - 1, or (T, B, D) real values; in reinforcement learning tensors by
            name, such as action, advantage, log-probability.

    Examples:
        >>> Samples(torch.rand(4, 10, 1), torch.rand(4, 10, 1)).x.shape
        torch.Size([4, 10, 1])
    """

    x: Tensor
    y: Tensor | dict[str, Tensor]

    def tensors(self) -> list[Tensor]:
        """Inputs, then targets."""
        return [self.x, *(self.y.values() if isinstance(self.y, dict) else [self.y])]

    def map(self, change: Callable[[Tensor], Tensor]) -> Samples:
        """Every tensor changed alike."""
        if isinstance(self.y, dict):
            return Samples(change(self.x), {name: change(tensor) for name, tensor in self.y.items()})
        return Samples(change(self.x), change(self.y))


class TaskBatch(NamedTuple):
    """A meta-batch: each task's support set to adapt on, and its query set to be evaluated on.

    Attributes:
        support: one support set for all steps of the inner loop; or one a step, where the samples of a step depend on
            the step before (rollouts of each step's policy).
        query: the query set.
        numbers: number of each task, (T,), where tasks are numbered (validation, test); None in training.
        ways: N, classes of each task; 0 where targets are no class numbers.
        metrics: what its source tells of how it came about, by name, such as steps in environments; logged.

    Examples:
        >>> x, y = torch.rand(4, 10, 1), torch.rand(4, 10, 1)
        >>> tasks = TaskBatch.of(x[:, :5], y[:, :5], x[:, 5:], y[:, 5:])
        >>> tasks.tasks, tasks.support_x.shape
        (4, torch.Size([4, 5, 1]))
    """

    support: tuple[Samples, ...]
    query: Samples
    numbers: Tensor | None = None
    ways: int = 0
    metrics: dict[str, float] | None = None

    @classmethod
    def of(
        cls, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor, numbers: Tensor | None = None
    ) -> TaskBatch:
        """Tasks with one support set, (T, S, ...), and a query set, (T, Q, ...), as supervised learning has them.

        Every class that there is must be in the support sets: their largest class number is N - 1.
        """
        real = support_y.is_floating_point() or not support_y.numel()
        ways = 0 if real else int(support_y.max()) + 1
        return cls((Samples(support_x, support_y),), Samples(query_x, query_y), numbers, ways)

    @property
    def support_x(self) -> Tensor:
        """Inputs of the first support set, (T, S, ...)."""
        return self.support[0].x

    @property
    def support_y(self) -> Tensor:
        """Targets of the first support set, where they are one tensor."""
        return _one_tensor(self.support[0].y)

    @property
    def query_x(self) -> Tensor:
        """Inputs of the query sets, (T, Q, ...)."""
        return self.query.x

    @property
    def query_y(self) -> Tensor:
        """Targets of the query sets, where they are one tensor."""
        return _one_tensor(self.query.y)

    @property
    def tasks(self) -> int:
        """T, the number of tasks."""
        return self.query.x.shape[0]

    def support_of(self, step: int) -> Samples:
        """The support set of a step of the inner loop, from 0; further steps take the last one again."""
        return self.support[min(step, len(self.support) - 1)]

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
        if all(tensor.device == device for tensor in self.tensors()):
            return self
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> list[Tensor]:
        """Every tensor, in the order of the attributes."""
        found = [tensor for samples in (*self.support, self.query) for tensor in samples.tensors()]
        return found if self.numbers is None else [*found, self.numbers]

    def map(self, change: Callable[[Tensor], Tensor]) -> TaskBatch:
        """Every tensor changed alike."""
        support = tuple(samples.map(change) for samples in self.support)
        query = self.query.map(change)  # before the numbers: `with_tensors` reckons with the order of `tensors`
        numbers = None if self.numbers is None else change(self.numbers)
        return TaskBatch(support, query, numbers, self.ways, self.metrics)

    def map_inputs(self, change: Callable[[Tensor], Tensor]) -> TaskBatch:
        """The inputs of all samples changed alike."""
        support = tuple(samples._replace(x=change(samples.x)) for samples in self.support)
        return self._replace(support=support, query=self.query._replace(x=change(self.query.x)))

    def with_tensors(self, tensors: Sequence[Tensor]) -> TaskBatch:
        """A meta-batch of the same form that holds other tensors, in the order of `tensors()`."""
        left = iter(tensors)
        return self.map(lambda _: next(left))


def _one_tensor(y: Tensor | dict[str, Tensor]) -> Tensor:
    assert isinstance(y, Tensor), "asked for where targets are one tensor"  # noqa: S101
    return y


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

    def unscaled_inputs(self, x: Tensor) -> Tensor:
        """Inputs (..., inputs) that the network sees in the units of the data."""
        return x * x.new_tensor(self.x_scale) + x.new_tensor(self.x_mean)

    def values(self, output: Tensor) -> Tensor:
        """A network's output (..., D) in the units of the data."""
        return output * output.new_tensor(self.y_scale) + output.new_tensor(self.y_mean)


class Act(Protocol):
    """How the networks act: of support sets that a source has made, one a step, the networks adapted to them.

    A source of rollouts calls it to learn how each task's policy acts after so many steps, none at first; what it is
    given back leads from inputs (T, B, ...) to outputs. Gradients are not recorded: what acts and what is
    differentiated are two things.

    Attributes:
        steps: of adaptation that are asked for, each by a support set of its own.
        device: where the networks are.
    """

    @property
    def steps(self) -> int:
        """Of adaptation."""
        ...

    @property
    def device(self) -> torch.device:
        """Of the networks."""
        ...

    def __call__(self, supports: tuple[Samples, ...]) -> Callable[[Tensor], Any]:
        """The networks after as many steps as there are supports."""
        ...


@runtime_checkable
class TaskSource(Protocol):
    """Where training tasks come from: a pure function, so that there is no position to save or to restore.

    Where tasks depend on what the networks do, it is one of the weights, too, which `act` knows.
    """

    def sample(self, *, worker: int, run: int, iteration: int, act: Act) -> TaskBatch:
        """The meta-batch of one worker at one meta-iteration of one run; the same at every call.

        Args:
            worker: rank of the worker, from 0.
            run: number of the run since the start of the training, from 0.
            iteration: number of the meta-iteration within the run, from 0.
            act: how the networks act when they are adapted; supervised learning does not ask.
        """
        ...


@runtime_checkable
class ActingSource(Protocol):
    """A data module whose tasks have no samples before someone acts in them, such as environments."""

    horizon: int

    def trial(self, act: Act) -> TaskBatch:
        """A meta-batch of one task, by which a network is tried before the training."""
        ...


@runtime_checkable
class ActingTasks(Protocol):
    """Tasks that are evaluated on by acting in them.

    Attributes:
        tasks: how many, T.
        numbers: of each, (T,).
    """

    @property
    def tasks(self) -> int:
        """T."""
        ...

    @property
    def numbers(self) -> Tensor:
        """Of each task, (T,)."""
        ...

    def returns(self, act: Act) -> Tensor:
        """Return of each task after 0 .. `act.steps` steps of adaptation, (T, I + 1)."""
        ...

    def rollouts(self, act: Act) -> list[Any]:
        """What was done after 0 .. `act.steps` steps of adaptation, for figures, (I + 1)."""
        ...

    def film(self, act: Act, place: int) -> Any:
        """Pictures (L, height, width, 3) of the policy adapted to the task at a place; None where none are drawn."""
        ...

    def best_returns(self) -> Tensor | None:
        """The return of whoever knows each task, (T,); None where nobody can tell."""
        ...


@runtime_checkable
class SampleReader(Protocol):
    """A data module that can make a sample of a user's own picture, like those that it draws tasks of."""

    def read_sample(self, path: Path | str) -> Tensor:
        """The picture as a sample (...), as in training.

        Raises:
            DataError: names the file, which is not a picture that can be read.
        """
        ...


@runtime_checkable
class SampleFiles(Protocol):
    """A data module whose samples are files."""

    def query_files(self, split: Any, indices: Sequence[int]) -> list[list[str]] | None:
        """The files of the query samples of evaluated tasks (T, Q), in their order; None where they are not files."""
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
    """Join single tasks (no T axis) into a meta-batch, in their order.

    Raises:
        DataError: they are no tasks, or differ in their shapes.
    """
    if wrong := [type(task).__name__ for task in tasks if not isinstance(getattr(task, "query", None), Samples)]:
        raise DataError(f"sample_task gives a {wrong[0]}, but must give what TaskBatch.of makes.")
    if any(task.numbers is None for task in tasks):
        tasks = [task._replace(numbers=None) for task in tasks]
    columns = list(zip(*(task.tensors() for task in tasks), strict=True))
    for column in columns:
        if len(shapes := {tuple(tensor.shape) for tensor in column}) > 1:
            raise DataError(
                f"sample_task gives tasks whose tensors differ in shape ({shapes}), but must give equal ones."
            )
    return tasks[0].with_tensors([torch.stack(column) for column in columns])


def check_tasks(batch: TaskBatch) -> None:
    """Check that the axes of a meta-batch agree, that there are tasks in it, and that targets are finite numbers.

    Raises:
        DataError: names the tensor and the shape it should have.
    """
    if not (tasks := batch.tasks):
        raise DataError("The data gives a meta-batch without tasks: see to data.meta_batch.")
    names = ["support"] if len(batch.support) == 1 else [f"support[{step}]" for step in range(len(batch.support))]
    for name, samples in zip([*names, "query"], [*batch.support, batch.query], strict=True):
        targets = samples.y if isinstance(samples.y, dict) else {"": samples.y}
        named = {f"{name}_x": samples.x} | {f"{name}_y{key and f'[{key}]'}": y for key, y in targets.items()}
        for title, tensor in named.items():
            if tensor.requires_grad:
                raise DataError(f"{title} requires a gradient, but samples are given: detach it.")
            if tensor.ndim == 0 or tensor.shape[0] != tasks:
                raise DataError(f"{title} has shape {tuple(tensor.shape)}, but its first axis must hold {tasks} tasks.")
            if tensor.ndim < 2 or tensor.shape[1] != samples.x.shape[1] or tensor.shape[1] == 0:
                raise DataError(
                    f"{name}_x has shape {tuple(samples.x.shape)} and {title} {tuple(tensor.shape)}, "
                    "but their second axis must hold the same samples, at least one."
                )
        if isinstance(samples.y, torch.Tensor) and not bool(torch.isfinite(samples.y).all()):
            raise DataError(f"{name}_y holds values that are not finite numbers, of which no loss can be made.")
    if batch.numbers is not None and batch.numbers.shape != (tasks,):
        raise DataError(f"numbers has shape {tuple(batch.numbers.shape)}, but its first axis must hold {tasks} tasks.")
