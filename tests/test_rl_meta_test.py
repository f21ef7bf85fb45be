"""Meta-tests of policies: the baseline beside the meta-trained one, the report and its figures."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import Tensor

from data_modules import Navigation2D
from data_modules.navigation2d import PointEnvironments
from dmaml_pl import DMAMLStrategy, MetaLearning, PolicyGradient
from dmaml_pl.evaluation.curves import MetaTest
from dmaml_pl.evaluation.figures import plot_adaptation_curve
from dmaml_pl.evaluation.policy_baseline import STEP_SIZES, PolicyBaseline, PolicyBaselineTraining
from dmaml_pl.evaluation.rendering import print_result
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.rollouts.data import EnvironmentDataModule
from dmaml_pl.rollouts.environments import Environments
from dmaml_pl.tracking.description import describe_training
from tests.policies import small_navigation, small_policy
from tests.recipes import same, small_trainer, state_of
from tests.workers import in_workers

# -- the baseline --------------------------------------------------------------------------------------------------


class Making(pl.Callback):
    """Makes the baseline where a meta-test does."""

    def __init__(self, env_steps: int) -> None:
        self.env_steps = env_steps
        self.told: list[tuple[int, float]] = []

    def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        training = PolicyBaselineTraining(pl_module, trainer.datamodule, trainer.strategy)
        pl_module.baseline = training.make(self.env_steps, 2, lambda *told: self.told.append(told))


def baseline_of(env_steps: int = 600, **settings: Any) -> tuple[PolicyBaseline, Making, Any]:
    module, data, making = small_policy(**settings), small_navigation(), Making(env_steps)
    small_trainer(strategy=DMAMLStrategy(), callbacks=[making]).test(module, data, verbose=False)
    assert isinstance(module.baseline, PolicyBaseline)
    return module.baseline, making, module


def test_the_baseline_follows_from_the_seed_alone_and_leaves_everything_else_as_it_was() -> None:
    before, found = state_of(small_policy().network), []
    for noise in (0, 5):
        module, data, making = small_policy(), small_navigation(), Making(600)
        trainer = small_trainer(strategy=DMAMLStrategy(), callbacks=[making])
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        trainer.test(module, data, verbose=False)
        assert torch.equal(torch.get_rng_state(), state)
        assert same(state_of(module.network), before)
        assert module.baseline is not None
        assert module.meta_test is not None
        found.append((module.baseline, module.meta_test.metrics["baseline"]))
    (first, returns), (second, others) = found
    assert same(state_of(first.learner.network), state_of(second.learner.network))
    assert first.step_size == second.step_size
    assert torch.equal(returns, others)


def test_it_is_trained_without_adaptation_until_its_steps_in_environments_are_used_up() -> None:
    baseline, making, module = baseline_of(600)
    assert (baseline.steps, baseline.samples) == (5, 600)  # of 3 tasks, 4 rollouts and 10 steps each
    assert [done for done, _ in making.told] == [120, 240, 360, 480, 600]
    assert baseline.step_size in STEP_SIZES
    assert not same(state_of(baseline.learner.network), state_of(module.untrained.network))
    assert (baseline.learner.algorithm.steps, module.untrained.algorithm.steps) == (2, 1)


def test_it_comes_to_a_better_return_before_adaptation() -> None:
    goals = small_navigation(half_width=0.1, rollouts=20, meta_batch=10, test_tasks=10)
    module = small_policy()
    small_trainer(callbacks=[Making(40_000)]).test(module, goals, verbose=False)
    assert module.meta_test is not None
    trained, untrained = (module.meta_test.metrics[name][:, 0].mean() for name in ("baseline", "untrained"))
    assert float(trained) > float(untrained) + 0.1


def test_it_is_trained_by_the_same_meta_optimizer() -> None:
    trusted, _, _ = baseline_of(240)
    plain, _, _ = baseline_of(240, meta_optimizer=lambda params: torch.optim.SGD(params, lr=0.1))
    assert not same(state_of(trusted.learner.network), state_of(plain.learner.network))


def _baseline_of_two() -> tuple[dict[str, Tensor], float, int, list[tuple[int, float]]]:
    module, making = small_policy(), Making(960)
    trainer = small_trainer(devices=2, strategy=DMAMLStrategy(), callbacks=[making])
    trainer.test(module, small_navigation(), verbose=False)
    assert module.baseline is not None
    return state_of(module.baseline.learner.network), module.baseline.step_size, module.baseline.samples, making.told


def test_workers_share_the_training_of_the_baseline_and_come_to_the_same_policy() -> None:
    (first, size, seen, told), (second, other, also_seen, also_told) = in_workers(_baseline_of_two, 2)
    assert same(first, second)
    assert size == other
    assert seen == also_seen == 960
    assert told == also_told
    assert len(told) == 4  # steps of 240 in environments


# -- the report and its figures ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, MetaLearning]:
    """The report of a small training that is validated three times, and what it trained."""
    folder = tmp_path_factory.mktemp("report")
    module, report = small_policy(evaluation_steps=3), MetaTestReport(folder=str(folder), baseline_budget=0.5)
    trainer = small_trainer(
        strategy=DMAMLStrategy(), max_steps=6, limit_val_batches=1.0, val_check_interval=2, callbacks=[report]
    )
    trainer.fit(module, small_navigation())
    trainer.save_checkpoint(folder / "last.ckpt")
    trainer.test(module, small_navigation(), verbose=False)
    torch.distributed.destroy_process_group()
    return folder, module


def test_the_report_has_curves_over_steps_of_adaptation_and_in_environments_and_rollouts_on_the_map(
    reported: tuple[Path, MetaLearning],
) -> None:
    pictures = re.findall(r"!\[.*\]\((.*)\)", (reported[0] / "report.md").read_text())
    assert pictures == [f"figures/{name}.png" for name in ("adaptation_curve", "learning_curve", "rollouts")]
    for picture in pictures:
        assert (reported[0] / picture).read_bytes().startswith(b"\x89PNG")


def test_the_history_of_validations_says_how_good_each_step_was_after_how_many_steps_in_environments(
    reported: tuple[Path, MetaLearning],
) -> None:
    _, module = reported
    assert [each.env_steps for each in module.validations] == [2 * 240, 4 * 240, 6 * 240]
    assert all(len(each.returns) == len(each.ci95) == 4 for each in module.validations)
    assert module.validations[-1].returns != module.validations[0].returns


def test_a_resumed_training_has_the_validations_of_all_of_it(reported: tuple[Path, MetaLearning]) -> None:
    folder, module = reported
    resumed = small_policy(evaluation_steps=3)
    trainer = small_trainer(strategy=DMAMLStrategy(), max_steps=8, limit_val_batches=1.0, val_check_interval=2)
    trainer.fit(resumed, small_navigation(), ckpt_path=folder / "last.ckpt")
    assert resumed.validations[:3] == module.validations
    assert [each.env_steps for each in resumed.validations[3:]] == [8 * 240]


def test_a_meta_test_of_an_earlier_checkpoint_still_shows_the_whole_training(
    reported: tuple[Path, MetaLearning],
) -> None:
    folder, module = reported
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    earlier = checkpoint | {"validations": checkpoint["validations"][:1]}
    module.on_load_checkpoint(earlier)
    assert len(module.validations) == 3
    other = small_policy()
    other.on_load_checkpoint(earlier)
    assert len(other.validations) == 1


def test_the_axis_of_returns_does_not_begin_at_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: drawn.append(figure))
    returns = torch.tensor([[-30.0, -20.0], [-32.0, -22.0]])
    result = MetaTest(PolicyGradient(), {"trained": returns, "oracle": torch.full((2, 2), -15.0)}, 1)
    plot_adaptation_curve(result, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    assert axes.get_ylim()[1] < -10
    assert axes.get_ylabel() == "return"
    assert [text.get_text() for text in drawn[0].legends[0].texts] == ["meta-trained", "knows the task"]


class Drawn(PointEnvironments):
    """Points, each drawn as a picture as bright as it is far from the start."""

    def draw(self, states: Sequence[Any]) -> Any:
        far = np.stack([state.position[0, 0].norm().numpy() for state in states])
        return np.broadcast_to((100 * far).astype(np.uint8)[:, None, None, None], (len(states), 6, 8, 3))


class Filmed(Navigation2D):
    def make_environments(self) -> Environments:
        return Drawn()


@pytest.mark.parametrize(("kind", "films"), [(Filmed, 2), (Navigation2D, 0)])
def test_clips_show_the_adapted_policy_where_environments_draw_pictures_else_a_line_says_so(
    kind: type[Navigation2D], films: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, report = small_policy(), MetaTestReport(folder=str(tmp_path), clips=2)
    data = kind(rollouts=4, horizon=10, meta_batch=3, val_tasks=4, test_tasks=4, seed=0)
    small_trainer(callbacks=[report]).test(module, data, verbose=False)
    clips = sorted((tmp_path / "figures").glob("*.gif"))
    assert len(clips) == films
    for clip in clips:
        with Image.open(clip) as picture:
            assert picture.size == (8, 6)
    assert ("No clips: the environments draw no pictures here" in capsys.readouterr().out) != bool(films)
    text = (tmp_path / "report.md").read_text()
    assert all(f"figures/{clip.name}" in text for clip in clips)


class Hidden(Navigation2D):
    plot_rollouts = EnvironmentDataModule.plot_rollouts


def test_environments_that_draw_nothing_have_no_such_figure(tmp_path: Path) -> None:
    module, report = small_policy(), MetaTestReport(folder=str(tmp_path))
    data = Hidden(rollouts=4, horizon=10, meta_batch=3, val_tasks=4, test_tasks=4, seed=0)
    small_trainer(callbacks=[report]).test(module, data, verbose=False)
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["adaptation_curve.png"]


def test_the_report_tells_of_returns_and_of_no_query_sets(
    reported: tuple[Path, MetaLearning], capsys: pytest.CaptureFixture[str]
) -> None:
    text = (reported[0] / "report.md").read_text()
    assert re.search(
        r"\*\*Return -\d+\.\d\d ± \d+\.\d\d\*\* after 1 step of adaptation to each of 4 held-out tasks \(higher", text
    )
    assert "- knows the task: what whoever is told the task can reach." in text
    made = re.findall(r"^\| ([\w-]+) +\| (.+?) +\| (.+?) +\|$", text, re.MULTILINE)
    assert {("data", "rollouts", "4"), ("data", "horizon", "10"), ("training", "steps in environments", "1440")} < set(
        made
    )
    found = json.loads((reported[0] / "report.json").read_text())
    assert (found["metric"], found["better"]) == ("return", "max")
    assert found["networks"] == ["trained", "baseline", "untrained", "oracle"]
    assert reported[1].meta_test is not None
    print_result(reported[1].meta_test)
    printed = capsys.readouterr().out
    assert "Return of 4 held-out tasks\n" in printed
    assert "quer" not in printed


def test_mlflow_tells_how_many_steps_in_environments_there_were_and_leads_to_curves_over_them() -> None:
    figures = {"train/run": 2.0, "train/tasks_seen": 60.0, "train/env_steps": 12_000.0, "val/return": -20.0}
    text = describe_training(figures, "FINISHED", "", "dmaml fit", "unknown", "1")
    assert "after 2 runs, 60 tasks seen and 12 000 steps in environments" in text
    assert "viewStateShareKey=by-env-steps" in text
    del figures["train/env_steps"]
    plain = describe_training(figures, "FINISHED", "", "dmaml fit", "unknown", "1")
    assert "after 2 runs and 60 tasks seen" in plain
    assert "env-steps" not in plain
