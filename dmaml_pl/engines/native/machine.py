"""The native engine's C++, with its memory for tasks of one shape.

Legend: T tasks, Q query samples, N outputs, P parameters as the C++ has them, I adaptation steps.
"""

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from dmaml_pl.engines.native.blocks import Chain
from dmaml_pl.engines.native.library import SUFFIX, library
from dmaml_pl.tasks import TaskBatch


class Machine:
    """The C++ with its memory for tasks of one shape."""

    def __init__(self, chain: Chain, batch: TaskBatch, kind: torch.dtype, steps: int, *, is_classes: bool) -> None:
        found, suffix = library(), SUFFIX[str(kind).removeprefix("torch.")]
        assert not isinstance(found, str), "asked for before"  # noqa: S101
        self.kind, self.parameters, self.steps = kind, len(chain.index), steps
        self.outputs, self.is_classes = chain.stages[-1].filters, is_classes
        support, query = batch.support_x.shape[1], batch.query.x.shape[1]
        sizes = (ctypes.c_int64 * 8)(
            len(chain.stages), self.parameters, batch.tasks, support, query, steps, self.outputs, is_classes
        )
        fields = [value for stage in chain.stages for value in stage.fields()]
        eps = (ctypes.c_double * len(chain.stages))(*(stage.eps for stage in chain.stages))
        self._handle = getattr(found, f"make_{suffix}")(sizes, (ctypes.c_int64 * len(fields))(*fields), eps)
        self._run = getattr(found, f"run_{suffix}")
        weakref.finalize(self, getattr(found, f"free_{suffix}"), self._handle)

    def run(
        self, weights: Tensor, rates: Tensor, batch: TaskBatch, threads: int, *, second_order: bool, with_rates: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the tasks of the gradients by weights (P,) and rates (I, P); losses (T,), outputs (T, Q, N)."""
        query_y: Any = batch.query.y
        samples = [batch.support_x, batch.support_y, batch.query.x, query_y]
        given = [weights, rates, *(self._as_read(each, number % 2 == 1) for number, each in enumerate(samples))]
        tasks, query = batch.query.x.shape[:2]
        shapes: list[Any] = [self.parameters, (self.steps, self.parameters), tasks, (tasks, query, self.outputs)]
        found = [torch.empty(shape, dtype=self.kind) for shape in shapes]
        places = [tensor.data_ptr() for tensor in found]
        if not with_rates:
            places[1] = 0
        self._run(
            self._handle,
            threads,
            second_order,
            (ctypes.c_void_p * len(given))(*(tensor.data_ptr() for tensor in given)),
            (ctypes.c_void_p * len(found))(*places),
        )
        gradient, of_rates, losses, outputs = found
        return gradient, of_rates, losses, outputs

    def _as_read(self, tensor: Tensor, is_target: bool) -> Tensor:
        kind = torch.int64 if is_target and self.is_classes else self.kind
        return tensor.detach().to(kind).contiguous()
