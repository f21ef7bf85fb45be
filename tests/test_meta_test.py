"""Meta-tests: the baseline beside the meta-trained network, and the report in files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_modules import Glyphs
from dmaml_pl import Conv4, DMAMLStrategy
from dmaml_pl.evaluation.baseline import STEP_SIZES, BaselineTraining
from dmaml_pl.evaluation.curves import MetaTest, half_width
from dmaml_pl.evaluation.drawing import entitle, new_figure
from dmaml_pl.evaluation.figures import confusion
from dmaml_pl.evaluation.report import MetaTestReport
from dmaml_pl.objectives import Classification, Objective, objective_of
from dmaml_pl.provenance.commands import meta_test_command, resume_command
from tests.recipes import maml_module, same, small_data, small_maml, small_trainer, state_of
from tests.workers import in_workers

REGRESSION, CLASSIFICATION = objective_of("regression"), objective_of("classification")


def glyphs(**settings: Any) -> Glyphs:
    given = {"shots": 1, "queries": 3, "meta_batch": 4, "val_tasks": 6, "test_tasks": 12, "seed": 0} | settings
    data = Glyphs(**given)
    data.setup()
    return data


# -- the baseline --------------------------------------------------------------------------------------------------


def baseline_curve(training: BaselineTraining, data: Any, steps: int, adaptation_steps: int) -> tuple[Any, Tensor]:
    baseline = training.make(steps, adaptation_steps)
    tasks = data.evaluation_tasks("test", range(data.test_tasks))
    engine = baseline.engine.for_evaluation(baseline.learner, tasks)
    return baseline, engine.adaptation_curve(baseline.learner, tasks, adaptation_steps).metric


def alone() -> Any:
    return small_trainer(strategy=DMAMLStrategy()).strategy


def test_the_baseline_follows_from_the_seed_alone_and_leaves_everything_else_as_it_was() -> None:
    network = small_maml().network
    before, found = state_of(network), []
    for noise in (0, 5):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        training = BaselineTraining(network, REGRESSION, small_data(), alone())
        baseline, curve = baseline_curve(training, small_data(), 20, 2)
        assert torch.equal(torch.get_rng_state(), state)
        found.append((state_of(baseline.learner.network), baseline.step_size, curve))
    assert same(state_of(network), before)
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert torch.equal(found[0][2], found[1][2])


def test_in_a_regression_it_learns_all_tasks_jointly_and_is_fine_tuned_with_a_step_size_of_its_own() -> None:
    data = small_data(test_tasks=60, val_tasks=25)
    network = small_maml().network
    training = BaselineTraining(network, REGRESSION, data, alone())
    baseline, curve = baseline_curve(training, data, 300, 3)
    tasks = data.evaluation_tasks("test", range(60))
    with torch.no_grad():
        untrained = float((network(tasks.query_x) - tasks.query_y).square().mean())
    assert float(curve[:, 0].mean()) < untrained
    assert float(curve[:, 3].mean()) < float(curve[:, 0].mean())
    assert baseline.step_size in STEP_SIZES
    assert (baseline.samples, baseline.classes) == (300 * 140, None)  # 7 tasks of 20 samples a step


def test_in_a_classification_it_learns_the_classes_of_training_and_starts_a_task_without_a_preference() -> None:
    data = glyphs()
    torch.manual_seed(0)
    network = Conv4(ways=5, filters=8)
    baseline, curve = baseline_curve(BaselineTraining(network, CLASSIFICATION, data, alone()), data, 60, 2)
    assert baseline.classes == 164
    assert network.head.out_features == baseline.learner.network.head.out_features == 5
    assert curve[:, 0].tolist() == pytest.approx([0.2] * 12)  # all logits are zero
    assert float(curve[:, 2].mean()) > 0.3


def test_labelled_samples_are_images_of_the_class_that_they_say() -> None:
    data = glyphs()
    samples = data.sample_labelled(10, seed=3)
    assert samples.x.shape == (10, 1, 28, 28)
    images = data.load_splits()["train"].float() / 255
    for picture, label in zip(samples.x, samples.y, strict=True):
        assert any(torch.allclose(picture[0], each) for each in images[int(label)])
    assert all(torch.equal(*pair) for pair in zip(samples[:2], data.sample_labelled(10, seed=3)[:2], strict=True))


def _baseline_of_two() -> tuple[dict[str, Tensor], float, int]:
    found: dict[str, Any] = {}

    class Keep(pl.Callback):
        def on_test_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            training = BaselineTraining(pl_module.untrained.network, REGRESSION, trainer.datamodule, trainer.strategy)
            found["baseline"] = training.make(10, 2)

    trainer = small_trainer(devices=2, strategy=DMAMLStrategy(), callbacks=[Keep()])
    trainer.test(small_maml(), small_data(), verbose=False)
    baseline = found["baseline"]
    return state_of(baseline.learner.network), baseline.step_size, baseline.samples


def test_workers_share_the_training_of_the_baseline_and_come_to_the_same_network() -> None:
    (first, size, samples), (second, other, _) = in_workers(_baseline_of_two, 2)
    assert same(first, second)
    assert size == other
    assert samples == 10 * 2 * 80  # 4 tasks of 20 samples each


class Backwards(nn.Module):
    """Its last linear layer is not its output."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(28 * 28, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Any:
        return self.out(x.flatten(1))


