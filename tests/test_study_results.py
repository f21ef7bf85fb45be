"""What is read off the curves of a study, checked on small numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dmaml_pl.studies.plan import Point, Request, Training
from dmaml_pl.studies.results import NO_CPU, NO_TRANSFER, Curve, Group, curve_of, final, first_reached, smooth
from dmaml_pl.studies.search import cost
from dmaml_pl.studies.tables import markdown, number

RUNS = {
    "train/run": {10: 1.0, 20: 2.0, 30: 3.0},
    "train/tasks_seen": {10: 40.0, 20: 80.0, 30: 120.0},
    "train/run_seconds": {10: 2.0, 20: 2.5, 30: 3.0},
    "train/run_cpu_seconds": {10: 1.0, 20: 1.0, 30: 1.5},
    "merge/seconds": {10: 0.5, 20: 0.5, 30: 0.5},
    "merge/transfer_seconds": {10: 0.25, 20: 0.25, 30: 0.25},
}


def without(*names: str) -> dict[str, dict[int, float]]:
    return {name: {} if name in names else history for name, history in RUNS.items()}


def test_the_computed_wall_time_is_the_slowest_workers_time_on_a_core_and_the_merge_summed_over_runs() -> None:
    curve = curve_of("a", 0, {10: 3.0, 30: 1.0}, RUNS, communicates=True)
    assert curve.total["wall_seconds"] == 2.0 + 2.5 + 3.0 + 3 * 0.25
    assert curve.total["computed_wall_seconds"] == 1.0 + 1.0 + 1.5 + 3 * 0.25
    assert curve.at["computed_wall_seconds"].tolist() == [1.25, 4.25]
    assert curve.at["run"].tolist() == [1, 3]
    assert curve.at["tasks_seen"].tolist() == [40, 120]
    assert curve.metric.tolist() == [3.0, 1.0]
    assert curve.notes == ()


def test_what_was_not_measured_is_replaced_and_told() -> None:
    runs = without("train/run_cpu_seconds", "merge/transfer_seconds")
    curve = curve_of("a", 0, {30: 1.0}, runs, communicates=True)
    assert curve.total["computed_wall_seconds"] == curve.total["wall_seconds"] == 7.5 + 1.5
    assert curve.notes == (NO_CPU, NO_TRANSFER)


def test_a_single_worker_merges_nothing() -> None:
    curve = curve_of("a", 0, {30: 1.0}, RUNS, communicates=False)
    assert curve.total["wall_seconds"] == 7.5
    assert curve.total["computed_wall_seconds"] == 3.5


def test_the_final_metric_is_the_mean_of_the_last_tenth() -> None:
    values = np.arange(25.0)
    assert final(values) == (23 + 24) / 2
    assert smooth(values)[:3].tolist() == [0.0, 0.5, 1.5]
    assert final(np.array([3.0, 7.0])) == 7.0


def test_better_is_down_for_losses_and_up_for_accuracies() -> None:
    values = np.array([0.2, 0.5, 0.4])
    assert first_reached(values, 0.45, "max") == 1
    assert first_reached(values, 0.3, "min") == 0
    assert first_reached(values, 0.6, "max") is None


def curve(seed: int, *metric: float) -> Curve:
    steps = dict(zip((10, 20, 30), metric, strict=False))
    return curve_of("a", seed, steps, RUNS, communicates=True)


def test_the_band_is_a_standard_deviation_of_three_seeds_and_the_range_of_two() -> None:
    two = Group("a", (curve(0, 1.0, 2.0), curve(1, 3.0, 2.5)), "min")
    low, high = two.band
    assert (low.tolist(), high.tolist()) == ([1.0, 2.0], [3.0, 2.5])
    three = Group("a", (*two.curves, curve(2, 5.0, 3.0)), "min")
    low, high = three.band
    assert (low.tolist(), high.tolist()) == ([1.0, 2.0], [5.0, 3.0])
    assert three.best == 1.0


def test_the_cost_of_a_target_is_where_the_mean_over_the_seeds_reaches_it() -> None:
    group = Group("a", (curve(0, 3.0, 1.0, 1.0), curve(1, 3.0, 3.0, 1.0)), "min")
    assert group.cost(2.0)["run"] == 2
    assert group.cost(1.5)["tasks_seen"] == 120
    assert group.cost(0.5) == {}


def test_a_target_that_is_missed_costs_more_than_any_training_and_the_more_the_further() -> None:
    reached, near, far = curve(0, 3.0, 2.0, 1.0), curve(0, 3.0, 2.5, 1.2), curve(0, 3.0, 3.0, 3.0)
    costs = [cost(one, 1.0, "run", "min", most=30) for one in (reached, near, far)]
    assert costs[0] == 3
    assert 30 < costs[1] < costs[2] < 60
    assert cost(far, 0.0, "run", "min", most=30) == 60


def test_a_digest_changes_with_settings_and_not_with_comments(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("a: 1")
    request = Request("workers", "name", (str(config),), ("--b", "2"), seeds=1, jobs=1)
    training = Training(Point("one", 1), 0)
    digest = training.digest(request, ())
    config.write_text("a: 1  # one")
    assert training.digest(Request("scaling", "other", (str(config),), ("--b", "2"), seeds=9, jobs=3), ()) == digest
    others = [
        Training(Point("one", 2), 0).digest(request, ()),
        Training(Point("one", 1), 1).digest(request, ()),
        Training(Point("one", 1, (("c", "3"),)), 0).digest(request, ()),
        training.digest(Request("workers", "name", (str(config),), ("--b", "3"), seeds=1, jobs=1), ()),
        training.digest(request, (("model.evaluation_steps", "1"),)),
    ]
    config.write_text("a: 2")
    others.append(training.digest(request, ()))
    assert digest not in others
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (float("nan"), "-"), (3.0, "3"), (0.123456, "0.1235"), (12345.6, "12346")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_markdown_table_lines_up() -> None:
    assert markdown([{"a": "1", "long": "2"}, {"a": "333", "long": "4"}]) == (
        "| a   | long |\n|-----|------|\n| 1   | 2    |\n| 333 | 4    |"
    )
