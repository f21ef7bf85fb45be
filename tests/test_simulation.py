"""Simulated workers are what so many processes are, and the time that they are said to take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_modules import Glyphs, Navigation2D, Sinusoid
from dmaml_pl import (
    ANIL,
    CAVIA,
    MAML,
    MLP,
    ContextConv4,
    Conv4,
    DMAMLStrategy,
    MAMLPlusPlus,
    MeanMerge,
    MergedAverage,
    MetaLearning,
    MetaSGD,
    OuterOptimizerMerge,
    ProtoMAML,
    Reptile,
    SimulatedStrategy,
    TaskParallelStrategy,
    ValidationWeightedMerge,
)
from dmaml_pl.cli.preflight import check_before
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.errors import ConfigError, NonFiniteError
from dmaml_pl.simulation.stacked import StackedWeights
from dmaml_pl.simulation.time_model import NETWORKS, Network, runs_of, seconds_of_run, slowest
from tests.recipes import Recorder, same, small_data, small_maml, small_trainer
from tests.workers import in_workers

RUNS, LENGTH = 50, 2


class Exact(Sinusoid):
    """In float64, where rounding does not grow to what can be seen in fifty runs."""

    def sample(self, **place: Any) -> Any:
        return super().sample(**place).map(Tensor.double)

    def sample_tasks(self, *given: Any) -> Any:
        return super().sample_tasks(*given).map(Tensor.double)


def adam(lr: float = 0.01) -> Any:
    return lambda weights: torch.optim.Adam(weights, lr=lr)


def rising(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.1, total_iters=30)


def train(kind: type[Any], devices: int, runs: int, of: str, **simulated: Any) -> tuple[list[Any], list[Any]]:
    """The states after each merge, and what is told of each, of the training named."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module: dict[str, Any] = {}
    strategy: dict[str, Any] = {}
    if of == "mean":
        module = {"gradient_clip": 0.5}
    if of == "outer":
        strategy = {"moments": "keep", "merge": OuterOptimizerMerge()}
        module = {"meta_schedule": rising, "algorithm": ANIL(0.05, inner_steps=2)}
    if of == "weighted":
        strategy = {"moments": "reset", "merge": ValidationWeightedMerge(tasks=3)}
        module = {"algorithm": Reptile(0.01, 2)}
    settings: dict[str, Any] = {"algorithm": MAML(0.05), "evaluation_steps": 1, "meta_optimizer": adam()}
    recorder = Recorder()
    trainer = small_trainer(
        devices=devices,
        strategy=kind(run_length=LENGTH, **strategy, **simulated),
        max_steps=LENGTH * runs,
        callbacks=[MergedAverage(0.5), recorder],
    )
    data = Exact(meta_batch=2, seed=0, val_tasks=8)
    trainer.fit(MetaLearning(MLP(hidden=[8, 8]).double(), **(settings | module)), data)
    return recorder.states, [report.get("merge", {}) for report in recorder.reports]


def simulate(workers: int, runs: int, of: str, **simulated: Any) -> tuple[list[Any], list[Any]]:
    try:
        return train(SimulatedStrategy, 1, runs, of, workers=workers, **simulated)
    finally:
        torch.distributed.destroy_process_group()


def far(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((some[name] - others[name]).abs().max()) for name in others)


@pytest.mark.parametrize(
    ("of", "workers", "runs"), [("mean", 4, RUNS), ("outer", 2, RUNS), ("weighted", 2, 5)], ids=str
)
def test_simulated_workers_have_the_weights_and_merges_of_as_many_processes(of: str, workers: int, runs: int) -> None:
    real, told = in_workers(train, workers, DMAMLStrategy, workers, runs, of)[0]
    found, said = simulate(workers, runs, of)
    assert len(found) == len(real) == runs
    assert far(found[0], real[0]) < far(real[-1], real[0]), "it has learned"
    assert max(map(far, found, real)) < 1e-9
    for ours, theirs in zip(said, told, strict=True):
        assert ours["merge/bytes"] == theirs["merge/bytes"]
        for name in ("merge/drift", "merge/agreement"):
            assert ours[name] == pytest.approx(theirs[name], abs=1e-9)


