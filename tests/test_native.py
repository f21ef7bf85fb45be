"""The engine without autograd: exact, the same bits at every time, and left alone where it cannot."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dmaml_pl import MAML, Conv4
from dmaml_pl.algorithms import ALFA, ANIL, BOIL, LSLR, Algorithm, MetaSGD, ProtoMAML
from dmaml_pl.engines import Engine, EngineChoice, NativeEngine, PerTaskEngine
from dmaml_pl.engines.native import library as of_library
from dmaml_pl.engines.native import machine
from dmaml_pl.engines.native.library import library
from dmaml_pl.engines.threads import limited_threads
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP, ResNet12
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.recipes import small_data, small_maml, small_trainer


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Where it is compiled, which takes half a minute once."""
    for linear in (False, True):
        found = library(linear=linear)
        if isinstance(found, str):
            pytest.skip(f"native cannot be compiled ({found})")


strided = partial(Conv4, filters=20, image_size=16, pooling="stride", ways=2)
pooled = partial(Conv4, filters=20, image_size=18, ways=2)


def images(tasks: int = 3, size: int = 16, channels: int = 1, kind: torch.dtype = torch.float64) -> TaskBatch:
    generator, labels = torch.Generator().manual_seed(0), torch.arange(2).repeat(tasks, 1)
    support, query = (
        torch.rand(tasks, 2 * count, channels, size, size, generator=generator, dtype=kind) for count in (1, 3)
    )
    return TaskBatch.of(support, labels, query, labels.repeat(1, 3))


def points(outputs: int = 1) -> TaskBatch:
    x = torch.linspace(-3, 3, 30, dtype=torch.float64).reshape(3, 10, 1)
    scales = torch.linspace(1, 2, outputs, dtype=torch.float64)
    return TaskBatch.of(x, (scales * x).sin(), x, (scales * x).cos())


def flat() -> nn.Module:
    """Linear layers alone, of widths that fill no vector."""
    layers = [nn.Linear(256, 70), nn.Tanh(), nn.Linear(70, 21, bias=False), nn.ReLU(), nn.Linear(21, 2)]
    return nn.Sequential(nn.Flatten(), *layers)


def odd() -> nn.Module:
    """Kernels, strides and widths of all kinds, channels that fill no vector, rows that no window covers."""
    return nn.Sequential(
        nn.Conv2d(3, 17, 5, stride=(2, 1), padding=(2, 0)),
        nn.Tanh(),
        nn.Conv2d(17, 40, (3, 2), bias=False),
        nn.BatchNorm2d(40, track_running_stats=False),
        nn.MaxPool2d(3),
        nn.ReLU(),
        nn.Conv2d(40, 9, 2, stride=3, padding=1),
        nn.GroupNorm(3, 9),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 70),
        nn.Identity(),
        nn.Linear(70, 2),
    )


def learner_of(network: nn.Module, algorithm: Algorithm, kind: torch.dtype = torch.float64) -> MetaLearner:
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.normal_(module.bias, std=0.3)
            if isinstance(module.weight, nn.Parameter):
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return MetaLearner(network, algorithm).to(kind)


def gradients(engine: Engine, learner: MetaLearner, batch: TaskBatch) -> tuple[dict[str, Tensor], list[float]]:
    assert engine.refusal(learner, batch) is None
    learner.zero_grad()
    outcome = engine.meta_gradient(learner, batch)
    found = {name: p.grad.clone() for name, p in learner.named_parameters() if p.grad is not None}
    return found, [float(outcome.loss), float(outcome.metric)]


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    return max(float((found[n] - g).norm()) / max(float(g.norm()), 1e-3 * largest) for n, g in expected.items())


@pytest.mark.parametrize("network", [strided, partial(MLP, inputs=256, hidden=[70, 21], outputs=2)])
@pytest.mark.parametrize(
    "algorithm",
    [MAML, MetaSGD, LSLR, ANIL, BOIL, partial(MAML, first_order=True), partial(MetaSGD, first_order=True)],
)
def test_every_algorithm_whose_step_is_elementwise_has_the_meta_gradient_of_autograd(
    algorithm: Any, network: Any
) -> None:
    learner, objective = learner_of(network(), algorithm(inner_lr=0.1, inner_steps=2)), objective_of("classification")
    batch = images().map_inputs(lambda x: x if network is strided else x.flatten(2))
    found, seen = gradients(NativeEngine(objective), learner, batch)
    expected, wanted = gradients(PerTaskEngine(objective), learner, batch)
    assert error(found, expected) < 1e-9
    assert seen == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("network", "batch"),
    [
        (pooled, images(size=18)),
        (partial(pooled, image_size=28), images(size=28)),  # large sets, in chunks
        (partial(strided, image_size=64), images(size=64)),
        (partial(pooled, normalization="group", image_size=28), images(size=28)),
        (partial(pooled, normalization="group"), images(size=18)),
        (partial(pooled, normalization="none"), images(size=18)),
        (partial(strided, normalization="batch_shift", initialization="maml"), images()),
        (partial(Conv4, filters=20, image_size=18, ways=2, channels=3), images(size=18, channels=3)),
        (odd, images(size=23, channels=3)),
        (partial(MLP, hidden=[20, 30]), points()),
        (lambda: nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1)), points()),
        (flat, images()),
        (partial(MLP, hidden=[130, 7, 40], outputs=33), points(33)),
        (lambda: nn.Sequential(nn.Linear(1, 2)), points(2)),
        (lambda: nn.Sequential(nn.Linear(1, 20), nn.Linear(20, 3), nn.Tanh()), points(3)),
        (lambda: nn.Sequential(nn.Linear(1, 20, bias=False), nn.ReLU(), nn.Linear(20, 12), nn.ReLU()), points(12)),
    ],
)
def test_every_layer_it_knows_has_the_meta_gradient_of_autograd(network: Any, batch: TaskBatch) -> None:
    objective = objective_of("classification" if batch.ways else "regression")
    learner = learner_of(network(), MAML(inner_lr=0.05, inner_steps=2))
    found, _ = gradients(NativeEngine(objective), learner, batch)
    expected, _ = gradients(PerTaskEngine(objective), learner, batch)
    assert error(found, expected) < 1e-9


