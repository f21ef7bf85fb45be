"""A checkpoint that is missing, damaged, changed, or another network's is told in one line, before any training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dmaml_pl import DMAMLStrategy, RunCheckpoint
from dmaml_pl.cli.resume import find_origin
from dmaml_pl.errors import CheckpointError
from tests.bad_input import MODEL, SINUSOID, Refusal, as_the_user_left_it, changed, make_refusal  # noqa: F401 - fixtures
from tests.recipes import small_data, small_maml, small_trainer

KEEPS: dict[str, Any] = {"enable_checkpointing": True, "callbacks": RunCheckpoint()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of one meta-iteration of a network like that of SINUSOID."""
    path = tmp_path_factory.mktemp("trained") / "good.ckpt"
    module = small_maml(meta_optimizer=lambda params: torch.optim.Adam(params, lr=0.003))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        trainer = small_trainer(max_steps=1, **KEEPS)
        trainer.fit(module, small_data())
        trainer.save_checkpoint(path)
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    return checkpoint


@pytest.mark.parametrize("name", ["last", "best"])
def test_before_any_training_there_is_no_last_or_best_checkpoint(name: str, refusal: Refusal) -> None:
    text = refusal("--ckpt_path", name, config=SINUSOID)
    assert text.startswith(f"--ckpt_path is {name}, but no training has left a checkpoint under mlruns/checkpoints/")


@pytest.mark.parametrize("name", ["nope.ckpt", ".", ""])
def test_a_checkpoint_that_is_not_there_is_named(name: str, refusal: Refusal) -> None:
    text = refusal("--ckpt_path", name, config=SINUSOID)
    assert text == f"--ckpt_path is {name}, but there is no such file: give best, last or a file."


@pytest.mark.parametrize("words", [["fit"], ["test", "--checkpoint.dirpath", "kept"]])
def test_a_job_that_goes_on_by_itself_is_a_training_with_a_folder_of_its_own(
    refusal: Refusal, words: list[str]
) -> None:
    text = refusal(*words, "--ckpt_path", "auto", config=SINUSOID)
    assert text.endswith("it is for dmaml fit, and needs checkpoint.dirpath, a folder for this training alone.")


@pytest.mark.parametrize("command", ["test", "predict"])
def test_a_meta_test_without_a_checkpoint_asks_for_one(command: str, refusal: Refusal) -> None:
    assert refusal(command, config=SINUSOID) == f"dmaml {command} needs --ckpt_path: give best, last or a file."


@pytest.mark.parametrize("content", [b"", b"hello world\n"])
def test_a_file_that_is_no_checkpoint_is_refused(content: bytes, refusal: Refusal) -> None:
    Path("t.ckpt").write_bytes(content)
    text = refusal("--ckpt_path", "t.ckpt", config=SINUSOID)
    assert text.startswith("--ckpt_path t.ckpt is truncated, damaged, or no checkpoint at all: ")


@pytest.mark.parametrize("share", [0.1, 0.99])
def test_a_truncated_checkpoint_is_refused(share: float, trained: dict[str, Any], refusal: Refusal) -> None:
    torch.save(trained, "t.ckpt")
    whole = Path("t.ckpt").read_bytes()
    Path("t.ckpt").write_bytes(whole[: int(share * len(whole))])
    text = refusal("test", "--ckpt_path", "t.ckpt", config=SINUSOID)
    assert text.startswith("--ckpt_path t.ckpt is truncated, damaged, or no checkpoint at all: ")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_bare_weights_are_refused(command: str, trained: dict[str, Any], refusal: Refusal) -> None:
    torch.save({"state_dict": trained["state_dict"]}, "t.ckpt")
    text = refusal(command, "--ckpt_path", "t.ckpt", config=SINUSOID)
    assert text.startswith("--ckpt_path t.ckpt is no checkpoint of a training, as it lacks state_dict or ")


def test_the_checkpoint_of_another_network_is_refused_with_the_first_weight_that_differs(
    trained: dict[str, Any], refusal: Refusal
) -> None:
    torch.save(trained, "t.ckpt")
    config = changed(SINUSOID, {f"{MODEL}.network.init_args.hidden": [9, 8], "trainer.max_steps": 2})
    assert refusal("--ckpt_path", "t.ckpt", config=config).startswith(
        "--ckpt_path t.ckpt was made for another network: learner.network.layers.0.weight is (8, 1) in the checkpoint "
        "and (9, 1) in model.network."
    )


def test_training_on_from_weights_alone_is_refused(trained: dict[str, Any], refusal: Refusal) -> None:
    torch.save({key: value for key, value in trained.items() if key != "optimizer_states"}, "t.ckpt")
    text = refusal("--ckpt_path", "t.ckpt", config=changed(SINUSOID, {"trainer.max_steps": 2}))
    assert text.startswith("--ckpt_path t.ckpt holds weights only, from which no training can go on: ")


def test_training_on_with_another_meta_optimizer_is_refused(trained: dict[str, Any], refusal: Refusal) -> None:
    torch.save(trained, "t.ckpt")
    sgd = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    config = changed(SINUSOID, {f"{MODEL}.meta_optimizer": sgd, "trainer.max_steps": 2})
    assert refusal("--ckpt_path", "t.ckpt", config=config).startswith(
        "--ckpt_path t.ckpt was made with another meta-optimizer: it has no dampening, momentum, nesterov."
    )


