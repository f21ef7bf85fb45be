"""Policies trained as any network: two workers merge, resume to the bit, share a meta-iteration, and learn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from data_modules import Navigation2D, Sinusoid
from dmaml_pl import (
    CAVIA,
    MAML,
    MLP,
    ContextMLP,
    DMAMLStrategy,
    Epochs,
    GaussianMLP,
    GaussianPolicy,
    MetaLearning,
    MetaSGD,
    PolicyGradient,
    TaskParallelStrategy,
    TrustRegion,
    ValidationWeightedMerge,
)
from dmaml_pl.algorithms import Algorithm
from dmaml_pl.errors import ConfigError
from tests.recipes import Recorder, same, small_trainer, state_of
from tests.workers import in_workers

STEPS, RUN = 6, 2
"""Meta-iterations of a training, and of a run."""


def navigation(**settings: Any) -> Navigation2D:
    return Navigation2D(**{"meta_batch": 2, "rollouts": 3, "horizon": 6, "val_tasks": 4, "seed": 0} | settings)


def trust_region(params: Any) -> TrustRegion:
    return TrustRegion(params, max_kl=0.02, damping=0.1)  # so that rounding stays small


def undamped(params: Any) -> TrustRegion:
    return TrustRegion(params, max_kl=0.02)


def proximal(params: Any) -> Epochs:
    return Epochs(params, lambda params: torch.optim.Adam(params, lr=0.002), epochs=2)


def mlp() -> nn.Module:
    return GaussianMLP(2, 2, [4])


def context() -> nn.Module:
    return GaussianPolicy(ContextMLP(2, [4], 2, context=2), 2)


class Case(NamedTuple):
    """A policy, what adapts it, and what meta-learns it."""

    algorithm: Callable[[], Algorithm]
    network: Callable[[], nn.Module] = mlp
    optimizer: Callable[[Any], Any] = trust_region
    objective: Callable[[], PolicyGradient] = PolicyGradient

    def module(self, **settings: Any) -> MetaLearning:
        torch.manual_seed(0)
        given: dict[str, Any] = {"meta_optimizer": self.optimizer} | settings
        return MetaLearning(self.network(), self.algorithm(), self.objective(), 2, **given)


CASES = {
    "MAML": Case(lambda: MAML(inner_lr=0.1)),
    "Meta-SGD": Case(lambda: MetaSGD(inner_lr=0.1)),
    "CAVIA": Case(CAVIA, context),
    "ProMP": Case(lambda: MAML(inner_lr=0.1), mlp, proximal, lambda: PolicyGradient(clip=0.3, inner_penalty=5e-4)),
}

each_case = pytest.mark.parametrize("name", sorted(CASES))


class _Keeper(pl.Callback):
    """Keeps the checkpoint of the second merge."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == STEPS - RUN:
            trainer.save_checkpoint(self.file)


class _Told(pl.Callback):
    """Keeps what every run tells."""

    def __init__(self) -> None:
        self.reports: list[Any] = []
        self.env_steps: list[int] = []

    def on_run_end(self, trainer: Any, module: Any, report: Any) -> None:
        self.reports.append(report)
        self.env_steps.append(module.env_steps)


def _fit(
    module: MetaLearning, strategy: Any, callbacks: list[Any], max_steps: int = STEPS, **settings: Any
) -> dict[str, Tensor]:
    """The state of the module and of its meta-optimizer, after a training by this and the other worker."""
    trainer = small_trainer(devices=2, strategy=strategy, max_steps=max_steps, callbacks=callbacks)
    trainer.fit(module, navigation(), **settings)
    torch.distributed.destroy_process_group()
    moments = trainer.optimizers[0].state_dict()["state"]
    return state_of(module) | {
        f"{number}.{kind}": value.clone()
        for number, of_parameter in moments.items()
        for kind, value in of_parameter.items()
        if isinstance(value, Tensor)
    }