def test_the_meta_gradient_is_the_slope_of_the_loss_after_adaptation() -> None:
    learner, objective = learner_of(strided(), MAML(inner_lr=0.1, inner_steps=2)), objective_of("classification")
    engine, batch = NativeEngine(objective), images()
    found, _ = gradients(engine, learner, batch)
    generator, h, losses = torch.Generator().manual_seed(1), 1e-9, []
    direction = {n: torch.randn(p.shape, generator=generator).double() for n, p in learner.named_parameters()}
    for sign in (1, -2):
        with torch.no_grad():
            for name, p in learner.named_parameters():
                p.add_(direction[name], alpha=sign * h)
        losses.append(float(engine.meta_gradient(learner, batch).loss))
    slope = sum(float((direction[name] * g).sum()) for name, g in found.items())
    assert (losses[0] - losses[1]) / (2 * h) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(("network", "tasks"), [(strided, 5), (flat, 20)])
def test_single_precision_is_close_and_one_and_two_threads_give_the_same_bits_at_every_time(
    network: Any, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "SMALL", 0)
    objective, batch = objective_of("classification"), images(tasks, kind=torch.float32)
    learner = learner_of(network(), MetaSGD(inner_lr=0.05, inner_steps=2), torch.float32)
    engine, found = NativeEngine(objective), []
    assert engine.refusal(learner, batch) is None
    assert engine.threads(learner, batch) is None
    for threads in (1, 2, 2, 1):
        with limited_threads(threads):
            found.append(gradients(engine, learner, batch)[0])
    assert all(torch.equal(own[name], g) for own in found for name, g in found[0].items())
    expected, _ = gradients(PerTaskEngine(objective), learner, batch)
    assert error(found[0], expected) < 1e-2  # a ReLU that flips


def test_few_operations_are_left_to_one_thread_and_give_the_same_bits_at_every_time() -> None:
    objective, batch = objective_of("classification"), images(20, kind=torch.float32)
    learner = learner_of(flat(), MAML(inner_lr=0.05, inner_steps=2), torch.float32)
    engine = NativeEngine(objective)
    assert engine.threads(learner, batch) == 1
    found = [gradients(engine, learner, batch)[0] for _ in range(2)]
    assert all(torch.equal(found[1][name], g) for name, g in found[0].items())
    expected, _ = gradients(PerTaskEngine(objective), learner, batch)
    assert error(found[0], expected) < 1e-2


def test_what_changes_between_meta_gradients_is_seen() -> None:
    objective, batch = objective_of("regression"), points()
    network: Any = MLP(hidden=[20, 30])
    algorithm = MAML(inner_lr=0.05, inner_steps=2)
    learner, engine = learner_of(network, algorithm), NativeEngine(objective)

    def agrees(within: float = 1e-9) -> bool:
        found, _ = gradients(engine, learner, batch)
        return error(found, gradients(PerTaskEngine(objective), learner, batch)[0]) < within

    assert agrees()
    algorithm.inner_lr = 0.1
    assert agrees()
    network.layers[0].bias.requires_grad_(False)
    algorithm.adapts.remove("layers.0.bias")
    assert agrees()
    network.layers[2].weight.data = network.layers[2].weight.data.T.contiguous().T
    assert agrees()
    network.layers[2] = nn.Linear(20, 30).double()
    assert agrees()
    learner.float()
    batch = batch.map(Tensor.float)
    assert agrees(1e-3)


def test_a_loss_that_is_not_finite_stays_so() -> None:
    learner, objective = learner_of(strided(), MAML(inner_lr=0.1)), objective_of("classification")
    engine = NativeEngine(objective)
    assert engine.refusal(learner, images()) is None
    with torch.no_grad():
        learner.network.get_parameter("features.0.weight")[0, 0, 0, 0] = float("nan")
    assert not torch.isfinite(engine.meta_gradient(learner, images()).loss)


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(256, 256), nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Any:
        flat = x.flatten(1)
        return self.head(flat + self.layer(flat))


