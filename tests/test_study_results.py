"""What is read off the curves of a study, checked on small numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmaml_pl.errors import ConfigError
from dmaml_pl.studies.plan import Point, Request, Training
from dmaml_pl.studies.report import as_shown, number
from dmaml_pl.studies.results import Curve, Group, curve_of, final, placed_on, smooth
from dmaml_pl.studies.search import runs_to
from dmaml_pl.studies.space import Space, corners, extremes, read_space
from dmaml_pl.studies.workers import PLOTTED

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
    assert curve.validations["computed_wall_seconds"].tolist() == [1.25, 4.25]
    assert curve.validations["run"].tolist() == [1, 3]
    assert curve.validations["tasks_seen"].tolist() == [40, 120]
    assert curve.validations["metric"].tolist() == [3.0, 1.0]


def test_a_time_that_was_not_measured_is_not_told_and_that_of_a_single_merge_is_all_of_it() -> None:
    curve = curve_of("a", 0, {30: 1.0}, without("train/run_cpu_seconds"), communicates=True)
    assert np.isnan(curve.total["computed_wall_seconds"])
    curve = curve_of("a", 0, {30: 1.0}, without("merge/transfer_seconds"), communicates=True)
    assert curve.total["wall_seconds"] == 7.5 + 1.5


def test_a_single_worker_merges_nothing() -> None:
    curve = curve_of("a", 0, {30: 1.0}, RUNS, communicates=False)
    assert curve.total["wall_seconds"] == 7.5
    assert curve.total["computed_wall_seconds"] == 3.5


def test_the_final_metric_is_the_mean_of_the_last_tenth() -> None:
    values = pd.Series(np.arange(25.0))
    assert final(values) == (23 + 24) / 2
    assert smooth(values)[:3].tolist() == [0.0, 0.5, 1.5]
    assert final(pd.Series([3.0, 7.0])) == 7.0


def test_better_is_down_for_losses_and_up_for_accuracies() -> None:
    only = (curve(0, 0.3, 0.5, 0.2),)
    assert Group("a", only, "max").cost(0.4)["run_to_target"] == 2
    assert Group("a", only, "min").cost(0.25)["run_to_target"] == 3
    assert Group("a", only, "min").cost(0.3)["run_to_target"] == 1


def test_a_validation_that_is_not_finite_is_not_left_out_of_a_mean() -> None:
    values = pd.Series([1.0] * 19 + [np.nan])
    assert np.isnan(final(values))
    assert np.isnan(smooth(values).iloc[-1])
    group = Group("a", (curve(0, 3.0, np.nan), curve(1, 1.0, 1.0)), "min")
    assert group.mean["metric"].iloc[0] == 2
    assert np.isnan(group.mean["metric"].iloc[1])
    assert np.isnan(group.summary("val/loss")["final val/loss"])


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
    summary = three.summary("val/loss")
    assert (summary["final val/loss"], summary["sd"]) == (2.5, 0.5)
    assert (summary["best val/loss"], summary["seeds"]) == (1.0, 3)


def test_the_cost_of_a_target_is_where_the_mean_over_the_seeds_reaches_it() -> None:
    group = Group("a", (curve(0, 3.0, 1.0, 1.0), curve(1, 3.0, 3.0, 1.0)), "min")
    assert group.cost(2.0)["run_to_target"] == 2
    assert group.cost(1.5)["tasks_seen_to_target"] == 120
    assert all(map(np.isnan, group.cost(0.5).values()))


def test_a_target_that_is_missed_costs_more_than_any_training_and_the_more_the_further() -> None:
    reached, near, far = curve(0, 3.0, 2.0, 1.0), curve(0, 3.0, 2.5, 1.2), curve(0, 3.0, 3.0, 3.0)
    costs = [runs_to(one, 1.0, "min", most=30) for one in (reached, near, far)]
    assert costs[0] == 3
    assert 30 < costs[1] < costs[2] < 60
    assert runs_to(far, 0.0, "min", most=30) == 60


values = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=3)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(values, values, st.floats(0.01, 100.0))
def test_what_reaches_a_target_costs_less_than_what_misses_it_and_what_ends_nearer_no_more_than_what_ends_further(
    one: list[float], other: list[float], target: float
) -> None:
    curves = [curve(0, *one), curve(0, *other)]
    costs = [runs_to(each, target, "min", most=3) for each in curves]
    missed = [min(metrics) > target for metrics in (one, other)]
    assert [each > 3 for each in costs] == missed
    if all(missed) and one[-1] <= other[-1]:
        assert costs[0] <= costs[1] * (1 + 1e-12)


def test_a_digest_changes_with_settings_and_not_with_comments(tmp_path: Path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("a: 1")
    request = Request("workers", "name", (str(config),), ("--b", "2"), seeds=1, jobs=1)
    training = Training(Point("one", 1), 0)
    digest = request.digest(training.overrides)
    config.write_text("a: 1  # one")
    assert (
        Request("scaling", "other", (str(config),), ("--b", "2"), seeds=9, jobs=3).digest(training.overrides) == digest
    )
    others = [
        request.digest(Training(Point("one", 2), 0).overrides),
        request.digest(Training(Point("one", 1), 1).overrides),
        request.digest(Training(Point("one", 1, (("c", "3"),)), 0).overrides),
        Request("workers", "name", (str(config),), ("--b", "3"), seeds=1, jobs=1).digest(training.overrides),
    ]
    config.write_text("a: 2")
    others.append(request.digest(training.overrides))
    assert digest not in others
    assert len(set(others)) == len(others)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (float("nan"), "-"), (3.0, "3"), (0.123456, "0.1235"), (12345.6, "12346")]
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_people_see_means_with_their_spread_ratios_with_two_decimals_and_texts_as_they_are() -> None:
    table = pd.DataFrame({"name": ["a", "b"], "m": [0.5, 2.0], "sd": [0.125, np.nan], "times_fewer": [1.0, np.nan]})
    shown = as_shown(table, {"who": "name", "what": ("m", "sd"), "times": "times_fewer", "m": "m"})
    assert shown == [
        {"who": "a", "what": "0.5 ± 0.12", "times": "1.00", "m": "0.5"},
        {"who": "b", "what": "2", "times": "-", "m": "2"},
    ]


# -- the space of a sweep ------------------------------------------------------------------------------------------


@pytest.fixture
def space(tmp_path: Path) -> Space:
    file = tmp_path / "space.yaml"
    file.write_text("a: {int: [5, 200], log: true}\nb: {float: [1e-4, 0.5]}\nc: {choice: [2, 8, 4]}\nd: {choice: [x]}")
    return read_space(file)


def test_the_corners_of_a_space_have_both_ends_of_each_range_and_every_choice(space: Space) -> None:
    assert corners(space) == [
        {"a": 5, "b": 1e-4, "c": "2", "d": "x"},
        {"a": 200, "b": 0.5, "c": "8", "d": "x"},
        {"a": 5, "b": 1e-4, "c": "4", "d": "x"},
    ]


def test_the_extremes_of_a_setting_are_the_ends_of_its_range_or_its_least_and_greatest_choice(space: Space) -> None:
    assert [extremes(name, space[name]) for name in "abc"] == [(5, 200), (1e-4, 0.5), (2, 8)]
    with pytest.raises(ConfigError, match="d is x, but must be numbers for a sweep with --target"):
        extremes("d", space["d"])


def test_trainings_in_environments_are_placed_on_their_steps_there_and_others_on_tasks() -> None:
    made = RUNS | {"train/env_steps": {10: 1000.0, 20: 2000.0, 30: 3000.0}}
    acting = Group("a", (curve_of("a", 0, {10: -3.0, 30: -1.0}, made, communicates=True),), "max")
    assert acting.mean["env_steps"].tolist() == [1000, 3000]
    assert acting.cost(-2.0)["env_steps_to_target"] == 3000
    assert acting.summary("val/return")["env_steps"] == 3000
    plain = Group("a", (curve(0, 3.0, 1.0, 1.0),), "min")
    assert "env_steps" not in plain.mean
    assert not {"env_steps", "env_steps_to_target"} & (plain.cost(2.0).keys() | plain.summary("val/loss").keys())
    assert placed_on([acting], PLOTTED) == ["run", "env_steps", "wall_seconds", "computed_wall_seconds"]
    assert placed_on([acting, plain], PLOTTED) == placed_on([plain], PLOTTED) == list(PLOTTED)