def _train_and_resume(name: str, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    module, recorder, told, file = CASES[name].module(), Recorder(), _Told(), folder / "kept.ckpt"
    straight = _fit(module, DMAMLStrategy(run_length=RUN), [recorder, told, _Keeper(file)])
    resumed = _fit(module, DMAMLStrategy(run_length=RUN), [], ckpt_path=file)
    shared = CASES[name].module()
    _fit(shared, TaskParallelStrategy(run_length=RUN), [], max_steps=RUN)
    return {
        "merged": recorder.states,
        "reports": told.reports,
        "env_steps": told.env_steps,
        "straight": straight,
        "resumed": resumed,
        "shared": state_of(shared),
    }


@each_case
def test_two_workers_merge_policies_resume_to_the_bit_and_make_the_steps_of_one_together(
    name: str, tmp_path: Path
) -> None:
    first, second = in_workers(_train_and_resume, 2, name, tmp_path)
    assert [same(mine, other) for mine, other in zip(first["merged"], second["merged"], strict=True)] == [True] * 3
    assert not same(first["merged"][0], first["merged"][1])
    assert same(first["straight"], first["resumed"])
    assert same(second["straight"], second["resumed"])
    assert same(first["shared"], second["shared"])
    torch.testing.assert_close(first["shared"], _trained_by_one(CASES[name]), rtol=1e-3, atol=1e-5)
    _check_what_is_told(first, second)


def _check_what_is_told(first: dict[str, Any], second: dict[str, Any]) -> None:
    for mine, other in zip(first["reports"], second["reports"], strict=True):
        named = {"loss", "return", "return_before", "explained_variance", "kl", "inner_kl", "entropy"}
        assert named <= mine["series"].keys()
        assert float(mine["series"]["inner_kl"].min()) > 0
        assert 0 < float(mine["series"]["sampling_seconds"].sum()) < mine["seconds"]
        assert mine["merge"]["merge/kl"] == other["merge"]["merge/kl"] > 0
        assert bool(torch.isfinite(mine["series"]["kl"]).all())
    # Two workers, two meta-iterations, two tasks of three rollouts of six steps, before and after adaptation.
    assert first["env_steps"] == second["env_steps"]
    assert 0.9 * 288 < first["env_steps"][0] <= 288
    assert first["env_steps"][2] > 2 * first["env_steps"][0]


class _Both:
    """The tasks of two workers as one worker's."""

    def __init__(self, data: Navigation2D) -> None:
        self.data, self.seed = data, data.seed

    def sample(self, *, worker: int, run: int, iteration: int, act: Any) -> Any:
        shares = [self.data.sample(worker=each, run=run, iteration=iteration, act=act) for each in range(2)]
        columns = zip(*(share.tensors() for share in shares), strict=True)
        return shares[0].with_tensors([torch.cat(column) for column in columns])


def _trained_by_one(case: Case) -> dict[str, Tensor]:
    """What one worker makes of the tasks of both."""
    module = case.module(run_length=RUN)
    loader: Any = torch.utils.data.DataLoader([_Both(navigation())], batch_size=None)  # type: ignore[arg-type]
    small_trainer(max_steps=RUN).fit(module, loader)
    return state_of(module)


def test_the_return_after_adaptation_rises_within_a_few_meta_iterations() -> None:
    torch.manual_seed(0)
    told = _Told()
    module = MetaLearning(
        GaussianMLP(2, 2, [32], init_std=0.5), MAML(0.1), PolicyGradient(), 1, meta_optimizer=undamped, run_length=1
    )
    data = Navigation2D(meta_batch=8, rollouts=8, horizon=30, val_tasks=20, seed=0)
    trainer = small_trainer(max_steps=10, callbacks=[told])
    trainer.fit(module, data)
    returns = torch.stack([report["series"]["return"][0] for report in told.reports])
    before = torch.stack([report["series"]["return_before"][0] for report in told.reports])
    # Which are less than zero; what differs by rounding comes to 0.6 to 0.65 times the first one.
    assert float(returns[-3:].mean()) > 0.75 * float(returns[0])
    assert float((returns - before)[-3:].mean()) > 2.0


def _refusal(module: MetaLearning, data: Any, **settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        small_trainer(max_steps=1, **settings).fit(module, data)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_does_not_fit_environments_is_refused_in_one_line_by_its_setting() -> None:
    policy = CASES["MAML"].module
    assert "model.network gives a Tensor, but environments need a policy" in _refusal(
        MetaLearning(MLP(2, [4], 2), MAML(), PolicyGradient(), meta_optimizer=trust_region), navigation()
    )
    assert "model.network.actions is 3" in _refusal(
        MetaLearning(GaussianMLP(2, 3), MAML(), PolicyGradient(), meta_optimizer=trust_region), navigation()
    )
    assert "set the sizes of its observations" in _refusal(
        MetaLearning(GaussianMLP(5, 2), MAML(), PolicyGradient(), meta_optimizer=trust_region), navigation()
    )
    assert "model.objective is regression, but the data has environments" in _refusal(
        MetaLearning(GaussianMLP(2, 2), MAML(), "regression"), navigation()
    )
    assert "but the data has no rollouts" in _refusal(
        MetaLearning(GaussianMLP(1, 1), MAML(), PolicyGradient()), Sinusoid()
    )
    assert "trainer.precision is 64-true" in _refusal(policy(), navigation(), precision="64-true")
    assert "model.meta_optimizer is TrustRegion" in _refusal(
        MetaLearning(MLP(), MAML(), meta_optimizer=trust_region), Sinusoid()
    )
    merge = DMAMLStrategy(run_length=1, merge=ValidationWeightedMerge())
    assert "trainer.strategy.merge" in _refusal(policy(), navigation(), strategy=merge)
    assert "model.engine is learn2learn" in _refusal(policy(engine="learn2learn"), navigation())
