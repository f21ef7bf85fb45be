"""The compiled meta-gradient: the reference's, or none at all and one line that says why."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_modules import Sinusoid
from dmaml_pl import MAML, MetaLearning
from dmaml_pl.engines import VectorizedEngine
from dmaml_pl.engines import compiled as compiler
from dmaml_pl.engines.base import Held
from dmaml_pl.engines.compiled import CACHE_VARIABLE, Compiler
from dmaml_pl.engines.loop import Evaluated
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP
from dmaml_pl.objectives import objective_of
from dmaml_pl.tasks import TaskBatch
from tests.recipes import same, small_data, small_maml, small_trainer, state_of
from tests.test_vectorized import (
    TIGHT,
    Summed,
    WithSpare,
    assert_equals_the_reference,
    batch_for,
    gradients_by,
    made,
    network_of,
    vectorized,
)


class Scaled(nn.Module):
    """A network with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = MLP(hidden=[8])
        self.register_buffer("scale", torch.tensor(0.7))
        self.scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x * self.scale)
        return out


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything but the making of machine code, which takes long; returns what was compiled."""
    compiled: list[Any] = []

    def compile_quickly(graph: Callable[..., Any], examples: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(compiler, "machine_code", compile_quickly)
    return compiled


@pytest.mark.slow
def test_the_compiled_meta_gradient_equals_the_references_and_is_found_on_disk_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(logging.getLogger("torch.utils.cpp_extension"), "disabled", True)
    from torch._dynamo.utils import counters

    counters["inductor"].clear()
    network, rule = made(lambda: MLP(hidden=[4])).double(), MAML(inner_lr=0.1)
    for hits in (0, 1):
        assert_equals_the_reference(network, rule, compiled=True)
        assert counters["inductor"]["fxgraph_cache_hit"] == hits
    assert any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_reads_weights_and_tasks_anew_and_keeps_what_it_gave_before() -> None:
    network, rule = made(lambda: MLP(hidden=[8])).double().cuda(), MAML(inner_lr=0.1)
    objective = objective_of("regression")
    learner = MetaLearner(network, rule)
    engines = [VectorizedEngine(objective, compiled=compiled) for compiled in (True, False)]
    kept: list[list[Tensor]] = []
    for number in range(5):
        batch = small_data().sample(worker=0, run=0, iteration=number).map(lambda tensor: tensor.double().cuda())
        found = []
        for engine in engines:
            network.zero_grad()
            engine.meta_gradient(learner, batch)
            found.append([p.grad for p in network.parameters() if p.grad is not None])
        torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-12)
        kept.append(found[0])
        with torch.no_grad():
            torch._foreach_add_(list(network.parameters()), found[0], alpha=-0.1)
    assert all(not torch.equal(before[0], after[0]) for before, after in pairwise(kept))


# Tracing takes seconds; longer loops and other networks are in the engine's own tests, without tracing.
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(("kind", "steps"), [("mlp", 1), ("mlp", 2), ("batch", 2), ("group", 1), ("none", 1)])
@pytest.mark.usefixtures("graphs")
def test_the_traced_meta_gradient_equals_the_references(kind: str, steps: int, first_order: bool) -> None:
    rule = MAML(inner_lr=0.1, inner_steps=steps, first_order=first_order)
    assert_equals_the_reference(network_of(kind), rule, compiled=True)


def test_one_task_is_traced_as_many_are_as_compilers_fuse_small_products_of_a_batch_alone(graphs: list[Any]) -> None:
    learner = MetaLearner(made(lambda: MLP(hidden=[8, 8])), MAML(inner_lr=0.1))
    batch = small_data(meta_batch=1).sample(worker=0, run=0, iteration=0)
    VectorizedEngine(objective_of("regression"), compiled=True).meta_gradient(learner, batch)
    products = {str(node.target) for node in graphs[0].graph.nodes if "mm" in str(node.target)}
    assert products == {"aten.bmm.default"}


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.usefixtures("graphs")
def test_gradients_that_share_memory_are_handed_out_apart(first_order: bool) -> None:
    rule, network = MAML(inner_lr=0.1, first_order=first_order), made(Summed).double()
    assert_equals_the_reference(network, rule, compiled=True)
    places = {p.grad.untyped_storage().data_ptr() for p in network.parameters() if p.grad is not None}
    assert len(places) == len(list(network.parameters()))


@pytest.mark.parametrize(("width", "expected"), [(8, 1), (600, 2)])
def test_a_small_graph_runs_in_one_thread_and_a_large_one_in_all(
    width: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def watched(graph: Callable[..., Any], examples: list[Tensor]) -> Callable[..., Any]:
        def run(*values: Tensor) -> Any:
            seen.append(torch.get_num_threads())
            return graph(*values)

        return run

    monkeypatch.setattr(compiler, "machine_code", watched)
    network, rule = made(lambda: MLP(hidden=[width, width])).double(), MAML()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients_by(vectorized(network, rule, compiled=True), network, rule)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {expected}


@pytest.mark.parametrize(
    ("engine", "width", "expected"), [("vectorized", 8, 1), ("vectorized", 600, 2), ("auto", 8, 1)]
)
@pytest.mark.usefixtures("graphs")
def test_all_of_a_run_with_a_small_graph_is_made_in_one_thread_and_what_follows_in_all(
    engine: Any, width: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def sample(self: Sinusoid, **place: Any) -> TaskBatch:
        seen.append(torch.get_num_threads())
        return drawn(self, **place)

    drawn = Sinusoid.sample
    monkeypatch.setattr(Sinusoid, "sample", sample)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        module = small_maml(made(lambda: MLP(hidden=[width, width])), engine=engine, compile=True, run_length=3)
        small_trainer(max_steps=6).fit(module, small_data())
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [2, expected, expected] * 2  # the first meta-batch of a run tells how small the graph is


@pytest.mark.usefixtures("graphs")
def test_frozen_and_unused_weights_are_left_alone() -> None:
    network = made(WithSpare).double()
    network.used.layers[0].weight.requires_grad_(False)
    rule = MAML(inner_lr=0.1, inner_steps=2)
    assert_equals_the_reference(network, rule, compiled=True)


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.usefixtures("graphs")
def test_gradients_are_added_scaled_and_given_to_hooks_as_by_a_backward(hooked: bool) -> None:
    network, rule = network_of("mlp"), MAML(inner_lr=0.1)
    seen: list[Tensor] = []
    once = gradients_by(vectorized(network, rule), network, rule)[0]
    engine = vectorized(network, rule, compiled=True)
    for p in network.parameters() if hooked else ():
        p.register_hook(seen.append)
    learner = MetaLearner(network, rule)
    engine.meta_gradient(learner, batch_for(network), lambda loss: (2 * loss).backward())
    for name, p in network.named_parameters():
        torch.testing.assert_close(p.grad, 3 * once[name], **TIGHT)
    assert len(seen) == (len(once) if hooked else 0)


@pytest.mark.usefixtures("graphs")
def test_weights_and_buffers_are_read_anew_at_every_meta_iteration() -> None:
    rule, network = MAML(inner_lr=0.1), made(Scaled).double()
    engine = VectorizedEngine(objective_of("regression"), compiled=True)
    assert_equals_the_reference(network, rule, engine)
    with torch.no_grad():
        network.inner.layers[0].weight.mul_(2)
    network.scale = torch.tensor(0.3, dtype=torch.float64)
    assert_equals_the_reference(network, rule, engine)


class Tempered(MLP):
    """A network that reads a number of its own, which somebody may change between two meta-iterations."""

    def __init__(self) -> None:
        super().__init__(hidden=[8])
        self.temperature = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.temperature


def test_a_number_that_a_module_holds_is_no_constant_of_what_is_compiled(graphs: list[Any]) -> None:
    network = made(Tempered)
    learner, batch = MetaLearner(network, MAML(inner_lr=0.1)), small_data().sample(worker=0, run=0, iteration=0)
    engines = [VectorizedEngine(objective_of("regression"), compiled=compiled) for compiled in (True, False)]
    for temperature in (1.0, 2.0, 1.0, 3.0):
        network.temperature = temperature
        losses = [engine.meta_gradient(learner, batch).loss for engine in engines]
        torch.testing.assert_close(losses[0], losses[1])
    assert len(graphs) == 2  # the third number is executed without


def test_a_number_of_an_algorithm_is_no_constant_of_what_is_compiled(graphs: list[Any]) -> None:
    rule = MAML(inner_lr=0.1)
    learner, batch = MetaLearner(made(Tempered), rule), small_data().sample(worker=0, run=0, iteration=0)
    engines = [VectorizedEngine(objective_of("regression"), compiled=compiled) for compiled in (True, False)]
    for rate in (0.1, 0.2, 0.1):
        rule.inner_lr = rate
        losses = [engine.meta_gradient(learner, batch).loss for engine in engines]
        torch.testing.assert_close(losses[0], losses[1])
    assert len(graphs) == 2


def test_a_training_compiles_once(graphs: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    states = []
    for compiled in (True, False):
        module = small_maml(made(MLP), engine="vectorized", compile=compiled)
        with caplog.at_level(logging.INFO):
            small_trainer().fit(module, small_data())
        states.append(state_of(module))
    assert len(graphs) == 1
    assert [record.message for record in caplog.records if "ompil" in record.message] == [
        "Compiling the meta-gradient ..."
    ]
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("graphs")
def test_a_resumed_training_that_compiles_ends_with_the_same_bits(tmp_path: Path) -> None:
    def train(steps: int, ckpt: Path | None = None) -> Any:
        module = small_maml(engine="vectorized", compile=True, run_length=4)
        trainer = small_trainer(max_steps=steps, default_root_dir=tmp_path)
        trainer.fit(module, small_data(), ckpt_path=ckpt)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        assert trainer.global_step == steps
        return state_of(module)

    straight = train(12)
    train(8)
    assert same(train(12, tmp_path / "8.ckpt"), straight)


def test_another_shape_of_tasks_compiles_once_more_and_no_further(graphs: list[Any]) -> None:
    module = small_maml(engine="vectorized", compile=True)
    for meta_batch in (2, 3, 2, 4, 5, 3):
        batch = small_data(meta_batch=meta_batch).sample(worker=0, run=0, iteration=0)
        assert torch.isfinite(
            module.engine.for_training(module.learner, batch).meta_gradient(module.learner, batch).loss
        )
    assert len(graphs) == 2


def test_where_compiling_fails_the_training_goes_on_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise RuntimeError("no C++ compiler\nmore")

    monkeypatch.setattr(compiler, "machine_code", fail)
    states = []
    for compiled in (True, False):
        module = small_maml(engine="vectorized", compile=compiled)
        with caplog.at_level(logging.INFO):
            small_trainer().fit(module, small_data())
        states.append(state_of(module))
    assert same(states[0], states[1])
    said = [record.message for record in caplog.records if "model.compile" in record.message]
    assert said == ["model.compile has no effect: compiling failed (no C++ compiler)."]


class Choosy(Scaled):
    """A network that does what the value of a buffer says."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x) if float(self.scale) > 0.5 else self.inner(-x)
        return out


