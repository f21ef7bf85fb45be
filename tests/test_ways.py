"""Other ways and queries in validation and test than in training, and whose algorithm takes such ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dmaml_pl
from data_modules import Glyphs, Sinusoid
from dmaml_pl import MAML, Conv4, MetaLearning, ProtoMAML, ProtoNet
from dmaml_pl.__main__ import main
from dmaml_pl.errors import ConfigError, DataError
from dmaml_pl.evaluation.report import MetaTestReport
from tests.adapting import FEW, LETTERS_SEEN, NAMES, draw_folders, train
from tests.recipes import small_trainer

CONFIG: dict[str, Any] = LETTERS_SEEN | {
    "data": {"class_path": "data_modules.Glyphs", "init_args": FEW | {"queries": 2, "ways": 6, "test_ways": 3}},
    "model": {
        "class_path": "dmaml_pl.MetaLearning",
        "init_args": {
            "objective": "classification",
            "network": {"class_path": "dmaml_pl.Conv4", "init_args": {"filters": 4}},
            "algorithm": {"class_path": "dmaml_pl.ProtoNet"},
        },
    },
    "meta_test": True,
}


class Split(nn.Module):
    """An embedding and a head of sine curves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(1, 3), nn.Linear(3, 1)

    def embed(self, x: Tensor) -> Any:
        return self.body(x)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.embed(x))