class Secretive(Glyphs):
    sample_labelled = None  # type: ignore[assignment]


class Unequal(Classification):
    """Its classes do not count alike."""

    def support_loss(self, output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y, weight=torch.arange(1.0, 6.0))


def test_why_there_is_no_baseline_is_told() -> None:
    def refusal(network: nn.Module, data: Any, objective: Objective = CLASSIFICATION) -> str | None:
        return BaselineTraining(network, objective, data, alone()).refusal

    assert refusal(Conv4(filters=4), glyphs()) is None
    assert refusal(Conv4(filters=4), None) == "it needs a data module of data_modules"
    assert refusal(Backwards(), glyphs()) == "the last linear layer of Backwards is not its output"
    convolutions = nn.Sequential(nn.Conv2d(1, 5, 28), nn.Flatten())
    assert refusal(convolutions, glyphs()) == "Sequential has no linear layer (nn.Linear) at its end to exchange"
    told = refusal(Conv4(filters=4), glyphs(), Unequal())
    assert told is not None
    assert told.startswith(f"Unequal has no loss for 164 classes at once (RuntimeError in {__file__}, line ")
    assert ": weight tensor should be" in told


# -- metrics of a result -------------------------------------------------------------------------------------------


def test_the_advantage_is_that_on_the_same_tasks() -> None:
    hard = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    result = MetaTest(REGRESSION, {"trained": hard, "baseline": hard + torch.tensor([[0.4], [0.6], [0.5], [0.5]])}, 0)
    assert result.advantage is not None
    mean, width = result.advantage
    assert mean == pytest.approx(0.5)
    assert width == pytest.approx(float(half_width(torch.tensor([[0.4], [0.6], [0.5], [0.5]]))))
    assert width < float(half_width(hard)) / 5
    better = MetaTest(CLASSIFICATION, {"trained": hard, "baseline": hard - 1}, 0)
    assert better.advantage is not None
    assert better.advantage[0] == pytest.approx(1)


def test_the_title_of_a_narrow_figure_is_not_cut() -> None:
    figure = new_figure(3.0, 2.0)
    entitle(figure, "A support sample per class, and queries with their predicted class after 10 adaptation steps")
    figure.draw_without_rendering()
    (title,) = figure.texts
    assert title.get_window_extent().width < figure.bbox.width


def test_a_confusion_counts_what_was_taken_for_what() -> None:
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0]])
    assert confusion(logits, torch.tensor([0, 0, 1])).tolist() == [[1, 1], [0, 1]]


# -- the report ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the reports of two small trainings."""
    folder = tmp_path_factory.mktemp("reports")
    classification = maml_module(Conv4(filters=4), objective="classification", inner_lr=0.4, evaluation_steps=2)
    for name, module, data, steps in (
        ("regression", small_maml(), small_data(), 20),
        ("classification", classification, glyphs(), 4),
    ):
        report = MetaTestReport(folder=str(folder / name), per_task=name == "regression", baseline_budget=1.0)
        trainer = small_trainer(max_steps=steps, callbacks=[report])
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
    return {name: folder / name for name in ("regression", "classification")}


