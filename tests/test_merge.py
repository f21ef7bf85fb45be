"""The merge's arithmetic, without processes: flat vectors, the workers' table, and the plain mean."""

from __future__ import annotations

import torch
from torch import nn

from dmaml_pl.errors import NonFiniteError
from dmaml_pl.strategies.flat import FlatState
from dmaml_pl.strategies.merge import MeanMerge
from dmaml_pl.strategies.worker_table import METRICS, pack_row, unpack_table


def test_a_module_without_integers_packs_none() -> None:
    assert FlatState(nn.Linear(2, 2)).pack_integers().numel() == 0


def test_the_mean_merge_is_the_mean() -> None:
    start, mean = torch.zeros(3), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(MeanMerge().merge(start, mean), mean)
    assert MeanMerge().weight({"share": 1.0}) == 1.0


def test_the_sum_of_the_rows_is_the_table_of_all_workers() -> None:
    series = [torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0, 6.0]])]
    like = torch.zeros(1)
    rows = [
        pack_row(
            worker=worker,
            workers=2,
            metrics=dict(zip(METRICS, (1.0, 0.5 * worker, 12.0, 3.0, 3.0 + worker, 2.0, 0.25), strict=True)),
            failure=None,
            series=series[worker],
            like=like,
        )
        for worker in range(2)
    ]
    table = unpack_table(rows[0] + rows[1], workers=2, run=0, shape=(1, 3))
    assert torch.equal(table.series, torch.stack(series))
    assert table.failures == []
    assert table.metrics["weight"].tolist() == [1.0, 1.0]
    assert table.metrics["squared_displacement"].tolist() == [0.0, 0.5]
    assert table.metrics["tasks"].tolist() == [12.0, 12.0]
    assert table.metrics["seconds"].tolist() == [3.0, 4.0]
    assert table.metrics["transfer_seconds"].tolist() == [0.25, 0.25]


def test_a_failure_reaches_every_worker_with_its_place() -> None:
    like, series, none = torch.zeros(1), torch.zeros(1, 3), dict.fromkeys(METRICS, 0.0)
    failure = NonFiniteError("the query loss", worker=1, run=7, iteration=0)
    rows = [
        pack_row(worker=0, workers=2, metrics=none, failure=None, series=series, like=like),
        pack_row(worker=1, workers=2, metrics=none, failure=failure, series=series, like=like),
    ]
    (told,) = unpack_table(rows[0] + rows[1], workers=2, run=7, shape=(1, 3)).failures
    assert str(told) == str(failure)
    assert (told.worker, told.run, told.iteration) == (1, 7, 0)