def test_simulated_averages_of_gradients_are_those_of_parallel_tasks() -> None:
    real, _ = in_workers(train, 2, TaskParallelStrategy, 2, 10, "mean")[0]
    found, told = simulate(2, 10, "mean", averages="gradients")
    assert max(map(far, found, real)) < 1e-9
    parameters = sum(tensor.numel() for tensor in found[0].values())
    assert told[0]["merge/gradient_bytes"] == 8 * (parameters + 1 + 2), "the loss, and a flag of each worker"


def test_a_simulation_repeats_to_the_bit() -> None:
    first, second = (simulate(3, 4, "mean")[0][-1] for _ in range(2))
    assert same(first, second)


@pytest.mark.parametrize("of", ["mean", "outer"])
def test_one_simulated_worker_is_a_training_by_one(of: str) -> None:
    real, _ = in_workers(train, 1, DMAMLStrategy, 1, 5, of)[0]
    assert max(map(far, simulate(1, 5, of)[0], real)) < 1e-9


LETTERS = {
    "MAML": (MAML(0.4, 2), Conv4),
    "ANIL": (ANIL(0.4), Conv4),
    "Meta-SGD": (MetaSGD(0.4), Conv4),
    "ProtoMAML": (ProtoMAML(0.01), Conv4),
    "CAVIA": (CAVIA(0.4), ContextConv4),
}


@pytest.mark.parametrize("name", LETTERS)
@pytest.mark.parametrize("at_once", [None, 4])
def test_all_workers_at_once_have_the_meta_gradients_of_each_alone(name: str, at_once: int | None) -> None:
    algorithm, network = LETTERS[name]
    torch.manual_seed(0)
    module = MetaLearning(network(ways=3, filters=4).double(), algorithm, "classification", evaluation_steps=2)
    data = Glyphs(ways=3, shots=1, queries=2, meta_batch=2, seed=0)
    data.prepare_data()
    data.setup("fit")
    batches = [data.sample(worker=worker, run=0, iteration=0).map(_exact) for worker in range(3)]
    stack = StackedWeights(module.learner, module.objective, 3, at_once)
    rows = torch.stack([stack.rows()[0] * scale for scale in (1.0, 0.9, 1.1)])
    parameters = [weight for weight in module.learner.meta().values() if weight.requires_grad]
    with torch.no_grad():
        for weight, values in zip(stack.weights.values(), rows.split([p.numel() for p in parameters], 1), strict=True):
            weight.copy_(values.view_as(weight))
    columns = zip(*(batch.tensors() for batch in batches), strict=True)
    losses, _ = stack.meta_gradients(batches[0].with_tensors([torch.cat(column) for column in columns]))
    for worker, batch in enumerate(batches):
        with torch.no_grad():
            for parameter, weight in zip(parameters, stack.weights.values(), strict=True):
                parameter.copy_(weight[worker])
        module.zero_grad()
        outcome = VectorizedEngine(module.objective).meta_gradient(module.learner, batch)
        assert losses[worker] == pytest.approx(float(outcome.loss), abs=1e-9)
        for parameter, weight in zip(parameters, stack.weights.values(), strict=True):
            assert (parameter.grad is None) == (weight.grad is None)
            if weight.grad is not None:
                torch.testing.assert_close(weight.grad[worker], parameter.grad, rtol=1e-8, atol=1e-9)


def _exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


class OfSeconds(MeanMerge):
    def weight(self, report: Any) -> float:
        return float(report["seconds"])


class Whole(torch.optim.SGD):
    """Its step is of the same length, whatever the gradient."""

    def step(self, closure: Any = None) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for gradient in gradients:
            gradient.div_(norm)
        return super().step(closure)