@pytest.mark.parametrize("name", ["regression", "classification"])
def test_the_report_can_be_read_alone(reports: dict[str, Path], name: str) -> None:
    text = (reports[name] / "report.md").read_text()
    steps = json.loads((reports[name] / "report.json").read_text())["steps"]
    shown = f"{steps[1]['trained']:.4f} ± {steps[1]['trained_ci95']:.4f}"
    word = "Mean squared error" if name == "regression" else "Accuracy"
    assert f"**{word} {shown}** after 1 step of adaptation to each of 12 held-out tasks" in text
    rows = re.findall(r"^\| +(\d+) \| (.*) ± .* \| (.*) ± .* \| (.*) ± .* \|$", text, re.MULTILINE)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    for step, row in enumerate(rows):
        assert [f"{steps[step][network]:.4f}" for network in ("trained", "baseline", "untrained")] == list(row[1:])
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    expected = ["adaptation_curve", "tasks", *(["confusion"] if name == "classification" else [])]
    assert pictures == [f"figures/{each}.png" for each in expected]
    for picture in pictures:
        assert (reports[name] / picture).read_bytes().startswith(b"\x89PNG")
    made = re.findall(r"^\| ([\w-]+) +\| (.+?) +\| (.+?) +\|$", text, re.MULTILINE)
    assert {("model", "algorithm", "MAML"), ("model", "inner_steps", "1")} < set(made)
    assert {("data", "queries"), ("versions", "torch")} < {fact[:2] for fact in made}


def test_the_report_for_machines_holds_means_intervals_tasks_and_versions(reports: dict[str, Path]) -> None:
    found = json.loads((reports["regression"] / "report.json").read_text())
    assert (found["metric"], found["better"], found["tasks"], found["inner_steps"]) == ("mse", "min", 12, 1)
    assert {"torch", "git commit", "git clean"} <= found["versions"].keys()
    assert found["training"]["tasks seen"] == 80
    for network in found["networks"]:
        values = torch.tensor(found["per_task"][network])
        assert values.shape == (12, 3)
        for row in found["steps"]:
            assert row[network] == pytest.approx(float(values[:, row["step"]].mean()), rel=1e-5)
            assert row[f"{network}_ci95"] == pytest.approx(float(half_width(values)[row["step"]]), rel=1e-5)
    assert "per_task" not in json.loads((reports["classification"] / "report.json").read_text())


def test_without_a_budget_the_report_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    module, data = small_maml(), small_data()
    trainer = small_trainer(max_steps=2, callbacks=[MetaTestReport(folder="r", baseline_budget=0)])
    trainer.fit(module, data)
    trainer.test(module, data, verbose=False)
    assert module.meta_test is not None
    assert list(module.meta_test.metrics) == ["trained", "untrained"]
    assert "No baseline to compare with: report.baseline_budget is 0." in capsys.readouterr().out
    assert "- baseline: none, as report.baseline_budget is 0." in Path("r/report.md").read_text()


def test_the_baseline_changes_no_metric_of_the_others() -> None:
    found = []
    for budget in (0.0, 1.0):
        module, data = small_maml(), small_data()
        trainer = small_trainer(max_steps=20, callbacks=[MetaTestReport(folder="r", baseline_budget=budget)])
        trainer.fit(module, data)
        trainer.test(module, data, verbose=False)
        assert module.meta_test is not None
        found.append(module.meta_test)
    assert torch.equal(found[0].trained, found[1].trained)
    assert torch.equal(found[0].metrics["untrained"], found[1].metrics["untrained"])


# -- commands to copy ----------------------------------------------------------------------------------------------


def test_commands_to_repeat_and_to_go_on_keep_the_words_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/dmaml"])
    words = ["fit", "--config", "a b.yaml", "--ckpt_path=last", "--register", "letters", "--meta_test=true"]
    assert meta_test_command(words, "best.ckpt") == "dmaml test --config 'a b.yaml' --ckpt_path best.ckpt"
    assert resume_command(["fit", "--ckpt_path", "x", "--data.shots", "5"], "last") == (
        "dmaml fit --data.shots 5 --ckpt_path last"
    )
    assert meta_test_command(["mine.py"], "best.ckpt") is None
