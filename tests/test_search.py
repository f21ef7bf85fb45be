"""What a sweep asks for, whether or not it was stopped on its way: Optuna's trials, without trainings."""

from __future__ import annotations

import multiprocessing
import platform
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from dmaml_pl.errors import TrackingError
from dmaml_pl.studies import attempts
from dmaml_pl.studies.attempts import OWNER
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
        loss = float(values["rate"]) * float(values["length"]) + child.training.seed
        return {1: loss, 4: loss} if "loss" in metric else {1: 1.0}


def search(
    folder: Path, *, target: float | None = None, trials: int = 12, storage: str | None = None, prunes: bool = False
) -> Search:
    """A search as a command begins it."""
    (folder / "a.yaml").touch()
    base = SimpleNamespace(metric="val/loss", better="min", run_length_setting="model.run_length", seed=0)
    base.whole = lambda name: 10
    base.find = lambda name: 8
    study: Any = SimpleNamespace(folder=folder, base=base, ledger=Ledger())
    study.request = Request("sweep", "s", (str(folder / "a.yaml"),), (), seeds=2, jobs=1)
    study.digest = lambda training: training.label
    study.trainings = lambda points: [Training(point, seed) for point in points for seed in range(2)]
    study.known = lambda trainings, **_: [Child(training, "a") for training in trainings]
    return Search(1, cast("Study", study), SearchSettings(SPACE, trials, 4, 0, target, storage, prunes))


def make(some: Search, *, upto: int = 12, errors: dict[int, str] | None = None) -> None:
    """Make trials, in which worker 0's training of the second seed may go wrong."""
    while len(some.trials) < upto and (asked := some.ask()):
        trial, point = asked
        error = (errors or {}).get(trial.number, "")
        some.tell(trial, [Child(Training(point, 0), "a"), Child(Training(point, 1), "b", error)])


def again(folder: Path, **settings: Any) -> Search:
    """The search of the next command, after the one before was killed: what that has begun is its no more."""
    some = search(folder, **settings)
    for attempt in some.attempts.optuna_study.trials:
        if attempt.state == TrialState.RUNNING:
            process = (platform.node(), 2**22 + 1, 1.0)  # of which there is none
            some.attempts.optuna_study._storage.set_trial_user_attr(attempt._trial_id, OWNER, process)
    return some


def tried(some: Search) -> list[dict[str, Any]]:
    some.collect()
    return [trial.values for trial in some.trials]


def states(some: Search) -> list[str]:
    return [attempt.state.name for attempt in some.attempts.optuna_study.trials]


def test_a_sweep_that_was_stopped_asks_for_the_settings_of_one_that_was_not(tmp_path: Path) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = search(tmp_path / "whole")
    make(whole)
    assert len({str(values) for values in tried(whole)}) == 12
    make(search(tmp_path / "stopped"), upto=5)
    then = again(tmp_path / "stopped")
    make(then, upto=2)
    then.ask()  # asked for, and stopped before its trainings had ended
    last = again(tmp_path / "stopped")
    make(last)
    assert [trial.number for trial in last.trials] == [8, 9, 10, 11, 12]
    assert tried(last) == tried(whole)
    assert [t.scores.tolist() for t in last.trials] == [t.scores.tolist() for t in whole.trials]
    assert last.best is not None
    assert last.best.scores.mean() == min(trial.scores.mean() for trial in last.trials)


def test_a_trial_with_a_failed_training_has_no_score_until_the_next_command_tries_it_again(tmp_path: Path) -> None:
    first = search(tmp_path, trials=3)
    make(first, errors={2: FAILED})
    settings = tried(first)
    assert [len(trial.scores) for trial in first.trials] == [2, 0, 2]
    assert states(first) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert first.ask() is None
    assert first.attempts.over()
    then = again(tmp_path, trials=3)
    make(then)
    assert [trial.number for trial in then.trials] == [2]
    assert tried(then) == settings
    assert [len(trial.scores) for trial in then.trials] == [2, 2, 2]
    assert states(then) == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]


def test_a_trial_with_a_training_that_diverged_is_the_worst_and_not_the_best(tmp_path: Path) -> None:
    some = search(tmp_path, trials=2)
    make(some, errors={1: DIVERGED})
    assert some.trials[0].scores.mean() == float("inf")
    assert some.best is some.trials[1]


def test_another_objective_is_another_search_with_the_same_first_settings(tmp_path: Path) -> None:
    first, other = search(tmp_path, trials=5), search(tmp_path, target=0.5, trials=4)
    make(first)
    make(other)
    assert tried(other) == tried(first)[:4]  # as many as are sampled at random
    assert len(first.attempts.optuna_study.trials) == 5
    assert len(other.attempts.optuna_study.trials) == 4


# -- several commands at one sweep ---------------------------------------------------------------------------------


STORAGES = [pytest.param(None, id="journal"), pytest.param("sqlite:///{folder}/optuna.db", id="database")]