def refused(strategy: dict[str, Any], data: Any = None, **module: Any) -> Callable[[], Any]:
    def call() -> None:
        trainer = small_trainer(strategy=SimulatedStrategy(workers=2, **strategy))
        learner = small_maml(**{"meta_optimizer": adam(), **module})
        check_before("fit", trainer, learner, small_data() if data is None else data(), meta_test=False)

    return call


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (
            refused({"overlap": True, "moments": "keep"}),
            "trainer.strategy.overlap is true, but must be false for simul",
        ),
        (refused({"run_seconds": 1.0}), "trainer.strategy.run_seconds is 1.0, but must be null for simulated workers"),
        (refused({"transfer_dtype": "bfloat16"}), "trainer.strategy.transfer_dtype is bfloat16, but must be float32"),
        (refused({"merge": OfSeconds()}), "trainer.strategy.merge is OfSeconds, which weighs workers by their seconds"),
        (refused({}, engine="per_task"), "model.engine is per_task, but must be auto or vectorized for simulated"),
        (
            refused({}, meta_optimizer=lambda weights: Whole(weights, lr=0.1)),
            "model.meta_optimizer is Whole, whose step of one weight depends on the others",
        ),
    ],
)
def test_what_cannot_be_simulated_is_told_in_one_line_before_the_training(call: Callable[[], Any], told: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        call()
    assert told in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_algorithm_that_mixes_up_workers_is_refused() -> None:
    trainer = small_trainer(strategy=SimulatedStrategy(workers=2))
    module = MetaLearning(MLP(hidden=[8]), MAMLPlusPlus(inner_steps=2))
    with pytest.raises(ConfigError, match=r"algorithm is MAMLPlusPlus, which cannot be run for several workers"):
        check_before("fit", trainer, module, small_data(), meta_test=False)


def test_environments_are_refused() -> None:
    trainer = small_trainer(strategy=SimulatedStrategy(workers=2))
    with pytest.raises(ConfigError, match="data is Navigation2D, whose tasks are acted in"):
        SimulatedStrategy(workers=2).check(trainer, small_maml(), Navigation2D())


def test_a_check_leaves_the_weights_as_they_were() -> None:
    module = small_maml(meta_optimizer=adam())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trainer = small_trainer(strategy=SimulatedStrategy(workers=2))
    check_before("fit", trainer, module, small_data(), meta_test=False)
    assert same(before, module.state_dict())
    assert all(p.grad is None for p in module.parameters())


def test_a_worker_that_is_not_finite_is_named() -> None:
    trainer = small_trainer(strategy=SimulatedStrategy(workers=2, run_length=2), max_steps=400)
    module = small_maml(meta_optimizer=lambda weights: torch.optim.SGD(weights, lr=1e20))
    with pytest.raises(NonFiniteError, match="of worker 0"):
        trainer.fit(module, small_data())


# -- time ----------------------------------------------------------------------------------------------------------


def test_a_ring_sends_the_payload_nearly_twice_in_as_many_messages_as_there_are_others() -> None:
    network = Network("n", latency=0.01, bandwidth=1000.0)
    assert network.all_reduce(1, 500.0) == 0
    assert network.all_reduce(2, 500.0) == pytest.approx(2 * (0.02 + 0.25))
    assert network.all_reduce(5, 500.0) == pytest.approx(8 * (0.02 + 0.1))


def test_the_slowest_of_some_workers_is_the_expected_maximum_of_their_times() -> None:
    times = np.array([3.0, 1.0])
    assert slowest(times, 1) == 2.0
    assert slowest(times, 2) == pytest.approx((1 + 3 + 3 + 3) / 4)
    assert slowest(times, 1000) == pytest.approx(3.0)


def test_a_run_is_a_stretch_of_measured_meta_iterations_which_go_round() -> None:
    times = np.array([1.0, 2.0, 4.0])
    assert runs_of(times, 1).tolist() == [1, 2, 4]
    assert runs_of(times, 2).tolist() == [3, 6, 5]
    assert runs_of(times, 7).tolist() == [15, 16, 18]


def test_weights_wait_once_a_run_and_gradients_at_every_meta_iteration() -> None:
    times, network = np.array([1.0, 3.0]), Network("n", latency=0.5, bandwidth=100.0)
    merge = 2 * (1.0 + 0.25)
    assert seconds_of_run(times, 2, 2, network, at_end=50.0) == pytest.approx(4 + merge)
    small = 2 * (1.0 + 0.05)
    assert seconds_of_run(times, 2, 2, network, 50.0, each=10.0) == pytest.approx(2 * (2.5 + small) + merge)
    assert seconds_of_run(times, 1, 2, network, 0.0) == 4


def test_networks_have_names_or_numbers() -> None:
    assert [Network.read(known.name) for known in NETWORKS] == [*NETWORKS]
    own = Network.read("5,100")
    assert (own.latency, own.bandwidth) == (0.005, 12.5e6)
    for wrong in ("ether", "5", "5,0", "-1,5"):
        with pytest.raises(ConfigError, match=r"--network is .*, but must be machine, rack, internet, or milliseconds"):
            Network.read(wrong)
