"""`trainer.precision: bf16-mixed`: the networks run in bfloat16, and all that is kept stays in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dmaml_pl import MAML, Conv4
from dmaml_pl.engines import EngineChoice, EngineName, VectorizedEngine
from dmaml_pl.learner import MetaLearner
from dmaml_pl.networks import MLP
from dmaml_pl.objectives import objective_of
from tests.recipes import Recorder, meta_gradient, small_data, small_maml, small_trainer, state_of
from tests.test_compiled import graphs  # noqa: F401 - a fixture
from tests.test_vectorized import batch_for, made, objective_for

ENGINES: list[EngineName] = ["learn2learn", "per_task", "vectorized"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("two_threads")
def test_a_training_in_lower_precision_keeps_its_weights_in_float32_and_converges(engine: EngineName) -> None:
    losses: dict[Any, Tensor] = {}
    precisions: list[Any] = ["32-true", "bf16-mixed"]
    for precision in precisions:
        recorder = Recorder()
        module = small_maml(engine=engine, run_length=20, meta_optimizer=lambda p: torch.optim.Adam(p, lr=0.02))
        trainer = small_trainer(max_steps=40, precision=precision, callbacks=[recorder], limit_val_batches=1)
        data = small_data(meta_batch=10)
        trainer.fit(module, data)
        losses[precision] = torch.cat([report["series"]["loss"] for report in recorder.reports])
    exact, lower = losses.values()
    assert {tensor.dtype for tensor in state_of(module).values()} == {torch.float32}
    assert {p.grad.dtype for p in module.network.parameters() if p.grad is not None} == {torch.float32}
    assert lower[0] != exact[0]
    torch.testing.assert_close(lower[0], exact[0], rtol=0.05, atol=0)
    batch = data.sample(worker=0, run=0, iteration=0)
    after = meta_gradient(module, batch).loss
    assert after < 0.9 * lower[0]


@pytest.mark.parametrize("kind", ["mlp", "conv"])
@pytest.mark.usefixtures("two_threads")
def test_all_engines_run_the_network_in_lower_precision_alike(kind: str) -> None:
    network = made(lambda: MLP(hidden=[16]) if kind == "mlp" else Conv4(ways=3, image_size=16, filters=4))
    rule = MAML(inner_lr=0.05, inner_steps=2)
    batch = batch_for(network).map(lambda t: t.float() if t.is_floating_point() else t)
    objective = objective_for(network)

    def gradient(name: EngineName, lower: bool) -> Tensor:
        network.zero_grad()
        learner = MetaLearner(network, rule)
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            EngineChoice(name, objective).for_training(learner, batch).meta_gradient(learner, batch)
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    exact = gradient("learn2learn", False)
    for name in ENGINES:
        found = gradient(name, True)
        assert found.dtype is torch.float32
        assert 0.8 < float(torch.cosine_similarity(found, exact, dim=0)) < 1 - 1e-7, name


def test_what_is_compiled_is_compiled_anew_for_another_precision(graphs: list[Any]) -> None:  # noqa: F811
    rule, network = MAML(inner_lr=0.05), made(lambda: MLP(hidden=[16]))
    batch = batch_for(network).map(Tensor.float)
    learner = MetaLearner(network, rule)
    results = {}
    for compiled in (True, False):
        engine = VectorizedEngine(objective_of("regression"), compiled=compiled)
        for lower in (True, False, True):
            network.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=lower):
                engine.meta_gradient(learner, batch)
            results[compiled, lower] = torch.cat([p.grad.flatten() for p in network.parameters()])
    assert len(graphs) == 2
    for lower in (True, False):
        torch.testing.assert_close(results[True, lower], results[False, lower], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[True, True], results[True, False], rtol=1e-5)
