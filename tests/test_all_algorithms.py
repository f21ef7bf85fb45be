"""All algorithms of the package: trained by two workers, merged, resumed, shared, adapted from their checkpoints.

That each is the same in every engine and when compiled is said by the promises that its own tests inherit; that what is
compiled is merged and resumed to the bit, in `test_own_algorithm.py`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

import dmaml_pl
from data_modules import Glyphs, Sinusoid
from dmaml_pl import ANIL, BOIL, MLP, DMAMLStrategy, MetaLearning, TaskParallelStrategy
from dmaml_pl import algorithms as package
from dmaml_pl.algorithms import Algorithm
from dmaml_pl.data import TaskDataModule
from dmaml_pl.objectives import ObjectiveName
from dmaml_pl.tasks import TaskBatch
from tests.recipes import Recorder, meta_gradient, same, small_trainer, state_of
from tests.workers import in_workers

STEPS, RUN = 6, 2
"""Meta-iterations of a training, and of a run."""


def _sinusoid() -> TaskDataModule:
    return Sinusoid(shots=4, queries=4, meta_batch=2, seed=0)


def _glyphs() -> TaskDataModule:
    data = Glyphs(ways=3, shots=2, queries=2, meta_batch=2, seed=0)
    data.setup()
    return data


class Case(NamedTuple):
    """An algorithm and what it is tried on, as small as can be."""

    algorithm: Callable[[], Algorithm]
    network: Callable[[], nn.Module] = lambda: MLP(hidden=[4])
    data: Callable[[], TaskDataModule] = _sinusoid
    objective: ObjectiveName = "regression"

    def module(self, **settings: Any) -> MetaLearning:
        torch.manual_seed(0)
        given: dict[str, Any] = {"engine": "vectorized", "meta_optimizer": _adam} | settings
        return MetaLearning(self.network(), self.algorithm(), self.objective, 2, **given)


def _adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=0.01)


def _sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def _norm_network() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1))


def _conv4() -> nn.Module:
    return dmaml_pl.Conv4(ways=3, filters=4)


CASES = {
    "ALFA": Case(lambda: dmaml_pl.ALFA(inner_lr=0.05, inner_steps=2, meta_lr=0.02)),
    "ANIL": Case(lambda: ANIL(inner_lr=0.05, inner_steps=2)),
    "BOIL": Case(lambda: BOIL(inner_lr=0.05, inner_steps=2)),
    "CAVIA": Case(lambda: dmaml_pl.CAVIA(inner_steps=2), lambda: dmaml_pl.ContextMLP(hidden=[4])),
    "IMAML": Case(lambda: dmaml_pl.IMAML(inner_steps=3, regularization=20.0, cg_steps=2)),
    "KFO": Case(lambda: dmaml_pl.KFO(inner_lr=0.05, inner_steps=2)),
    "LSLR": Case(lambda: dmaml_pl.LSLR(inner_lr=0.05, inner_steps=2, first_order_until=3)),
    "MAML": Case(lambda: dmaml_pl.MAML(inner_lr=0.05, inner_steps=2, inner_optimizer=dmaml_pl.InnerAdam())),
    "MAMLPlusPlus": Case(
        lambda: dmaml_pl.MAMLPlusPlus(multi_step_until=5, inner_lr=0.05, inner_steps=2), _norm_network
    ),
    "MetaCurvature": Case(lambda: dmaml_pl.MetaCurvature(inner_lr=0.05, inner_steps=2)),
    "MetaSGD": Case(lambda: dmaml_pl.MetaSGD(inner_lr=0.05, inner_steps=2)),
    "PMF": Case(dmaml_pl.PMF, _conv4, _glyphs, "classification"),
    "ProtoMAML": Case(lambda: dmaml_pl.ProtoMAML(inner_steps=2), _conv4, _glyphs, "classification"),
    "ProtoNet": Case(dmaml_pl.ProtoNet, _conv4, _glyphs, "classification"),
    "Reptile": Case(lambda: dmaml_pl.Reptile(inner_lr=0.01, inner_steps=3, inner_batch=3)),
}
"""By name, one for every algorithm of the package."""

BASES = {"Algorithm", "GradientTransform", "LearnedStep"}
"""What is public to be subclassed."""

each_algorithm = pytest.mark.parametrize("name", sorted(CASES))


def test_every_algorithm_of_the_package_is_tried() -> None:
    public = {
        name
        for name in package.__all__
        if isinstance(kind := getattr(package, name), type) and issubclass(kind, Algorithm)
    }
    assert public - BASES == CASES.keys()
    assert public - {"GradientTransform", "LearnedStep"} <= set(dmaml_pl.__all__)


# -- two workers -------------------------------------------------------------------------------------------------------


class _Keeper(pl.Callback):
    """Keeps the checkpoint of the second merge."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == STEPS - RUN:
            trainer.save_checkpoint(self.file)


