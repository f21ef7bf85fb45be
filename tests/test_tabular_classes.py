"""Classifications of a user's own from tables: which rows make a task, their labels, adapting, every mistake named."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from data_modules import TabularClasses
from dmaml_pl import MLP
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.evaluation.baseline import BaselineTraining
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import check_tasks
from tests.recipes import small_trainer
from tests.trainings import dmaml

TEMPLATE = Path(__file__).parents[1] / "configs" / "tabular_classes.yaml"
TASKS, SPECIES = 10, ["01", "1", "ant", "bee", "cow", "dog"]


def table(path: Path) -> Path:
    """Of each species of each task 5 rows, whose inputs tell the task, the species and the row."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["patient", "x", "z", "species"])
        writer.writerows(
            [f"p{task}", 100 * task + 10 * kind + row, row, name]
            for row in range(5)
            for task in range(TASKS)
            for kind, name in enumerate(SPECIES)
        )
    return path


def ready(path: Path, **settings: Any) -> TabularClasses:
    defaults: dict[str, Any] = {"inputs": ["x", "z"], "classes": "species", "ways": 2, "shots": 2, "queries": 3}
    data = TabularClasses(path=str(path), **defaults | {"meta_batch": 4, "standardize": False} | settings)
    data.setup("fit")
    return data


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return table(tmp_path / "table.csv")


@pytest.mark.parametrize("settings", [{"val_share": 0.34, "test_share": 0.34}, {"task_column": "patient", "ways": 3}])
def test_a_task_is_rows_of_some_classes_none_of_them_twice(path: Path, settings: dict[str, Any]) -> None:
    data = ready(path, **settings)
    tasks = data.sample_tasks("train", range(100))
    check_tasks(tasks)
    x, y = (torch.cat(each, dim=1) for each in ((tasks.support_x, tasks.query_x), (tasks.support_y, tasks.query_y)))

    assert tasks.support_y[0].bincount().tolist() == [2] * data.ways
    assert tasks.query_y[0].bincount().tolist() == [3] * data.ways
    for samples, labels in zip(x[..., 0].long(), y, strict=True):
        pairs = set(zip((samples // 10 % 10).tolist(), labels.tolist(), strict=True))
        assert len(pairs) == data.ways, "a class has one label"
        assert len(set(samples.tolist())) == len(samples)
    alone = data.sample_task("train", 7)
    assert torch.equal(alone.query_x, tasks.query_x[7])


def test_classes_are_dealt_to_the_splits_where_there_is_no_task_column(path: Path) -> None:
    data = ready(path, val_share=0.34, test_share=0.34)
    seen = {split: data.sample_tasks(split, range(50)).query_x[..., 0] for split in ("train", "val", "test")}
    kinds = {split: set((x.long() // 10 % 10).flatten().tolist()) for split, x in seen.items()}

    assert [len(each) for each in kinds.values()] == [2, 2, 2]
    assert len(set.union(*kinds.values())) == len(SPECIES)
    first = data.sample_tasks("train", range(50)).support_x[:, 0, 0].long() // 10 % 10
    assert len(set(first.tolist())) == 2, "labels are given by chance"


def test_of_tasks_that_have_the_same_classes_a_label_means_the_same_in_all(path: Path) -> None:
    data = ready(path, task_column="patient", ways=len(SPECIES))
    seen = {}
    for split in ("train", "val", "test"):
        tasks = data.sample_tasks(split, range(50))
        assert torch.equal(tasks.support_x[..., 0].long() // 10 % 10, tasks.support_y)
        seen[split] = set((tasks.query_x[..., 0].long() // 100).flatten().tolist())
        assert (tasks.query_x[..., 0].long() // 100 == tasks.support_x[:, :1, 0].long() // 100).all(), "of one patient"

    assert {split: len(each) for split, each in seen.items()} == {"train": 6, "val": 2, "test": 2}
    assert len(set.union(*seen.values())) == TASKS


def test_a_baseline_is_trained_to_tell_all_classes_apart(path: Path) -> None:
    data = ready(path, task_column="patient", ways=2, meta_batch=8, standardize=True)
    labelled = data.sample_labelled(200, 0)
    assert labelled.classes == len(SPECIES)
    assert labelled.x.shape == (200, 2)
    assert set(labelled.y.tolist()) == set(range(len(SPECIES)))
    strategy = small_trainer().strategy
    assert BaselineTraining(MLP(2, [4], 2), objective_of("classification"), data, strategy).refusal is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": 1}, r"data\.ways is 1, but a task needs at least 2 classes"),
        ({"ways": 5}, r"data\.ways is 5, but the train split of .* has 4 classes"),
        ({"ways": 7, "task_column": "patient"}, r"data\.ways is 7, but task p\d of .* has 6 classes"),
        (
            {"queries": 4, "task_column": "patient"},
            r"is 2 \+ 4, but class 01 of task p0 in .* has 5 rows, and 59 further",
        ),
        ({"classes": "kind"}, r"data\.classes names kind, but .* has the columns patient, x, z, species"),
    ],
)
def test_settings_that_the_file_cannot_serve_name_the_setting(
    path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        ready(path, **settings)


def test_the_command_trains_on_a_table_and_adapts_to_rows_of_ones_own(path: Path, tmp_path: Path) -> None:
    words = ["--data.path", str(path), "--data.task_column", "patient"]
    words += ["--data.classes", "species", "--data.inputs", "[x,z]", "--data.ways", "6", "--data.shots", "2"]
    words += ["--data.queries", "3", "--data.val_tasks", "4", "--trainer.logger", "false"]
    words += ["--trainer.max_steps", "2", "--trainer.devices", "1", "--data.test_tasks", "4"]
    words += ["--report.baseline_budget", "0"]
    words += ["--checkpoint.dirpath", "kept"]
    done = dmaml(tmp_path, "fit", "--config", str(TEMPLATE), *words)
    assert done.returncode == 0, done.stderr
    assert "no validation, so that there is no best.ckpt: its last weights are meta-tested." in done.stderr
    assert done.stdout.endswith("The checkpoint, for dmaml adapt and others:\n  kept/last.ckpt\n")
    (tmp_path / "support.csv").write_text("species;z;x\n" + "\n".join(f"{each};1,5;2,5" for each in SPECIES))
    (tmp_path / "query.csv").write_text("x,z,species\n1.5,2,01\n2.5,3,1\n")
    words = ["--ckpt", "kept/last.ckpt", "--support", "support.csv", "--query", "query.csv", "--output", "said.csv"]
    done = dmaml(tmp_path, "adapt", *words)

    assert done.returncode == 0, done.stderr
    assert "Accuracy:" in done.stdout
    with (tmp_path / "said.csv").open(newline="") as stream:
        lines = list(csv.reader(stream))
    assert lines[0][:5] == ["x", "z", "class", "prediction", "probability"]
    assert [line[2] for line in lines[1:]] == ["01", "1"]
