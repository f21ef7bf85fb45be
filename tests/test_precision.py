"""`trainer.precision: bf16-mixed`: the networks run in bfloat16, and all that is kept stays in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import Conv4, MAMLRule
from dmaml_pl.engines import Engine, EngineName, VectorizedEngine, engine_named
from dmaml_pl.networks import MLP
from dmaml_pl.objectives import objective_named
from tests.recipes import Recorder, small_data, small_maml, small_trainer, state_of
from tests.test_compiled import graphs  # noqa: F401 - a fixture
from tests.test_vectorized import batch_for, made, objective_of

ENGINES: list[EngineName] = ["learn2learn", "per_task", "vectorized"]


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("two_threads")
def test_a_training_in_lower_precision_keeps_its_weights_in_float32_and_converges(engine: EngineName) -> None:
    losses: dict[Any, Tensor] = {}
    precisions: list[Any] = ["32-true", "bf16-mixed"]
    for precision in precisions:
        recorder = Recorder()
        module = small_maml(engine=engine, run_length=20, meta_optimizer=lambda p: torch.optim.Adam(p, lr=0.01))
        trainer = small_trainer(max_steps=120, precision=precision, callbacks=[recorder], limit_val_batches=1)
        data = small_data(meta_batch=10)
        trainer.fit(module, data)
        losses[precision] = torch.cat([report["series"]["loss"] for report in recorder.reports])
    exact, lower = losses.values()
    assert {tensor.dtype for tensor in state_of(module).values()} == {torch.float32}
    assert {p.grad.dtype for p in module.network.parameters() if p.grad is not None} == {torch.float32}
    assert lower[0] != exact[0]
    torch.testing.assert_close(lower[0], exact[0], rtol=0.05, atol=0)
    after = module.engine.meta_gradient(module.learner, data.sample(worker=0, run=0, iteration=0)).loss
    assert after < 0.9 * lower[0]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.usefixtures("two_threads")
def test_all_engines_run_the_network_in_lower_precision_alike(kind: str) -> None:
    network = made(lambda: MLP(hidden=[16]) if kind == "mlp" else Conv4(ways=3, image_size=16, filters=8))
    rule = MAMLRule(inner_lr=0.05, inner_steps=2)
    batch = batch_for(network).map(lambda t: t.float() if t.is_floating_point() else t)
    objective = objective_of(network)

    def gradient(engine: Engine, lower: bool) -> Tensor:
        network.zero_grad()
        learner: Any = rule.wrap(network)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            engine.meta_gradient(learner, batch)
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    exact = gradient(engine_named("learn2learn", rule, objective), False)
    for name in ENGINES:
        found = gradient(engine_named(name, rule, objective), True)
        assert found.dtype is torch.float32
        assert 0.8 < float(torch.cosine_similarity(found, exact, dim=0)) < 1 - 1e-7, name


def test_what_is_compiled_is_compiled_anew_for_another_precision(graphs: list[Any]) -> None:  # noqa: F811
    rule, network = MAMLRule(inner_lr=0.05), made(lambda: MLP(hidden=[16]))
    batch = batch_for(network).map(Tensor.float)
    learner: Any = rule.wrap(network)
    results = {}
    for compiled in (True, False):
        engine = VectorizedEngine(rule, objective_named("regression"), compiled=compiled)
        for lower in (True, False, True):
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                engine.meta_gradient(learner, batch)
            results[compiled, lower] = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert len(graphs) == 2
    for lower in (True, False):
        torch.testing.assert_close(results[True, lower], results[False, lower], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[True, True], results[True, False], rtol=1e-5)