@pytest.mark.parametrize(
    ("network", "algorithm", "reason"),
    [
        (Shortcut, MAML, "native cannot compute Shortcut (add is not a layer in a chain)"),
        (
            lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ELU(), nn.Flatten(), nn.Linear(784, 2)),
            MAML,
            "native cannot compute Sequential (it has ELU)",
        ),
        (strided, ALFA, "native does not know the steps of ALFA"),
        (strided, ProtoMAML, "native does not know the inner loop of ProtoMAML"),
        (partial(ResNet12, ways=2, channels=1, widths=(4, 4, 4, 4)), MAML, "ResNet12 (it has LeakyReLU)"),
    ],
)
def test_what_it_does_not_know_is_named_in_one_line(network: Any, algorithm: Any, reason: str) -> None:
    learner = learner_of(network(), algorithm(inner_lr=0.1))
    said = NativeEngine(objective_of("classification")).refusal(learner, images())
    assert said is not None
    assert reason in said
    with pytest.raises(ConfigError, match=r"set model\.engine to learn2learn or auto"):
        EngineChoice("native", objective_of("classification")).for_training(learner, images())


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_another_engine_trains_and_one_line_says_so(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    choice, learner = EngineChoice("auto", objective_of("classification")), learner_of(strided(), MAML(inner_lr=0.1))
    choice.meta_iterations = 10**9
    with caplog.at_level("INFO"):
        engine = choice.for_training(learner, images())
    library.cache_clear()
    assert engine.name != "native"
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"model.engine is {engine.name}: native cannot be compiled (" in line
    assert compiler in line


def test_it_is_compiled_once_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def run(words: list[str], **settings: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append(words)
        if "-o" in words:
            Path(words[-1]).write_bytes(b"library")
        return subprocess.CompletedProcess(words, 0, stdout=b"target", stderr=b"")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", run)
    files = [of_library._compiled(of_library.FOLDER / of_library.LINEAR) for _ in range(2)]
    assert files[0] == files[1]
    assert files[0].is_relative_to(tmp_path)
    assert sum("-o" in words for words in calls) == 1


def test_auto_takes_it_for_convolutions_in_trainings_that_are_long_enough() -> None:
    objective, batch = objective_of("classification"), images()
    for iterations, network, algorithm, expected in (
        (10**9, strided, MAML, True),
        (10, strided, MAML, False),
        (None, strided, MAML, False),
        (10**9, strided, ANIL, True),
        (10**9, Shortcut, MAML, False),
    ):
        choice, learner = EngineChoice("auto", objective), learner_of(network(), algorithm(inner_lr=0.1))
        choice.meta_iterations = iterations
        assert (choice.for_training(learner, batch).name == "native") is expected
        assert choice.for_evaluation(learner, batch).name != "native"


@pytest.mark.parametrize(
    ("network", "meta_iterations", "compiled", "expected"),
    [
        (partial(MLP, hidden=[40, 40]), 10**9, "auto", "native"),
        (partial(MLP, hidden=[40, 40]), 10**9, False, "native"),
        (partial(MLP, hidden=[40, 40]), 100, "auto", "vectorized"),
        (partial(MLP, hidden=[40, 40]), None, True, "native"),
        (partial(MLP, hidden=[1024, 1024]), 10**9, False, "per_task"),
        (lambda: nn.Sequential(nn.Linear(1, 40), nn.ELU(), nn.Linear(40, 1)), 10**9, False, "vectorized"),
    ],
)
def test_auto_takes_it_for_small_linear_layers_where_compiling_pays_or_is_asked_for(
    network: Any, meta_iterations: int | None, compiled: Any, expected: str
) -> None:
    choice = EngineChoice("auto", objective_of("regression"), compiled=compiled)
    choice.meta_iterations = meta_iterations
    learner = learner_of(network(), MAML())
    assert choice.for_training(learner, points()).name == expected
    assert choice.for_evaluation(learner, points()).name != "native"


def test_auto_leaves_a_large_body_that_does_not_adapt_to_those_who_compute_no_more_of_it_than_is_needed() -> None:
    objective, batch = objective_of("classification"), images(kind=torch.float32)
    for steps, frozen, expected in ((1, False, True), (10, False, False), (1, True, False)):
        network = Conv4(image_size=16, filters=128, ways=2)
        network.features.requires_grad_(not frozen)
        choice, learner = EngineChoice("auto", objective), MetaLearner(network, ANIL(inner_lr=0.1, inner_steps=steps))
        choice.meta_iterations = 10**9
        assert (choice.for_training(learner, batch).name == "native") is expected


def test_a_training_and_its_validation_run_with_it() -> None:
    module, data = small_maml(engine="native"), small_data()
    trainer = small_trainer(max_steps=2)
    trainer.fit(module, data)
    assert module.engine_in_use == "native"
