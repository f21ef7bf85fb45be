"""Policies in use: adapted to a task of one's own by `dmaml adapt` and from Python, and what is refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dmaml_pl
from dmaml_pl import AdaptedPolicy
from dmaml_pl.__main__ import main
from dmaml_pl.adapting.recipe import build
from dmaml_pl.data import TaskDataModule
from dmaml_pl.errors import CheckpointError, ConfigError, DataError
from dmaml_pl.tasks import derive_seed
from tests.adapting import FEW, TRAINER, train
from tests.recipes import same, state_of

GOAL = '{"goal": [0.3, -0.2]}'
POLICY: dict[str, Any] = {
    "data": {
        "class_path": "data_modules.Navigation2D",
        "init_args": FEW | {"rollouts": 4, "horizon": 10},
    },
    "model": {
        "class_path": "dmaml_pl.MetaLearning",
        "init_args": {
            "objective": {"class_path": "dmaml_pl.PolicyGradient"},
            "network": {
                "class_path": "dmaml_pl.GaussianMLP",
                "init_args": {"observations": 2, "actions": 2, "hidden": [8]},
            },
            "algorithm": {
                "class_path": "dmaml_pl.MAML",
                "init_args": {
                    "inner_lr": 0.1,
                    "inner_optimizer": {"class_path": "dmaml_pl.InnerScales", "init_args": {"scales": [1.0, 0.5]}},
                },
            },
            "meta_optimizer": {"class_path": "dmaml_pl.TrustRegion"},
            "evaluation_steps": 3,
            "compile": False,
        },
    },
    "trainer": TRAINER,
    "checkpoint": {"monitor": "val/return", "mode": "max"},
    "meta_test": False,
}


@pytest.fixture(scope="module")
def navigator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint of a tiny policy."""
    return train(tmp_path_factory.mktemp("navigator"), POLICY, "--trainer.logger=false")


Refusal = Callable[..., str]


# -- the command ---------------------------------------------------------------------------------------------------


def test_the_command_tells_the_returns_before_and_after_each_step_beside_that_of_whoever_knows_the_goal(
    navigator: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["adapt", "--ckpt", str(navigator), "--task", GOAL, "--steps", "2"]) == 0
    said = capsys.readouterr().out
    assert 'Return in {"goal": [0.3, -0.2]}' in said
    rows = re.findall(r"│ +(\d) │ +(-\d+\.\d\d) ± \d+\.\d\d │ +(-\d+\.\d\d) │", said)
    adapted = dmaml_pl.load(navigator).adapt_to({"goal": [0.3, -0.2]}, steps=2)
    assert [(int(step), mean) for step, mean, _ in rows] == [
        (step, f"{mean:.2f}") for step, mean in enumerate(adapted.returns)
    ]
    assert {best for _, _, best in rows} == {"-0.32"}  # 0.22, then 0.1 away, then there
    assert "over 4 rollouts" in said


def test_what_is_saved_acts_as_what_was_adapted(navigator: Path, tmp_path: Path) -> None:
    kept = tmp_path / "adapted.pt"
    assert main(["adapt", "--ckpt", str(navigator), "--task", GOAL, "--save", str(kept)]) == 0
    loaded = dmaml_pl.load_adapted(kept)
    assert isinstance(loaded, AdaptedPolicy)
    adapted = dmaml_pl.load(navigator).adapt_to({"goal": [0.3, -0.2]})
    assert (loaded.task, loaded.steps, loaded.returns) == ({"goal": [0.3, -0.2]}, 1, adapted.returns)
    assert same(state_of(loaded.network), state_of(adapted.network))
    actions = [
        policy.act(torch.rand(3, 2, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2))
        for policy in (loaded, adapted)
    ]
    assert torch.equal(*actions)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ('{"aim": [0.3, -0.2]}', "A task is {'aim': [0.3, -0.2]}, but must be goal: [x, y], two numbers"),
        ('{"goal": [0.3]}', "must be goal: [x, y]"),
        ('{"goal": 3}', "must be goal: [x, y]"),
        ('{"goal": [NaN, 1]}', "must be goal: [x, y]"),
        ('{"goal": [0.3, "far"]}', "must be goal: [x, y]"),
        ("[0.3, -0.2]", "--task is [0.3, -0.2], but must be a JSON object, such as '{\"goal\": [0.3, -0.2]}'"),
        ("{goal: 3}", "--task is {goal: 3}, but must be a JSON object"),
    ],
)
def test_a_task_that_the_environments_do_not_have_is_told_in_one_line(
    navigator: Path, refusal: Refusal, task: str, said: str
) -> None:
    assert said in refusal("--ckpt", navigator, "--task", task)