def test_training_on_with_other_weights_frozen_is_refused(trained: dict[str, Any], refusal: Refusal) -> None:
    torch.save(trained, "t.ckpt")
    config = changed(SINUSOID, {"trainer.max_steps": 2, f"{MODEL}.freeze": ["layers.0.*"]})
    assert refusal("--ckpt_path", "t.ckpt", config=config).startswith(
        "--ckpt_path t.ckpt has the moments of 6 weights, but 4 learn now: set model.freeze, model.network and model.al"
    )


def test_a_file_of_safetensors_that_is_damaged_is_no_checkpoint(refusal: Refusal) -> None:
    Path("t.safetensors").write_bytes(b'\x10\0\0\0\0\0\0\0{"a": 1}        ')
    text = refusal("test", "--ckpt_path", "t.safetensors", config=SINUSOID)
    assert text.startswith("--ckpt_path t.safetensors is truncated, damaged, or no checkpoint at all: ")


def test_training_on_to_where_the_training_is_already_is_refused(trained: dict[str, Any], refusal: Refusal) -> None:
    torch.save(trained, "t.ckpt")
    text = refusal("--ckpt_path", "t.ckpt", config=SINUSOID)
    assert text == ("t.ckpt has already made 1 meta-iterations, and trainer.max_steps is 1: set it higher to train on.")


def _set(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint.update(values)


def _group(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda checkpoint: checkpoint["optimizer_states"][0]["param_groups"][0].update(values)


def _moments(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["optimizer_states"][0]["state"].values():
        state["exp_avg"] = torch.zeros(3, 3)


def _kept_best(checkpoint: dict[str, Any]) -> None:
    for state in checkpoint["callbacks"].values():
        del state["best_model_score"]


def _count(checkpoint: dict[str, Any]) -> None:
    checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] = "many"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_set(global_step="abc"), "global_step is 'abc'"),
        (_set(global_step=-5), "global_step is '-5'"),
        (_set(global_step=10**30), "global_step is '1000000000"),
        (_set(epoch=-3), "epoch is '-3'"),
        (_set(callbacks="x"), "callbacks is 'x'"),
        (_kept_best, "callbacks cannot be restored (KeyError: 'best_model_score')"),
        (_set(optimizer_states="x"), "optimizer_states is 'x'"),
        (_set(optimizer_states=["x"]), "optimizer_states cannot be restored ("),
        (_set(lr_schedulers=["x"]), "lr_schedulers cannot be restored ("),
        (_set(loops="x"), "loops is 'x'"),
        (_set(loops={}), "loops cannot be restored (KeyError: 'fit_loop')"),
        (_count, "loops cannot be restored (ready is 'many')"),
        (_set(runs={"done": "many"}), "runs and validations cannot be restored ("),
        (_set(runs={"done": -4}), "runs and validations cannot be restored (done is -4)"),
        (_set(validations=[3]), "runs and validations cannot be restored ("),
        (_set(dmaml={"workers": 0}), "dmaml cannot be restored (workers is 0)"),
        (_set(**{"pytorch-lightning_version": "x"}), "version cannot be restored (Invalid version: 'x')"),
        (_group(lr="fast"), "optimizer_states cannot be restored (model.meta_optimizer is Adam, which cannot make a "),
        (_group(lr=float("nan")), "optimizer_states cannot be restored (model.meta_optimizer is Adam, which cannot ma"),
        (lambda x: x["optimizer_states"][0].update(state={}), "optimizer_states cannot be restored (they have no stat"),
        (
            _moments,
            "optimizer_states cannot be restored (model.meta_optimizer is Adam, which cannot make a step and be kept (",
        ),
    ],
)
def test_a_checkpoint_that_was_changed_is_refused_with_what_is_wrong(
    change: Callable[[dict[str, Any]], object], expected: str, trained: dict[str, Any]
) -> None:
    checkpoint = copy.deepcopy(trained)
    change(checkpoint)
    torch.save(checkpoint, "t.ckpt")
    module = small_maml(meta_optimizer=lambda params: torch.optim.Adam(params, lr=0.003))
    trainer = small_trainer(max_steps=2, strategy=DMAMLStrategy(), **KEEPS)
    with pytest.raises(CheckpointError) as refused:  # before trackers are opened
        find_origin("t.ckpt", "fit", trainer, module, module.trial_optimizer())
    assert str(refused.value).startswith(f"--ckpt_path t.ckpt was changed or is damaged, as its {expected}")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_weights_that_are_not_finite_or_no_weights_are_refused(
    command: str, trained: dict[str, Any], refusal: Refusal
) -> None:
    name = "learner.network.layers.0.weight"
    weights = trained["state_dict"][name]
    for other in (
        weights * float("nan"),
        weights.to("meta"),
        weights.to_sparse(),
        trained["state_dict"][name].long().tolist(),
    ):
        torch.save(trained | {"state_dict": trained["state_dict"] | {name: other}}, "t.ckpt")
        text = refusal(command, "--ckpt_path", "t.ckpt", config=changed(SINUSOID, {"trainer.max_steps": 2}))
        assert text.startswith(("--ckpt_path t.ckpt is of no use: ", "--ckpt_path t.ckpt was made for another network"))
    torch.save(trained | {"state_dict": {key: each.long() for key, each in trained["state_dict"].items()}}, "t.ckpt")
    text = refusal(command, "--ckpt_path", "t.ckpt", config=changed(SINUSOID, {"trainer.max_steps": 2}))
    assert text == f"--ckpt_path t.ckpt is of no use: {name} is of type torch.int64."
