"""Networks that act: run at every step of many rollouts, each task's with the weights that it was adapted to.

A rollout asks a small network hundreds of times, and starting its operations takes longer than computing them. So what
it does is recorded once, as plain tensor operations below `vmap`, and done again without the network. What no input
changes (transposed weights, a context that is multiplied by weights) is computed once for all steps.

`make_fx` would record as well, but registers a CUDA device that is not there, after which no process can be forked.

Legend: T tasks, B samples.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from dmaml_pl.algorithms.base import Weights
from dmaml_pl.engines.base import Tried
from dmaml_pl.engines.loop import NetworkTasks, at_once
from dmaml_pl.learner import MetaLearner
from dmaml_pl.objectives import Objective
from dmaml_pl.tasks import Samples, TaskBatch


class Acting:
    """Runs networks on all tasks at once with weights that stay; keeps what they do by the shape of the inputs.

    Args:
        objective: not asked; what an engine's tasks come with.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._programs: Tried[dict[Any, _Program]] = Tried()

    def with_weights(self, learner: MetaLearner, meta: Weights, fast: Weights) -> Callable[[Tensor], Any]:
        """The networks with each task's own weights: from inputs (T, B, ...) to outputs, without gradients."""
        network, programs = learner.network, self._programs.setdefault(learner, {})
        buffers = dict(network.named_buffers())
        tensors = [*buffers.values(), *meta.values(), *fast.values()]
        ready: dict[Any, Callable[[Tensor], Any]] = {}

        def outputs(x: Tensor) -> Any:
            with torch.no_grad():
                key = (x.shape, x.dtype, x.device, network.training, tuple(fast), _autocast(x))
                if key not in ready:
                    if key not in programs:
                        call = self._call(network, list(buffers), list(meta), list(fast))
                        programs[key] = _recorded(call, tensors, x)
                    ready[key] = programs[key].with_constants(tensors)
                return ready[key](x)

        return outputs

    def _call(self, network: nn.Module, *names: Sequence[str]) -> Callable[..., Any]:
        """The network as a function of buffers, meta-weights, each task's own weights, and inputs."""

        def call(*given: Tensor) -> Any:
            left = iter(given)
            buffers, meta, own = ({name: next(left) for name in some} for some in names)
            x = next(left)
            tasks = NetworkTasks(network, buffers, self._objective, TaskBatch((), Samples(x, x)), at_once)
            return tasks.run(meta, own, x)

        return call


def _autocast(x: Tensor) -> Any:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _Operation(NamedTuple):
    """An operation on numbered tensors.

    Attributes:
        function: of PyTorch.
        args: its arguments, without the tensors.
        kwargs: arguments by name, none of them a tensor.
        places: of an argument, and the number of the tensor, or of those of the list, that belongs there.
        results: numbers of the tensors that it gives.
    """

    function: Any
    args: list[Any]
    kwargs: dict[str, Any]
    places: list[tuple[int, int | list[int]]]
    results: list[int]

    def run(self, tensors: dict[int, Tensor]) -> None:
        """Do it, and add what it gives."""
        args = list(self.args)
        for place, number in self.places:
            args[place] = tensors[number] if isinstance(number, int) else [tensors[each] for each in number]
        found = self.function(*args, **self.kwargs)
        tensors.update(zip(self.results, (found,) if isinstance(found, Tensor) else found, strict=True))

    @property
    def takes(self) -> set[int]:
        """Numbers of the tensors that it is given."""
        numbers = ([number] if isinstance(number, int) else number for _, number in self.places)
        return {each for some in numbers for each in some}


class _Recorder(TorchDispatchMode):
    """Records what is done inside, with the tensors that are there before."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's to type
        self.operations: list[_Operation] = []
        self.tensors = list(given)
        """By number; all are kept, so that no other tensor comes to have the identity of one."""
        self._views: list[Tensor] = []
        self._numbers = {id(tensor): number for number, tensor in enumerate(given)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        is_view = func.is_view or func is torch.ops.aten._unsafe_view.default  # noqa: SLF001 - its name in PyTorch
        if is_view and isinstance(found, Tensor) and _alike(found, args[0]):
            self._numbers[id(found)] = self.number_of(args[0])
            self._views.append(found)
            return found
        places: list[tuple[int, int | list[int]]] = []
        for place, given in enumerate(args):
            if isinstance(given, Tensor):
                places.append((place, self.number_of(given)))
            elif isinstance(given, list | tuple) and given and all(isinstance(each, Tensor) for each in given):
                places.append((place, [self.number_of(each) for each in given]))
        args = [None if any(place == each for each, _ in places) else given for place, given in enumerate(args)]
        results = [self.number_of(each) for each in ((found,) if isinstance(found, Tensor) else found)]
        self.operations.append(_Operation(func, args, kwargs or {}, places, results))
        return found

    def number_of(self, tensor: Tensor) -> int:
        """The number of a tensor; one that is new is a constant, or what an operation gives."""
        number = self._numbers.setdefault(id(tensor), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        return number


def _alike(view: Tensor, of: Tensor) -> bool:
    """Whether a view of a tensor is that tensor again."""
    return (view.shape, view.stride(), view.storage_offset()) == (of.shape, of.stride(), of.storage_offset())


class _Program(NamedTuple):
    """What a network does.

    Attributes:
        once: operations on weights alone.
        each_time: those that depend on the inputs, or draw at random.
        inputs: number of the inputs' tensor; the weights' are those below it.
        known: numbers of the tensors that `each_time` takes and does not give.
        constants: tensors by number that are neither given nor a result.
        outputs: numbers of what the network gives.
        form: of what the network gives.
    """

    once: list[_Operation]
    each_time: list[_Operation]
    inputs: int
    known: list[int]
    constants: dict[int, Tensor]
    outputs: list[int]
    form: TreeSpec

    def with_constants(self, weights: Sequence[Tensor]) -> Callable[[Tensor], Any]:
        """The network with these weights, as a function of its inputs."""
        tensors = dict(enumerate(weights)) | self.constants
        for operation in self.once:
            operation.run(tensors)
        # Products of many small matrices that are transposed in memory take longer.
        known = {number: tensors[number].contiguous() for number in self.known}

        def outputs(x: Tensor) -> Any:
            tensors = known | {self.inputs: x}
            for operation in self.each_time:
                operation.run(tensors)
            return tree_unflatten([tensors[number] for number in self.outputs], self.form)

        return outputs


def _recorded(call: Callable[..., Any], weights: Sequence[Tensor], x: Tensor) -> _Program:
    """What `call` does with weights and inputs."""
    recorder = _Recorder([*weights, x])
    with recorder:
        found, form = tree_flatten(call(*weights, x))
    inputs, outputs = len(weights), [recorder.number_of(each) for each in found]
    changing, once, each_time = {inputs}, list[_Operation](), list[_Operation]()
    for operation in recorder.operations:
        if changing & operation.takes or torch.Tag.nondeterministic_seeded in operation.function.tags:
            changing.update(operation.results)
            each_time.append(operation)
        else:
            once.append(operation)
    results = {number for operation in recorder.operations for number in operation.results}
    asked = {number for operation in each_time for number in operation.takes} | {*outputs}
    constants = {n: recorder.tensors[n] for n in range(inputs + 1, len(recorder.tensors)) if n not in results}
    return _Program(once, each_time, inputs, sorted(asked - changing), constants, outputs, form)
