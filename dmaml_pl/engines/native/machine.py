"""The native engine's C++, with its memory for tasks of one shape.

Legend: T tasks, Q query samples, N outputs, E elements of the tensors that the stages have, I adaptation steps.
"""

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dmaml_pl.engines.native.layout import Layout
from dmaml_pl.engines.native.library import SUFFIX, library
from dmaml_pl.tasks import TaskBatch

GROUPS = 16
"""Of tasks, whose sums are added up in their order, so that the number of threads does not change the bits."""

SMALL = 100e6
"""Floating-point operations of a meta-gradient of linear layers up to which one thread computes it.

That is a millisecond; to start a thread takes a twentieth of it, and longer where other processes want the cores.
"""


class Found(NamedTuple):
    """What became of a meta-batch.

    Attributes:
        loss: mean over the tasks.
        gradients: of it, by each tensor that the stages have.
        losses: of each task, (T,); until the next meta-batch.
        outputs: of the network for the query sets, (T, Q, N); until the next meta-batch.
        by_rates: the gradient of the loss by the rates, (I, E), where it is asked for.
    """

    loss: Tensor
    gradients: list[Tensor]
    losses: Tensor
    outputs: Tensor
    by_rates: Tensor | None


class Machine:
    """The C++ with its memory for tasks of one shape.

    Args:
        layout: the network.
        batch: tasks of that shape.
        steps: I.
        is_classes: whether targets are class numbers.

    Attributes:
        is_small: one thread is enough for it and for what surrounds it.
    """

    def __init__(self, layout: Layout, batch: TaskBatch, steps: int, *, is_classes: bool) -> None:
        kind = self._kind = layout.sources[0].dtype
        found, suffix = library(linear=layout.chain.is_linear), SUFFIX[str(kind).removeprefix("torch.")]
        assert not isinstance(found, str), "asked for before"  # noqa: S101
        stages, arrangement, query = layout.chain.stages, layout.arrangement, batch.query.x.shape[1]
        outputs = stages[-1].filters
        support = batch.support_x.shape[1]
        operations = 6 * batch.tasks * len(arrangement.places) * (3 * steps * support + query)
        self.is_small = layout.chain.is_linear and operations <= SMALL
        sizes = [len(stages), len(arrangement.index), batch.tasks, support, query, steps, outputs, is_classes]
        self._handle = getattr(found, f"make_{suffix}")(
            _numbers([*sizes, len(arrangement.counts), len(arrangement.places), 1 if self.is_small else GROUPS]),
            _numbers(arrangement.fields),
            (ctypes.c_double * len(stages))(*(stage.eps for stage in stages)),
            *(_numbers(each) for each in (arrangement.index.tolist(), arrangement.places.tolist(), arrangement.counts)),
        )
        self._run = getattr(found, f"run_{suffix}")
        weakref.finalize(self, getattr(found, f"free_{suffix}"), self._handle)
        self._kinds = [kind, kind, *[torch.int64 if is_classes else kind] * 2]
        self._loss = torch.empty((), dtype=kind)
        self._losses = torch.empty(batch.tasks, dtype=kind)
        self._outputs = torch.empty(batch.tasks, query, outputs, dtype=kind)
        self._rates: Tensor | None = None
        self._given, self._found = (
            (ctypes.c_void_p * (5 + len(arrangement.counts)))(),
            (ctypes.c_void_p * (4 + len(arrangement.counts)))(),
        )
        self._found[2:4] = [self._losses.data_ptr(), self._outputs.data_ptr()]

    def run(
        self, sources: Sequence[Tensor], rates: Tensor, batch: TaskBatch, threads: int, *, second_order: bool
    ) -> Found:
        """Mean gradients over the tasks.

        Args:
            sources: the tensors that the stages have.
            rates: of each element in each step, (I, E).
            batch: the tasks.
            threads: that may be taken.
            second_order: whether Hessians are taken into account.
        """
        kind, (x, y), (query_x, query_y) = self._kind, batch.support[0], batch.query
        samples: list[Any] = [x, query_x, y, query_y]
        if [each.dtype for each in samples] != self._kinds or not all(each.is_contiguous() for each in samples):
            samples = [_as_read(each, of) for each, of in zip(samples, self._kinds, strict=True)]
        # Rates that stay the same are there already.
        new = None if rates is self._rates else _as_read(rates, kind)
        self._given[:] = [
            None if new is None else new.data_ptr(),
            *[tensor.data_ptr() for tensor in (*samples, *sources)],
        ]
        loss, gradients = torch.empty_like(self._loss), [torch.empty_like(tensor) for tensor in sources]
        by_rates = torch.empty_like(rates) if rates.requires_grad else None
        self._found[:2] = [loss.data_ptr(), None if by_rates is None else by_rates.data_ptr()]
        self._found[4:] = [tensor.data_ptr() for tensor in gradients]
        self._run(self._handle, threads, second_order, self._given, self._found)
        self._rates = rates
        return Found(loss, gradients, self._losses, self._outputs, by_rates)


def _numbers(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _as_read(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor if tensor.dtype is kind and tensor.is_contiguous() else tensor.detach().to(kind).contiguous()
