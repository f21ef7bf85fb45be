"""The DMAML strategy: workers make runs alone, and merge their meta-weights at the end of each.

Soulier, "Distributed Model-Agnostic Meta-Learning", master thesis, TH Koeln 2020. The scheme is that of local SGD
(Stich 2019, arXiv:1805.09767) with a meta-learner as the local optimizer.

What it promises beside what every strategy with workers does (`workers.py`): no worker waits for another within a
run; at the run's end there is one all-reduce, after which all workers hold bit-identical weights and buffers; with one
worker and the plain mean nothing is done at all.

Legend: P floating-point values of the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.merge import MeanMerge, MergeRule
from dmaml_pl.strategies.payload import WorkerTable
from dmaml_pl.strategies.workers import WorkerStrategy


class DMAMLStrategy(WorkerStrategy):
    """Lets W workers train alone for a run of H meta-iterations, then merges their meta-weights, and so on.

    The workers' own optimizer moments are kept over a merge.

    Args:
        run_length: H, meta-iterations of a run; None takes the module's own (`model.run_length`).
        merge: how the workers' weights become one; the plain mean of the thesis by default.
        timeout: seconds that a worker waits for the others at a merge before it gives up. Must exceed the time by
            which the slowest worker's run is longer than the fastest's, and the start-up of all workers.
        process_group_backend: PyTorch's communication backend; by default "gloo" on CPUs and "nccl" on GPUs.
        start_method: how Lightning starts workers on this machine: "popen" runs the same command again, "spawn" and
            "fork" also work in a notebook.

    Raises:
        ConfigError: a setting out of its range.
    """

    strategy_name = "dmaml"

    def __init__(
        self,
        run_length: int | None = None,
        merge: MergeRule | None = None,
        timeout: float = 600.0,
        process_group_backend: str | None = None,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
    ) -> None:
        super().__init__(run_length, timeout, process_group_backend, start_method)
        self.merge_rule = MeanMerge() if merge is None else merge

    def _acts_alone(self) -> bool:
        return self.merge_rule.acts_alone

    def _merged_state(self) -> FlatState:
        return FlatState(self._module())

    def _end_of_run(self, state: FlatState, start: Tensor, report: RunReport) -> RunReport:
        if self.world_size == 1:
            state.unpack_floats(self._apply_rule(start, state.pack_floats(), state.parameter_size))
            return report
        mean, integers, table = self._exchange(state, start, report, self.merge_rule.weight(report))
        state.unpack_floats(self._apply_rule(start, mean, state.parameter_size))
        state.unpack_integers(integers)
        report["merge"]["merge/drift"] = _drift(table, mean - start)
        return report

    def _apply_rule(self, start: Tensor, mean: Tensor, size: int) -> Tensor:
        """The rule decides about the parameters, the first `size` values; buffers are averaged whatever the rule."""
        return torch.cat([self.merge_rule.merge(start[:size], mean[:size]), mean[size:]])

    def _own_state(self) -> dict[str, Any]:
        return {"merge": self.merge_rule.state_dict()}

    def _load_own_state(self, kept: Mapping[str, Any]) -> None:
        self.merge_rule.load_state_dict(kept.get("merge", {}))


def _drift(table: WorkerTable, way: Tensor) -> float:
    """Root mean square distance of the workers' weights from their mean.

    From mean |d_i|^2 - |mean d_i|^2 with d_i the way that worker i went, which needs no second all-reduce.
    """
    share = (table.weight / table.weight.sum()).double()
    spread = (share * table.squared_way.double()).sum() - way.double().square().sum()
    return float(spread.clamp(min=0).sqrt())
