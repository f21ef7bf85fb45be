"""How often workers speak to each other, counted without a second process (see `tests/mocked_group.py`)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from dmaml_pl import DMAMLStrategy, OuterOptimizerMerge, TaskParallelStrategy, TaskWeightedMerge
from tests.mocked_group import META_ITERATION, Trace, mocked
from tests.recipes import small_data, small_maml, small_trainer
from tests.test_dmaml import WithBuffers

MERGES: dict[str, dict[str, Any]] = {
    "mean": {"moments": "keep"},
    "moments averaged": {"moments": "average"},
    "moments reset": {"moments": "reset"},
    "outer optimizer": {"merge": OuterOptimizerMerge()},
    "weighted by tasks": {"merge": TaskWeightedMerge()},
    "bfloat16": {"moments": "keep", "transfer_dtype": "bfloat16"},
    "overlapping": {"moments": "keep", "overlap": True},
    "not finite left out": {"on_non_finite": "exclude"},
}


def _train(strategy: type[Any], monkeypatch: pytest.MonkeyPatch, network: Any = None, **settings: Any) -> Trace:
    kind, trace = mocked(strategy, 3, monkeypatch)
    module = small_maml(network, meta_optimizer=lambda params: torch.optim.Adam(params, lr=1e-2))
    trainer = small_trainer(devices=3, max_steps=15, strategy=kind(run_length=5, **settings), callbacks=[trace])
    trainer.fit(module, small_data())
    assert trainer.world_size == 3
    return trace


def _training(trace: Trace) -> list[str]:
    """From the first meta-iteration to the end of the last run."""
    first = trace.events.index(META_ITERATION)
    return trace.events[first : len(trace.events) - trace.events[::-1].index("run")]


@pytest.mark.parametrize("settings", MERGES.values(), ids=MERGES)
def test_a_merge_is_one_all_reduce_and_a_run_makes_no_collective_call(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = _training(_train(DMAMLStrategy, monkeypatch, **settings))
    assert events.count(META_ITERATION) == 15
    assert events.count("all_reduce") == events.count("run") == 3
    for before, after in pairwise(index for index, event in enumerate(events) if event == META_ITERATION):
        between = events[before + 1 : after]
        assert not between or between[:2] == ["all_reduce", "run"], "only the end of a run stands between"


def test_parallel_tasks_make_one_all_reduce_a_meta_iteration_and_one_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    events = _training(_train(TaskParallelStrategy, monkeypatch))
    run = [*["all_reduce", META_ITERATION] * 5, "all_reduce"]
    assert [event for event in events if event in run] == (run * 3)[1:]  # the first one stands before


@pytest.mark.parametrize("strategy", [DMAMLStrategy, TaskParallelStrategy])
def test_at_the_start_every_parameter_and_buffer_is_broadcast_once(
    strategy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = WithBuffers()
    trace = _train(strategy, monkeypatch, network)
    tensors = [tensor.numel() for tensor in [*network.parameters(), *network.buffers()]]
    begins = [at for at in range(len(trace.sizes)) if trace.sizes[at : at + len(tensors)] == tensors]
    assert len(begins) == 1


def _bytes(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> float:
    with monkeypatch.context() as patch:
        trace = _train(DMAMLStrategy, patch, **settings)
    torch.distributed.destroy_process_group()
    return float(trace.reports[0]["merge"]["merge/bytes"])


def test_averaged_moments_go_along_in_the_same_all_reduce_and_bfloat16_halves_the_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters = [parameter.numel() for parameter in small_maml().parameters()]
    kept = _bytes(monkeypatch, moments="keep")
    more = _bytes(monkeypatch, moments="average") - kept
    assert more == 4 * (2 * sum(parameters) + len(parameters))  # Adam's two moments of each value, and its step counts
    metrics = kept - 4 * sum(parameters)
    assert _bytes(monkeypatch, moments="keep", transfer_dtype="bfloat16") == 2 * sum(parameters) + 1.5 * metrics