def glyphs(**settings: Any) -> Glyphs:
    given: dict[str, Any] = {"meta_batch": 2, "val_tasks": 2, "test_tasks": 4, "queries": 2, "ways": 6, "test_ways": 3}
    return Glyphs(**(given | {"seed": 0} | settings))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of ProtoNet on tasks of six letters, validated and tested on tasks of three."""
    return train(tmp_path_factory.mktemp("proto"), CONFIG)


@pytest.mark.parametrize("sampler", ["batched", "learn2learn"])
def test_the_ways_of_validation_and_test_may_be_others_than_those_of_training(sampler: Any) -> None:
    data = glyphs(sampler=sampler)
    data.setup()
    sampled = data.sample(worker=0, run=0, iteration=0)
    assert (sampled.ways, sampled.support_x.shape[1]) == (6, 6)
    for split in ("val", "test"):
        tasks = data.evaluation_tasks(split, range(2))
        assert (tasks.ways, tasks.query_x.shape[1], int(tasks.query_y.max())) == (3, 6, 2)


@pytest.mark.parametrize("sampler", ["batched", "learn2learn"])
def test_the_queries_of_validation_and_test_may_be_others_than_those_of_training(sampler: Any) -> None:
    data = glyphs(sampler=sampler, shots=2, test_queries=7)
    data.setup()
    sampled = data.sample(worker=0, run=0, iteration=0)
    assert (sampled.support_x.shape[1], sampled.query_x.shape[1]) == (2 * 6, 2 * 6)
    for split in ("val", "test"):
        tasks = data.evaluation_tasks(split, range(2))
        assert (tasks.support_x.shape[1], tasks.query_x.shape[1]) == (2 * 3, 7 * 3)
        assert tasks.query_y[0].bincount().tolist() == [7, 7, 7]


def test_queries_that_a_class_has_not_are_refused_by_the_name_of_their_setting() -> None:
    with pytest.raises(ConfigError, match=r"data.test_queries is 0, but must be greater than 0"):
        glyphs(test_queries=0)
    with pytest.raises(ConfigError, match=r"data.shots \+ data.test_queries is 1 \+ 24, but a class of Glyphs has 24"):
        glyphs(test_queries=24).setup()


def test_ways_that_a_split_cannot_have_are_refused_by_the_name_of_their_setting() -> None:
    with pytest.raises(ConfigError, match=r"data.test_ways is 1, but a task needs at least 2"):
        glyphs(test_ways=1).setup()
    with pytest.raises(ConfigError, match=r"data.test_ways is 47, but the val split of Glyphs has 46 classes"):
        glyphs(test_ways=47).setup()


@pytest.mark.parametrize(
    ("ways", "shape"), [(6, r"\(3, 6\), but the tasks have 3"), (3, r"\(6, 3\), but the tasks have 6")]
)
def test_an_algorithm_with_a_head_for_so_many_ways_is_told_before_training(ways: int, shape: str) -> None:
    data = glyphs()
    data.setup()
    module = MetaLearning(Conv4(ways=ways, filters=4), MAML(), "classification")
    with pytest.raises(
        ConfigError, match=rf"shape {shape} ways: set the network's ways .* and data.test_ways to the s"
    ):
        module.check_data(data, "val")


def test_protomaml_is_trained_and_tested_beside_a_baseline_for_the_ways_of_the_test(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MetaLearning(Conv4(ways=6, filters=4), ProtoMAML(inner_lr=0.01), "classification", evaluation_steps=2)
    report = MetaTestReport(folder=str(tmp_path))
    trainer = small_trainer(max_steps=20, callbacks=[report])
    trainer.fit(module, glyphs())
    trainer.test(module, glyphs(), verbose=False)
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["networks"] == ["trained", "baseline", "untrained"]
    assert [row["step"] for row in found["steps"]] == [0, 1, 2]


def test_protonet_is_evaluated_without_steps_and_without_a_baseline(trained: Path) -> None:
    file = trained.parent / "report.json"
    found = json.loads(file.read_text())
    assert (found["inner_steps"], [row["step"] for row in found["steps"]]) == (0, [0])
    assert found["networks"] == ["trained", "untrained"]
    page = file.with_suffix(".md").read_text()
    assert "baseline: none, as ProtoNet makes no adaptation steps" in page
    assert "0 steps: unadapted" not in page


def test_protonet_refuses_a_regression_before_training() -> None:
    module = MetaLearning(Split(), ProtoNet(), "regression")
    with pytest.raises(ConfigError, match=r"model.algorithm is ProtoNet, which needs classes"):
        module.check_data(Sinusoid(), "val")


def test_it_adapts_to_any_number_of_classes_and_is_kept(trained: Path, tmp_path: Path) -> None:
    learner = dmaml_pl.load(trained)
    x, names = torch.rand(8, 1, 28, 28), ["cat", "cow", "dog", "eel"] * 2
    adapted = learner.adapt(x, names)
    assert (adapted.classes, adapted.steps, adapted.shapes["output"]) == (("cat", "cow", "dog", "eel"), 0, [4])
    network: Any = learner.network
    with torch.no_grad():
        prototypes = network.embed(x).view(2, 4, -1).mean(dim=0)
        distances = torch.cdist(network.embed(x.flip(0)), prototypes).square()
    found = adapted.predict(x.flip(0))
    torch.testing.assert_close(found, (-distances).softmax(dim=-1), rtol=1e-3, atol=1e-4)
    adapted.save(tmp_path / "adapted.pt")
    again = dmaml_pl.load_adapted(tmp_path / "adapted.pt")
    assert torch.equal(again.predict(x.flip(0)), found)
    assert again.network.get_parameter("head.weight").shape[0] == 4
    assert again.classes == adapted.classes
    assert network.head.out_features == 5  # the learner's own stays


def test_steps_that_an_algorithm_has_not_and_a_single_class_are_refused(trained: Path) -> None:
    learner = dmaml_pl.load(trained)
    with pytest.raises(ConfigError, match=r"steps is 2, but ProtoNet makes no adaptation steps: leave it out"):
        learner.adapt(torch.rand(2, 1, 28, 28), ["cat", "dog"], steps=2)
    with pytest.raises(DataError, match=r"has 1 class \(cat\), but there must be 2 or more to tell apart"):
        learner.adapt(torch.rand(2, 1, 28, 28), ["cat", "cat"])


def test_the_command_adapts_to_more_classes_than_the_training_had(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    draw_folders(tmp_path / "support", {"a.png": 0})
    draw_folders(tmp_path / "query", {"b.png": 8})
    words = ["adapt", "--ckpt", str(trained), "--query", "query"]
    assert main([*words, "--support", "support", "--save", "kept.pt"]) == 0
    assert "5 samples, after 0 adaptation steps on 5 support samples" in capfd.readouterr().out
    first = Path("predictions.csv").read_text()
    assert all(f"p({name})" in first for name in NAMES)
    assert main(["adapt", "--ckpt", "kept.pt", "--query", "query"]) == 0
    assert Path("predictions.csv").read_text() == first