def test_samples_for_a_policy_and_a_task_for_another_network_are_refused(
    navigator: Path, sines: Path, refusal: Refusal, tmp_path: Path
) -> None:
    table = tmp_path / "t.csv"
    table.write_text("x,y\n0,0\n")
    assert "in place of --support and --query give --task" in refusal(
        "--ckpt", navigator, "--support", table, "--query", table
    )
    assert "leave out --support" in refusal("--ckpt", navigator, "--support", table, "--task", GOAL)
    assert "leave out --onnx" in refusal("--ckpt", navigator, "--onnx", "a.onnx", "--task", GOAL)
    assert "in place of --task give --support and --query" in refusal("--ckpt", sines, "--task", GOAL)
    assert refusal("--ckpt", navigator).startswith("Not set: --query (or --task, for a policy)")
    assert main(["adapt", "--ckpt", str(navigator), "--task", GOAL, "--save", "adapted.pt"]) == 0


def test_a_policy_that_is_adapted_already_is_for_python(
    navigator: Path, capfd: pytest.CaptureFixture[str], refusal: Refusal
) -> None:
    assert main(["adapt", "--ckpt", str(navigator), "--task", GOAL, "--save", "adapted.pt"]) == 0
    capfd.readouterr()
    assert "load_adapted(FILE).act(observations)" in refusal("--ckpt", "adapted.pt", "--task", GOAL)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fit", "--register=nav"], "register is nav, but a policy adapts by acting in environments"),
        (["predict", "--ckpt_path=last.ckpt"], "dmaml predict writes predictions of query samples, but data is Navig"),
    ],
)
def test_what_cannot_be_had_of_policies_is_told_before_any_work(
    words: list[str], said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # Lightning's call
    Path("policy.yaml").write_text(yaml.safe_dump(POLICY), encoding="utf-8")
    Path("last.ckpt").touch()
    assert main([words[0], "--config=policy.yaml", *words[1:]]) == 1
    err = capfd.readouterr().err
    assert f"dmaml: error: {said}" in err
    assert "Traceback" not in err


# -- from Python ---------------------------------------------------------------------------------------------------


def test_it_adapts_as_the_meta_test_does(navigator: Path) -> None:
    learner = dmaml_pl.load(navigator)
    data = learner.data
    task, seed = {"goal": [0.1, 0.4]}, derive_seed("adapt", 0)
    expected = data.tasks_of([task], [seed], [0]).returns(learner.module.act_of(learner.module.learner, 3))
    before = state_of(learner.network)
    adapted = learner.adapt_to(task, steps=3)
    assert adapted.returns == pytest.approx(expected[0].tolist())
    assert same(state_of(learner.network), before)


def test_the_adapted_policy_is_that_which_made_the_last_rollouts(navigator: Path) -> None:
    learner = dmaml_pl.load(navigator)
    adapted = learner.adapt_to({"goal": [0.1, 0.4]}, steps=2)
    act = learner.module.act_of(learner.module.learner, 2)
    seeds = [derive_seed("adapt", 0)]
    made, _ = learner.data.adapt_by_rollouts(act, [{"goal": [0.1, 0.4]}], seeds)
    said: Any = adapted.distribution(made[-1].observations[0, :, 0])
    assert torch.allclose(said.mean, made[-1].acting.mean[0, :, 0], atol=1e-6)


def test_it_acts_on_one_observation_or_many_and_more_rollouts_may_be_asked_for(navigator: Path) -> None:
    adapted = dmaml_pl.load(navigator).adapt_to({"goal": [0.1, 0.4]}, rollouts=6, seed=1)
    assert adapted.support == 6
    assert adapted.act([0.0, 0.1]).shape == (2,)
    assert adapted.act(torch.zeros(5, 2)).shape == (5, 2)
    with pytest.raises(DataError, match="must be one or more samples of shape"):
        adapted.act(torch.zeros(5, 3))
    with pytest.raises(DataError, match="ask it for actions"):
        adapted.predict(torch.zeros(5, 2))
    with pytest.raises(ConfigError, match="not written as ONNX"):
        adapted.to_onnx("a.onnx")


def test_a_policy_does_not_adapt_to_samples_nor_another_network_to_tasks(navigator: Path, sines: Path) -> None:
    with pytest.raises(DataError, match="adapt_to"):
        dmaml_pl.load(navigator).adapt(torch.zeros(2, 2), torch.zeros(2, 2))
    with pytest.raises(DataError, match="adapt\\(x, y\\)"):
        dmaml_pl.load(sines).adapt_to({"goal": [0.1, 0.4]})


@pytest.mark.parametrize("code", ["os.system", "shutil:Wiper-v0"])
def test_a_checkpoint_that_names_an_environment_of_somebodys_does_not_run_it_unasked(code: str) -> None:
    def made(environment: str, *trust: str) -> Any:
        settings = {"class_path": "data_modules.GymnasiumTasks", "init_args": {"environment": environment}}
        return build(settings, (TaskDataModule,), trust)

    with pytest.raises(CheckpointError, match=f"it names {code}, which comes with neither"):
        made(code)
    with pytest.raises(CheckpointError, match=r"it names tests\.policies\.small_trainer"):
        made("tests.policies.small_trainer", "tests.policies")  # by way of what is trusted
    assert made(code, "os", "shutil", "posix").environment == code