def _train_and_resume(name: str, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    case = CASES[name]
    module, recorder, file = case.module(), Recorder(), folder / "kept.ckpt"
    straight = _fit(case, module, DMAMLStrategy(run_length=RUN), [recorder, _Keeper(file)])
    resumed = _fit(case, module, DMAMLStrategy(run_length=RUN), [], ckpt_path=file)
    shared = case.module(meta_optimizer=_sgd)
    _fit(case, shared, TaskParallelStrategy(run_length=RUN), [], max_steps=RUN)
    return {
        "merged": recorder.states,
        "straight": straight,
        "resumed": resumed,
        "shared": state_of(shared),
        "engine": module.engine_in_use,
    }


def _fit(
    case: Case, module: MetaLearning, strategy: Any, callbacks: list[Any], max_steps: int = STEPS, **settings: Any
) -> dict[str, Tensor]:
    """The state of the module and of its meta-optimizer, after a training by this and the other worker."""
    trainer = small_trainer(devices=2, strategy=strategy, max_steps=max_steps, callbacks=callbacks)
    trainer.fit(module, case.data(), **settings)
    torch.distributed.destroy_process_group()
    moments = trainer.optimizers[0].state_dict()["state"]
    return state_of(module) | {
        f"{number}.{kind}": value.clone()
        for number, of_parameter in moments.items()
        for kind, value in of_parameter.items()
    }


@each_algorithm
def test_two_workers_merge_and_resume_to_the_bit_and_share_the_meta_gradient_of_one(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    first, second = in_workers(_train_and_resume, 2, name, tmp_path)
    assert [same(mine, other) for mine, other in zip(first["merged"], second["merged"], strict=True)] == [True] * 3
    own = [own for own in first["merged"][0] if ".algorithm." in own]
    frozen = [own for own, _ in case.module().named_buffers()]
    assert not [own for own in {*own} - {*frozen} if torch.equal(first["merged"][0][own], first["merged"][1][own])]
    assert len(first["straight"]) > 3 * len(own)
    assert same(first["straight"], second["straight"])
    assert same(first["straight"], first["resumed"])
    assert same(second["straight"], second["resumed"])
    assert first["engine"] == "vectorized"
    assert same(first["shared"], second["shared"])
    torch.testing.assert_close(first["shared"], _trained_by_one(case), rtol=1e-5, atol=1e-6)
    _check_that_it_adapts(case, tmp_path / "kept.ckpt")


def _trained_by_one(case: Case) -> dict[str, Tensor]:
    """What one worker makes of the tasks of both."""
    module, data = case.module(), case.data()
    optimizer = _sgd(module.learner.param_groups())
    for number in range(RUN):
        optimizer.zero_grad()
        shares = [data.sample(worker=worker, run=0, iteration=number) for worker in range(2)]
        module.algorithm.begin(number)
        columns = zip(*(share.tensors() for share in shares), strict=True)
        meta_gradient(module, shares[0].with_tensors([torch.cat(column) for column in columns]))
        optimizer.step()
    return state_of(module)


def _check_that_it_adapts(case: Case, file: Path) -> None:
    """From its checkpoint, as the meta-test would."""
    module = case.module()
    learner = dmaml_pl.load(file, module)
    task: TaskBatch = case.data().sample(worker=0, run=9, iteration=0).task(0)
    steps = 3 if module.algorithm.makes_steps else None
    adapted = learner.adapt(task.support_x, task.support_y, steps=steps)
    batch = task.map(lambda tensor: tensor.unsqueeze(0))
    expected = module.engine.for_training(module.learner, batch).predict(module.learner, batch, 3)[0, -1]
    if case.objective == "classification":
        expected = expected.softmax(-1)
    torch.testing.assert_close(adapted.predict(task.query_x), expected)


# -- settings ----------------------------------------------------------------------------------------------------------


@each_algorithm
def test_the_command_line_knows_its_settings_also_those_of_its_bases(name: str) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(Algorithm, "algorithm")
    words = ["--algorithm", name]
    if name != "ProtoNet":  # which has none
        words += ["--algorithm.adapts", '["*"]']
    made = parser.instantiate(parser.parse_args(words)).algorithm
    assert type(made) is getattr(dmaml_pl, name)


def _settings(kind: type[Algorithm]) -> set[str]:
    made = [vars(each)["__init__"] for each in kind.__mro__ if issubclass(each, Algorithm) and "__init__" in vars(each)]
    settings = [each for init in made for each in inspect.signature(init).parameters.values()]
    return {each.name for each in settings if each.kind is each.POSITIONAL_OR_KEYWORD} - {"self"}


def test_the_page_of_algorithms_names_the_settings_that_each_has_of_its_own(repository: Path) -> None:
    page = (repository / "docs" / "algorithms.md").read_text()
    named = {
        name: {*re.findall(r"`(\w+)`", last)} for name, last in re.findall(r"(?m)^\| `(\w+)` \|.*\|([^|]*)\|$", page)
    }
    assert named.keys() == CASES.keys()
    shared = _settings(dmaml_pl.MAML)
    assert named.pop("MAML") == shared
    for name, settings in named.items():
        assert settings - shared == _settings(getattr(dmaml_pl, name)) - shared, name