def test_a_network_that_looks_at_values_is_not_compiled_and_follows_them(
    graphs: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    network = made(Choosy)
    learner, batch = MetaLearner(network, MAML(inner_lr=0.1)), small_data().sample(worker=0, run=0, iteration=0)
    engines = [VectorizedEngine(objective_of("regression"), compiled=compiled) for compiled in (True, False)]
    found = []
    for scale in (0.7, 0.2):
        network.scale.fill_(scale)
        with caplog.at_level(logging.INFO):
            losses = [engine.meta_gradient(learner, batch).loss for engine in engines]
        assert torch.equal(losses[0], losses[1])
        found.append(losses[0])
    assert not torch.equal(found[0], found[1])
    assert graphs == []
    said = [record.message for record in caplog.records if "model.compile" in record.message]
    assert len(said) == 1
    assert "what it does depends on values" in said[0]


@pytest.mark.parametrize("engine", ["learn2learn", "per_task"])
def test_what_executes_one_task_after_another_cannot_be_compiled(engine: Any) -> None:
    with pytest.raises(ConfigError, match=rf"model\.compile is true, but model\.engine is {engine}: set it to"):
        MetaLearning(MLP(), engine=engine, compile=True)


def test_auto_compiles_what_it_vectorizes() -> None:
    assert MetaLearning(MLP(), compile=True).engine_in_use == "compiled vectorized"


def test_a_copy_of_an_engine_compiles_too() -> None:
    engine = copy.deepcopy(VectorizedEngine(objective_of("regression"), compiled=True))
    assert engine.name == "compiled vectorized"
    assert engine._compiler is not None


def test_a_module_put_in_the_place_of_another_is_seen() -> None:
    network = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    held, learner = Held(), MetaLearner(network, MAML())
    before = held.settings(learner)
    network[1] = nn.Tanh()
    assert held.settings(learner) != before
    network[2] = nn.Linear(4, 1)
    assert [*map(id, held.tensors(learner))] == [*map(id, learner.meta().values())]


def test_a_compiler_keeps_nothing_of_a_network_that_is_gone(graphs: list[Any]) -> None:
    kept, learner = Compiler(), MetaLearner(MLP(), MAML())
    batch = small_data().sample(worker=0, run=0, iteration=0)

    def evaluate(learner: MetaLearner, meta: dict[str, Tensor], buffers: Any, tasks: Any) -> Evaluated:
        loss = torch.stack([p.square().sum() for p in meta.values()])
        return Evaluated(loss, loss.detach(), loss.detach())

    assert kept.meta_gradient(learner, batch, evaluate) is not None
    del learner, evaluate
    graphs.clear()
    assert len(kept._graphs) == 0
