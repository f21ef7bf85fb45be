"""The merge's arithmetic, without processes: flat vectors, what the workers tell each other, and the plain mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dmaml_pl.errors import NonFiniteError
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.merge import MeanMerge
from tests.test_merge_properties import exchanged, report_of


def test_a_module_without_integers_packs_none() -> None:
    assert FlatState(nn.Linear(2, 2)).pack_integers().numel() == 0


def test_the_mean_merge_is_the_mean() -> None:
    start, mean = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(MeanMerge().merge(start, mean), mean)
    assert MeanMerge().weight({"share": 1.0}) == 1.0


@pytest.mark.parametrize("bfloat16", [False, True])
def test_what_a_worker_tells_of_its_run_reaches_every_worker(bfloat16: bool) -> None:
    series = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])]
    reports = [report_of(worker, loss=series[worker], seconds=3.1 + worker) for worker in range(2)]
    for merged in exchanged([1.0, 0.5], [torch.zeros(2)] * 2, torch.zeros(2), reports, bfloat16=bfloat16):
        assert torch.equal(merged.report["workers"]["loss"], torch.stack(series))
        assert merged.failures == []
        assert merged.metrics["weight"].tolist() == [1.0, 0.5]
        assert merged.metrics["tasks"].tolist() == [1.0, 2.0]
        assert torch.equal(merged.metrics["seconds"], torch.tensor([3.1, 4.1]))


def test_a_failure_reaches_every_worker_with_its_place() -> None:
    failure = NonFiniteError("the query loss", worker=1, run=7, iteration=0)
    reports = [report_of(0), report_of(1) | {"failure": failure}]
    for merged in exchanged([1.0, 1.0], [torch.zeros(2)] * 2, torch.zeros(2), reports, run=7, exclude=True):
        (told,) = merged.failures
        assert str(told) == str(failure)
        assert (told.worker, told.run, told.iteration) == (1, 7, 0)