def work(folder: Path, storage: str | None, seed: int) -> list[int]:
    """What a command of many does: takes and ends trials, as fast as it can."""
    some = search(folder, trials=9, storage=storage)
    make(some)
    return [trial.number for trial in some.trials]


@pytest.mark.parametrize("storage", STORAGES)
def test_commands_at_the_same_time_try_each_trial_once_and_no_more_than_were_asked_for(
    storage: str | None, tmp_path: Path
) -> None:
    place = storage and storage.format(folder=tmp_path)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as processes:
        made = list(processes.map(partial(work, tmp_path, place), range(2)))
    assert sorted(number for numbers in made for number in numbers) == list(range(1, 10))
    whole = search(tmp_path, trials=9, storage=place)
    assert whole.ask() is None
    assert states(whole).count("COMPLETE") == 9
    assert len(tried(whole)) == 9
    assert whole.attempts.over()


@pytest.mark.parametrize("storage", STORAGES)
def test_one_whose_owner_is_alive_is_left_to_it_and_one_whose_owner_is_silent_for_long_is_taken(
    storage: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = storage and storage.format(folder=tmp_path)
    first, second = (search(tmp_path, trials=1, storage=place) for _ in range(2))
    mine = first.ask()
    assert mine is not None
    assert mine[0].attempt is not None
    mine[0].attempt.set_user_attr(OWNER, ("another machine", 1, 1.0))
    clock = [0.0]
    monkeypatch.setattr("dmaml_pl.studies.attempts.time", SimpleNamespace(monotonic=lambda: clock[0]))
    assert second.ask() is None
    assert not second.attempts.over()
    clock[0] += attempts.LOST_S
    first.attempts.give_sign(mine[0].attempt)
    assert second.ask() is None
    clock[0] += attempts.LOST_S
    assert second.ask() is None
    clock[0] += 1
    taken = second.ask()
    assert taken is not None
    assert taken[0].values == mine[0].values
    first.tell(mine[0], [])  # too late, which does no harm
    assert states(second) == ["FAIL", "RUNNING"]


def test_an_attempt_that_nobody_took_is_taken(tmp_path: Path) -> None:
    some = search(tmp_path, trials=1)
    some.attempts.optuna_study.enqueue_trial({}, user_attrs={attempts.NUMBER: 1})  # by one that was killed then
    assert some.ask() is not None
    assert states(some) == ["RUNNING"]


def test_an_attempt_that_does_not_count_is_left(tmp_path: Path) -> None:
    some = search(tmp_path, trials=2)
    for _ in range(2):  # by two commands that saw nothing of each other
        some.attempts.optuna_study.enqueue_trial({}, user_attrs={attempts.NUMBER: 1})
    make(some)
    assert [trial.number for trial in some.trials] == [1, 2]
    assert states(some) == ["COMPLETE", "FAIL", "COMPLETE"]


def test_a_trial_that_is_worse_than_the_median_is_pruned_by_its_first_seed(tmp_path: Path) -> None:
    some = search(tmp_path, trials=7, prunes=True)
    some.study.ledger.so_far = lambda *_: {4: 1e9}  # type: ignore[method-assign]
    make(some, upto=6)
    asked = some.ask()
    assert asked is not None
    trial, point = asked
    trial.looked = -1e9
    assert not some.hopeless(trial, Training(point, 1))
    trial.looked = -1e9
    assert some.hopeless(trial, Training(point, 0))
    some.tell(trial, [Child(Training(point, 0), "a", "pruned"), Child(Training(point, 1), None, "pruned")])
    assert states(some)[-1] == "PRUNED"
    assert len(tried(some)) == 7
    assert again(tmp_path, trials=7, prunes=True).ask() is None


# -- what cannot be used -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("storage", "told"),
    [
        (
            "postgresql+psycopg://ann:secret@127.0.0.1:1/optuna",
            r"postgresql\+psycopg://\*\*\*@127.0.0.1:1/optuna, in which",
        ),
        ("nonsense://ann:secret@somewhere/optuna", "nonsense://"),
        ("sqlite:////proc/none/optuna.db", "Set --storage to one that can be"),
        ("/proc/none/optuna.journal", "Move it away, or set --storage to another."),
    ],
)
def test_a_database_that_cannot_be_used_is_told_in_one_line_without_its_password(
    storage: str, told: str, tmp_path: Path
) -> None:
    with pytest.raises(TrackingError, match=told) as caught:
        search(tmp_path, storage=storage).ask()
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_optuna_cannot_read_is_told_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "optuna.journal"
    file.write_text("no journal\n")
    with pytest.raises(TrackingError, match=r"optuna\.journal, in which Optuna keeps its trials, cannot be used"):
        search(tmp_path).ask()
    assert file.read_text() == "no journal\n"


def test_the_lock_of_a_command_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "optuna.journal.lock").symlink_to(tmp_path / "optuna.journal")  # as an older version left it
    some = search(tmp_path, trials=1)
    make(some)  # Optuna would wait for half a minute, and warn
    assert some.best is some.trials[0]
