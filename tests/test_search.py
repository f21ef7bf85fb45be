"""What a sweep asks for, whether or not it was stopped on its way: Optuna's trials, without trainings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies.ledger import Child
from dmaml_pl.studies.plan import Request, Training
from dmaml_pl.studies.search import Search, SearchSettings
from dmaml_pl.studies.study import Study

SPACE = {
    "rate": FloatDistribution(1e-3, 1.0, log=True),
    "length": IntDistribution(1, 9),
    "rule": CategoricalDistribution(("mean", "outer")),
}
DIVERGED, FAILED = "NonFiniteError: loss", "a worker ended with exit code 1"


class Ledger:
    """Tells of trainings whose loss is the rate times the length, after one run."""

    def history(self, child: Child, metric: str) -> dict[int, float]:
        values = dict(child.training.point.settings)
        return (
            {1: float(values["rate"]) * float(values["length"]) + child.training.seed} if "loss" in metric else {1: 1.0}
        )


def search(folder: Path, *, target: float | None = None) -> Search:
    """A search as a command begins it."""
    (folder / "a.yaml").touch()
    base = SimpleNamespace(
        metric="val/loss", better="min", whole=lambda name: 10, run_length_setting="model.run_length"
    )
    study: Any = SimpleNamespace(folder=folder, base=base, ledger=Ledger())
    study.request = Request("sweep", "s", (str(folder / "a.yaml"),), (), seeds=2, jobs=1)
    return Search(1, cast("Study", study), SearchSettings(SPACE, 12, 4, 0, target))


def make(some: Search, *numbers: int, errors: dict[int, str] | None = None) -> None:
    """Make trials, in which worker 0's training of the second seed may go wrong."""
    for number in numbers:
        trial, point = some.ask(number)
        error = (errors or {}).get(number, "")
        some.tell(trial, [Child(Training(point, 0), "a"), Child(Training(point, 1), "b", error)])


def tried(some: Search) -> list[dict[str, Any]]:
    return [trial.values for trial in some.trials]


def test_a_sweep_that_was_stopped_asks_for_the_settings_of_one_that_was_not(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = search(tmp_path / "whole")
    make(whole, *range(1, 13))
    assert len({str(values) for values in tried(whole)}) == 12
    make(search(tmp_path / "stopped"), *range(1, 6))
    search(tmp_path / "stopped").ask(1)
    again = search(tmp_path / "stopped")
    make(again, *range(1, 6))
    again.ask(6)  # asked for, and stopped before its trainings had ended
    last = search(tmp_path / "stopped")
    make(last, *range(1, 13))
    assert tried(last) == tried(whole)
    assert [t.scores.tolist() for t in last.trials] == [t.scores.tolist() for t in whole.trials]
    assert last.best is not None
    assert last.best.scores.mean() == min(trial.scores.mean() for trial in last.trials)


def test_a_trial_with_a_failed_training_has_no_score_until_it_is_made_again(tmp_path: Path) -> None:
    first = search(tmp_path)
    make(first, 1, 2, 3, errors={2: FAILED})
    assert [len(trial.scores) for trial in first.trials] == [2, 0, 2]
    assert [trial.state.is_finished() for trial in first.optuna_study.trials] == [True, False, True]
    again = search(tmp_path)
    make(again, 1, 2, 3)
    assert tried(again) == tried(first)
    assert [len(trial.scores) for trial in again.trials] == [2, 2, 2]
    assert all(trial.state.is_finished() for trial in again.optuna_study.trials)


def test_a_trial_with_a_training_that_diverged_is_the_worst_and_not_the_best(tmp_path: Path) -> None:
    some = search(tmp_path)
    make(some, 1, 2, errors={1: DIVERGED})
    assert some.trials[0].scores.mean() == float("inf")
    assert some.best is some.trials[1]


def test_another_objective_is_another_search_with_the_same_first_settings(tmp_path: Path) -> None:
    first, other = search(tmp_path), search(tmp_path, target=0.5)
    make(first, *range(1, 6))
    make(other, *range(1, 5))
    assert tried(other) == tried(first)[:4]  # as many as are sampled at random
    assert len(first.optuna_study.trials) == 5
    assert len(other.optuna_study.trials) == 4


def test_a_file_that_optuna_cannot_read_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "optuna.journal").write_text("no journal\n")
    with pytest.raises(TrackingError, match=r"optuna\.journal, in which Optuna keeps its trials, cannot be used"):
        search(tmp_path).ask(1)


def test_a_lock_that_a_killed_command_has_left_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "optuna.journal").touch()
    (tmp_path / "optuna.journal.lock").symlink_to(tmp_path / "optuna.journal")
    some = search(tmp_path)
    make(some, 1)  # Optuna would wait for half a minute, and warn
    assert some.best is some.trials[0]
