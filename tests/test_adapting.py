"""Adapting in Python: what a checkpoint is enough for, and what is told where it is not."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dmaml_pl
from data_modules import Glyphs, Sinusoid
from dmaml_pl import MLP, AdaptedLearner, FewShotLearner, MetaLearning
from dmaml_pl.errors import CheckpointError, ConfigError, DataError
from tests.adapting import NAMES, SINES, first_task, last_predictions
from tests.recipes import small_data, small_maml, small_trainer


def edited(file: Path, to: Path, **changes: Any) -> Path:
    """A checkpoint with other contents; None takes them away."""
    content = torch.load(file, weights_only=True) | changes
    torch.save({name: value for name, value in content.items() if value is not None}, to)
    return to


# -- what it computes ----------------------------------------------------------------------------------------------


def test_a_regression_adapts_as_the_meta_test_does(sines: Path) -> None:
    learner, task = dmaml_pl.load(sines), first_task(Sinusoid())
    expected = last_predictions(learner, task)
    learned = learner.adapt(task.support_x, task.support_y, steps=3).predict(task.query_x)
    torch.testing.assert_close(learned, expected)  # which is computed with other tasks beside it: rounds otherwise


def test_a_classification_gives_the_probabilities_of_the_meta_test(letters: Path) -> None:
    learner, task = dmaml_pl.load(letters), first_task(Glyphs(queries=2))
    expected = last_predictions(learner, task).softmax(dim=-1)
    adapted = learner.adapt(task.support_x, task.support_y, steps=2)
    torch.testing.assert_close(adapted.predict(task.query_x), expected)
    assert adapted.classes == (0, 1, 2, 3, 4)


def test_the_steps_are_those_of_training_unless_asked_for(sines: Path) -> None:
    learner, task = dmaml_pl.load(sines), first_task(Sinusoid())
    default, two, one = (learner.adapt(task.support_x, task.support_y, steps) for steps in (None, 2, 1))
    assert (default.steps, one.steps) == (2, 1)
    assert torch.equal(default.predict(task.query_x), two.predict(task.query_x))
    assert not torch.equal(default.predict(task.query_x), one.predict(task.query_x))


def test_adapting_leaves_the_learner_as_it_was(sines: Path) -> None:
    learner, task = dmaml_pl.load(sines), first_task(Sinusoid())
    before = {name: weight.clone() for name, weight in learner.module.state_dict().items()}
    first = learner.adapt(task.support_x, task.support_y)
    with torch.inference_mode():
        second = learner.adapt(task.support_x * 1.0, task.support_y * 1.0)
    assert torch.equal(first.predict(task.query_x), second.predict(task.query_x))
    assert all(torch.equal(before[name], weight) for name, weight in learner.module.state_dict().items())
    assert not any(weight.requires_grad for weight in first.network.parameters())


def test_names_arrays_and_lists_do_as_well_as_tensors(letters: Path, sines: Path) -> None:
    learner, task = dmaml_pl.load(letters), first_task(Glyphs(queries=2))
    by_number = learner.adapt(task.support_x, task.support_y)
    by_name = learner.adapt(task.support_x.numpy(), ["abcde"[int(number)] for number in task.support_y])
    assert by_name.classes == ("a", "b", "c", "d", "e")
    assert torch.equal(by_name.predict(task.query_x.numpy()), by_number.predict(task.query_x))
    line = dmaml_pl.load(sines).adapt([-1.0, 0.0, 1.0], np.array([1.0, 2.0, 3.0], dtype=np.float32))
    assert line.predict([0.5]).shape == (1, 1)


def test_ways_other_than_in_training_are_named_with_the_classes(letters: Path) -> None:
    learner = dmaml_pl.load(letters)
    with pytest.raises(DataError, match=r"3 classes \(cat, cow, dog\).*trained to tell 5 apart: give samples of 5"):
        learner.adapt(torch.rand(3, 1, 28, 28), ["dog", "cat", "cow"])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.rand(5, 28, 28), [0, 1, 2, 3, 4], r"x has shape \(5, 28, 28\), but must be .* shape \(1, 28, 28\)"),
        (torch.zeros(5, 1, 28, 28, dtype=torch.uint8), [0, 1, 2, 3, 4], "divide it by 255"),
        (torch.full((5, 1, 28, 28), torch.nan), [0, 1, 2, 3, 4], "x holds values that are not finite"),
        (torch.rand(5, 1, 28, 28), [0, 1], "x holds 5 samples, but y 2"),
        (torch.rand(5, 1, 28, 28), [0, 1, 2, 3, "e"], "all as names or all as whole numbers"),
        (torch.rand(5, 1, 28, 28), torch.rand(5), "all as names or all as whole numbers"),
        ("pictures", [0], "x cannot be made a tensor"),
    ],
)
def test_samples_that_do_not_fit_are_told(letters: Path, x: Any, y: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dmaml_pl.load(letters).adapt(x, y)


def test_targets_that_do_not_fit_are_told(sines: Path) -> None:
    learner = dmaml_pl.load(sines)
    with pytest.raises(DataError, match=r"y has shape \(3, 2\).*targets of shape \(3, 1\)"):
        learner.adapt(torch.rand(3, 1), torch.rand(3, 2))
    with pytest.raises(DataError, match="not finite after 50 adaptation steps"):
        learner.adapt(torch.rand(3, 1), torch.rand(3, 1) * 1e30, steps=50)
    with pytest.raises(ConfigError, match="steps is 0"):
        learner.adapt(torch.rand(3, 1), torch.rand(3, 1), steps=0)


def test_one_sample_alone_is_too_few_for_a_batch_norm_over_features() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(1, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    adapted = FewShotLearner(small_maml(network)).adapt(torch.rand(3, 1), torch.rand(3, 1))
    assert adapted.predict(torch.rand(2, 1)).shape == (2, 1)
    with pytest.raises(DataError, match="give two or more at a time"):
        adapted.predict(torch.rand(1, 1))


# -- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sines", "letters"])
def test_an_adapted_learner_comes_back_from_its_file(kind: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(kind)
    task = first_task(Sinusoid() if kind == "sines" else Glyphs(queries=2))
    y = task.support_y if kind == "sines" else [NAMES[int(number)] for number in task.support_y]
    adapted = dmaml_pl.load(file).adapt(task.support_x, y, steps=4)
    adapted.save("adapted.pt")
    again = dmaml_pl.load_adapted("adapted.pt")
    assert isinstance(again, AdaptedLearner)
    assert (again.classes, again.steps, again.support) == (adapted.classes, 4, len(task.support_x))
    assert torch.equal(again.predict(task.query_x), adapted.predict(task.query_x))


def test_a_learner_comes_back_from_its_file_without_what_only_training_needs(letters: Path) -> None:
    task = first_task(Glyphs(queries=2))
    learner = dmaml_pl.load(letters)
    learner.save("weights.pt")
    again = dmaml_pl.load("weights.pt")
    predictions = [each.adapt(task.support_x, task.support_y).predict(task.query_x) for each in (learner, again)]
    assert torch.equal(*predictions)
    assert set(torch.load("weights.pt", weights_only=True)) == {"state_dict", "config", "shapes", "scaling"}


def test_a_file_of_the_other_kind_is_told_apart(sines: Path) -> None:
    dmaml_pl.load(sines).adapt([1.0, 2.0], [1.0, 2.0]).save("adapted.pt")
    with pytest.raises(CheckpointError, match=r"adapted already: dmaml_pl\.load_adapted"):
        dmaml_pl.load("adapted.pt")
    with pytest.raises(CheckpointError, match=r"not adapted to anything yet: .*dmaml_pl\.load\(\.\.\.\)\.adapt"):
        dmaml_pl.load_adapted(sines)


def test_a_training_made_in_python_loads_into_a_module_like_its_own() -> None:
    trainer = small_trainer(max_steps=2)
    maml, data = small_maml(), small_data(runs_per_epoch=1)
    trainer.fit(maml, data)
    trainer.save_checkpoint("mine.ckpt")
    with pytest.raises(CheckpointError, match=r"dmaml_pl\.load\(FILE, module=\.\.\.\)"):
        dmaml_pl.load("mine.ckpt")
    with pytest.raises(CheckpointError, match=r"^mine\.ckpt was made for another network"):
        dmaml_pl.load("mine.ckpt", module=MetaLearning(MLP(hidden=[3])))
    learner = dmaml_pl.load("mine.ckpt", module=MetaLearning(MLP(hidden=[8, 8])))
    task = first_task(Sinusoid())
    expected = FewShotLearner(maml).adapt(task.support_x, task.support_y).predict(task.query_x)
    assert torch.equal(learner.adapt(task.support_x, task.support_y).predict(task.query_x), expected)


class Mark:
    """Says that it was unpickled."""

    def __reduce__(self) -> Any:
        return Path("unpickled").touch, ()


def test_code_in_a_file_is_not_run() -> None:
    torch.save({"state_dict": {}, "config": Mark()}, "trap.ckpt")
    Path("plain.ckpt").write_bytes(pickle.dumps(Mark()))
    for file in ("trap.ckpt", "plain.ckpt"):
        with pytest.raises(CheckpointError, match="code in a file is never run"):
            dmaml_pl.load(file)
    assert not Path("unpickled").exists()
    torch.load("trap.ckpt", weights_only=False)  # the trap works
    assert Path("unpickled").exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"class_path": "stranger.Net"}, "names stranger.Net, which comes with neither .* give --trust stranger"),
        ({"class_path": "os.system", "init_args": {"command": "touch run"}}, "give --trust os "),
        ({"class_path": "dmaml_pl.cli.resume.Path"}, "comes with neither"),
        ({"class_path": "dmaml_pl.errors.os.system"}, "which is not there"),
        ({"class_path": "torch.nn.functional.torch.hub.load"}, "which is not there"),
        ({"class_path": "torch.nn.functional.relu"}, "which is not a class"),
        ({"class_path": "dmaml_pl.MLflowTracker"}, "which is not a Module or Objective"),
        ({"class_path": "dmaml_pl.networks.MLP", "init_args": {"deep": 3}}, "cannot be made with the settings kept"),
        ({"class_path": "dmaml_pl.networks.MLP", "init_args": {"inputs": 0}}, "inputs is 0, but must be greater"),
        ({"class_path": "torch.nn.Linear", "init_args": {"in_features": {"class_path": "a.B"}}}, "give --trust a "),
    ],
)
def test_a_checkpoint_makes_no_class_that_is_not_trusted(sines: Path, network: dict[str, Any], message: str) -> None:
    Path("stranger.py").write_text("open('run', 'w')\n")
    model = {"class_path": "dmaml_pl.MetaLearning", "init_args": {"network": network}}
    file = edited(sines, Path("edited.ckpt"), config={"model": model, "data": SINES["data"]})
    with pytest.raises(CheckpointError, match=message):
        dmaml_pl.load(file)
    assert not Path("run").exists()


def test_an_algorithm_that_the_configuration_names_is_made(sines: Path) -> None:
    parts = {
        "network": {"class_path": "dmaml_pl.networks.MLP", "dict_kwargs": {"hidden": [8, 8]}},
        "algorithm": {"class_path": "dmaml_pl.MAML", "init_args": {"inner_lr": 0.01, "inner_steps": 2}},
    }
    model = {"class_path": "dmaml_pl.MetaLearning", "init_args": parts}
    file = edited(sines, Path("edited.ckpt"), config={"model": model, "data": SINES["data"]})
    task = first_task(Sinusoid())
    predictions = [dmaml_pl.load(f).adapt(task.support_x, task.support_y).predict(task.query_x) for f in (sines, file)]
    assert torch.equal(*predictions)


def test_a_class_of_ones_own_is_made_where_it_is_trusted(sines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("own_nets.py").write_text("from dmaml_pl import MLP\nclass Wide(MLP):\n    pass\n")
    network = {"class_path": "own_nets.Wide", "init_args": {"hidden": [8, 8]}}
    model = {"class_path": "dmaml_pl.MetaLearning", "init_args": {"network": network}}
    file = edited(sines, Path("edited.ckpt"), config={"model": model, "data": SINES["data"]})
    with pytest.raises(CheckpointError, match=r"give --trust own_nets \(trust="):
        dmaml_pl.load(file)
    with pytest.raises(CheckpointError, match=r"not there \(No .*\): give its file, --trust FOLDER/own_nets\.py"):
        dmaml_pl.load(file, trust=["own_nets"])
    monkeypatch.syspath_prepend(".")
    assert type(dmaml_pl.load(file, trust=["own_nets"]).module.network).__name__ == "Wide"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated, damaged, or no checkpoint"),
        (b"x" * 1000, "truncated, damaged, or no checkpoint"),
        (None, "is not there: give the checkpoint of a training"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told(content: bytes | None, message: str) -> None:
    if content is not None:
        Path("some.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"^some\.ckpt .*{message}|^some\.ckpt {message}"):
        dmaml_pl.load("some.ckpt")


def test_weights_alone_are_no_checkpoint() -> None:
    torch.save({"weight": torch.zeros(1)}, "some.ckpt")
    with pytest.raises(CheckpointError, match="holds no weights"):
        dmaml_pl.load("some.ckpt")
