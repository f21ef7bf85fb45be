"""Meta-optimizers that ask: the curvature, the trust region and epochs, held to what is written out.

Legend: T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_modules import Navigation2D
from dmaml_pl import (
    ANIL,
    CAVIA,
    MAML,
    ContextMLP,
    Epochs,
    GaussianMLP,
    GaussianPolicy,
    InnerAdam,
    InnerScales,
    MetaSGD,
    PolicyGradient,
    TrustRegion,
)
from dmaml_pl.algorithms import Algorithm
from dmaml_pl.engines import EngineChoice
from dmaml_pl.engines.asked import MetaIteration
from dmaml_pl.engines.base import Engine
from dmaml_pl.engines.curvature import Curvatures, linearize
from dmaml_pl.engines.loop import NetworkTasks, at_once, evaluate, learned, one_by_one
from dmaml_pl.errors import ConfigError
from dmaml_pl.learner import MetaLearner
from dmaml_pl.optimizers.trust_region import conjugate_gradients
from dmaml_pl.tasks import Samples, TaskBatch

OBJECTIVE = PolicyGradient()


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class Case:
    """A policy in double precision, rollouts of it, and the engine of them."""

    def __init__(self, network: Callable[[], nn.Module], algorithm: Algorithm, engine: str = "vectorized") -> None:
        torch.manual_seed(0)
        self.learner = MetaLearner(network(), algorithm)
        self.choice = EngineChoice(engine, OBJECTIVE)  # type: ignore[arg-type]
        data = Navigation2D(meta_batch=3, rollouts=4, horizon=8, seed=0)
        self.steps, self.device = algorithm.steps, torch.device("cpu")
        self.batch: TaskBatch = data.sample(worker=0, run=0, iteration=0, act=self)
        self.engine: Engine = self.choice.for_training(self.learner, self.batch)

    def __call__(self, supports: tuple[Samples, ...]) -> Callable[[Tensor], Any]:
        return self.choice.for_acting(self.learner).act(self.learner, supports)

    def ask(self, optimizer: Any) -> Tensor:
        """One step of an optimizer that asks; gives the loss."""
        optimizer.problem = MetaIteration(self.learner, self.engine, self.batch, optimizer.parameters(), lambda v: v)

        def closure() -> Tensor:
            optimizer.zero_grad()
            return self.engine.meta_gradient(self.learner, self.batch).loss

        loss: Tensor = optimizer.step(closure)
        return loss


def mlp() -> nn.Module:
    return GaussianMLP(2, 2, [6], activation="tanh")


def context() -> nn.Module:
    return GaussianPolicy(ContextMLP(2, [6], 2, context=3), 2)


ALGORITHMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Algorithm]]] = {
    "MAML": (mlp, lambda: MAML(inner_lr=0.3, inner_steps=2)),
    "MAML with Adam": (mlp, lambda: MAML(inner_lr=0.1, inner_steps=2, inner_optimizer=InnerAdam(eps=0.1))),
    "MAML with a shorter second step": (mlp, lambda: MAML(0.3, 2, inner_optimizer=InnerScales([1.0, 0.5]))),
    "ANIL": (mlp, lambda: ANIL(inner_lr=0.3, inner_steps=1)),
    "MetaSGD": (mlp, lambda: MetaSGD(inner_lr=0.3, inner_steps=2)),
    "CAVIA": (context, lambda: CAVIA(inner_lr=1.0, inner_steps=2)),
}

each_algorithm = pytest.mark.parametrize("name", sorted(ALGORITHMS))


def case_of(name: str, engine: str = "vectorized") -> Case:
    network, algorithm = ALGORITHMS[name]
    return Case(network, algorithm(), engine)


def second_derivative(case: Case, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean KL by the meta-weights, times a vector, by differentiating twice."""
    meta = case.learner.meta()
    tasks = NetworkTasks(case.learner.network, {}, OBJECTIVE, case.batch, at_once)
    mean = evaluate(case.learner, meta, tasks, of="constraint").differentiate.mean()
    of = [meta[name] for name in vector]
    slopes = torch.autograd.grad(mean, of, create_graph=True, allow_unused=True, materialize_grads=True)
    along = sum((slope * vector[name]).sum() for slope, name in zip(slopes, vector, strict=True))
    found = torch.autograd.grad(along, of, allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    return dict(zip(vector, found, strict=True))


def noise(case: Case) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    meta = case.learner.meta()
    return {name: torch.randn(meta[name].shape, generator=generator, dtype=torch.float64) for name in learned(meta)}


@each_algorithm
@pytest.mark.parametrize("engine", ["vectorized", "per_task"])
def test_the_exact_curvature_is_the_second_derivative_of_the_kl_through_the_inner_loop(name: str, engine: str) -> None:
    case = case_of(name, engine)
    vector = noise(case)
    found = case.engine.curvature(case.learner, case.batch, exact=True, every=1)(vector)
    torch.testing.assert_close(found, second_derivative(case, vector), rtol=1e-7, atol=1e-10)


def test_the_first_order_curvature_is_that_of_a_first_order_inner_loop() -> None:
    case = Case(mlp, MAML(inner_lr=0.3, inner_steps=2, first_order=True))
    vector = noise(case)
    found = case.engine.curvature(case.learner, case.batch, exact=False, every=1)(vector)
    torch.testing.assert_close(found, second_derivative(case, vector), rtol=1e-7, atol=1e-10)


def test_what_was_recorded_serves_other_weights_other_samples_and_other_settings() -> None:
    case = case_of("MAML")
    vector = noise(case)
    case.engine.curvature(case.learner, case.batch, exact=True, every=1)(vector)
    algorithm = case.learner.algorithm
    assert isinstance(algorithm, MAML)
    for inner_lr in (0.3, 0.1):
        algorithm.inner_lr = inner_lr
        with torch.no_grad():
            for p in case.learner.parameters():
                p.add_(0.1 * torch.randn_like(p))
        case.batch = Navigation2D(meta_batch=3, rollouts=4, horizon=8, seed=1).sample(
            worker=0, run=0, iteration=1, act=case
        )
        found = case.engine.curvature(case.learner, case.batch, exact=True, every=1)
        torch.testing.assert_close(found(vector), second_derivative(case, vector), rtol=1e-7, atol=1e-10)
        assert all(torch.equal(value, found(vector)[name]) for name, value in found(vector).items())


class LooksAtValues(nn.Module):
    """Doubles what it gives where its inputs are large, which a record would not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return 2 * out if float(x.detach().abs().max()) > 1e3 else out


class DrawsAtRandom(nn.Module):
    """Noise on its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x + torch.randn_like(x))
        return out


def one_task(network: nn.Module) -> tuple[Case, NetworkTasks]:
    case = Case(lambda: GaussianPolicy(network, 2), MAML(inner_lr=0.3, inner_steps=2), engine="per_task")
    first = next(iter(case.batch.chunks(1)))
    return case, NetworkTasks(case.learner.network, {}, OBJECTIVE, first, one_by_one)


def test_a_network_that_looks_at_values_is_not_recorded_and_has_the_same_curvature() -> None:
    case, tasks = one_task(LooksAtValues())
    vector, meta = noise(case), case.learner.meta()
    found = Curvatures().linearize(case.learner, meta, tasks, exact=True, every=1)(vector)
    directly = linearize(case.learner, meta, tasks, exact=True, every=1)(vector)
    torch.testing.assert_close(found, directly, rtol=1e-9, atol=1e-12)


def test_a_network_that_draws_at_random_draws_no_more_between_two_products() -> None:
    case, tasks = one_task(DrawsAtRandom())
    product = Curvatures().linearize(case.learner, case.learner.meta(), tasks, exact=True, every=1)
    one, other = product(noise(case)), product(noise(case))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_thinned_rollouts_have_the_curvature_of_those_that_they_stand_for() -> None:
    case, vector = case_of("MAML"), noise(case_of("MAML"))

    def slowed(samples: Samples) -> Samples:
        every_step_thrice = samples.map(lambda tensor: tensor.repeat_interleave(3, dim=2))
        assert isinstance(every_step_thrice.y, dict)
        return every_step_thrice._replace(y=every_step_thrice.y | {"weight": every_step_thrice.y["weight"] / 3})

    batch = case.batch._replace(support=tuple(map(slowed, case.batch.support)), query=slowed(case.batch.query))
    thinned = case.engine.curvature(case.learner, batch, exact=True, every=3)(vector)
    whole = case.engine.curvature(case.learner, case.batch, exact=True, every=1)(vector)
    torch.testing.assert_close(thinned, whole, rtol=1e-9, atol=1e-12)


@each_algorithm
@pytest.mark.parametrize("exact", [False, True])
def test_the_curvature_is_symmetric_and_bends_nowhere_down_also_on_some_steps_only(name: str, exact: bool) -> None:
    case = case_of(name)
    product = case.engine.curvature(case.learner, case.batch, exact=exact, every=3)
    one, other = noise(case), {name: tensor.flip(0) for name, tensor in noise(case).items()}
    at_one, at_other = product(one), product(other)

    def dot(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return sum(float((a[name] * b[name]).sum()) for name in a)

    assert dot(other, at_one) == pytest.approx(dot(one, at_other), rel=1e-9)
    assert dot(one, at_one) > 0


@each_algorithm
def test_loss_and_kl_without_gradients_are_those_of_the_meta_gradient(name: str) -> None:
    case = case_of(name)
    with torch.no_grad():
        for p in case.learner.parameters():
            p.add_(0.01 * torch.randn_like(p))
    loss, constraint = case.engine.evaluate_only(case.learner, case.batch)
    torch.testing.assert_close(loss, case.engine.meta_gradient(case.learner, case.batch).loss)
    torch.testing.assert_close(constraint, case.engine.meta_gradient(case.learner, case.batch, of="constraint").loss)
    assert float(constraint) > 0


@each_algorithm
def test_a_step_lowers_the_loss_within_the_trust_region_and_says_so(name: str) -> None:
    case = case_of(name)
    optimizer = TrustRegion(case.learner.param_groups(), max_kl=0.001, metric="exact", metric_every=1)
    before = float(case.ask(optimizer))
    loss, constraint = (float(value) for value in case.engine.evaluate_only(case.learner, case.batch))
    assert loss < before
    assert 0 < constraint <= 0.001
    assert optimizer.metrics["kl"] == pytest.approx(constraint)
    assert optimizer.metrics["line_search_tries"] >= 1


def test_where_no_length_will_do_the_weights_stay_to_the_bit() -> None:
    case = case_of("MAML")
    before = copy.deepcopy(case.learner.state_dict())
    optimizer = TrustRegion(case.learner.param_groups(), max_kl=0.02, tries=2)
    optimizer.max_kl = -1.0  # which no step can hold
    case.ask(optimizer)
    assert optimizer.metrics == {"kl": 0.0, "line_search_tries": 0.0}
    assert all(torch.equal(value, before[name]) for name, value in case.learner.state_dict().items())


def test_the_step_is_the_natural_gradient_as_long_as_the_model_of_the_kl_allows() -> None:
    case = case_of("MAML")
    names = learned(case.learner.meta())
    optimizer = TrustRegion(case.learner.param_groups(), 0.001, "exact", 1, damping=0.1, iterations=200)
    before = torch.cat([p.detach().reshape(-1).clone() for p in optimizer.parameters()])
    product = case.engine.curvature(case.learner, case.batch, exact=True, every=1)
    size = before.numel()
    rows = [product(dict(zip(names, optimizer.split(unit), strict=True))) for unit in torch.eye(size).double()]
    matrix = torch.stack([torch.cat([row[name].reshape(-1) for name in names]) for row in rows])
    damped = matrix + 0.1 * torch.eye(size, dtype=torch.float64)
    case.ask(optimizer)
    case_again = case_of("MAML")
    case_again.engine.meta_gradient(case_again.learner, case_again.batch)
    gradient = torch.cat([p.grad.reshape(-1) for p in case_again.learner.parameters() if p.grad is not None])
    direction = torch.linalg.solve(damped, gradient)
    expected = direction * (2 * 0.001 / (direction @ damped @ direction)).sqrt()
    after = torch.cat([p.detach().reshape(-1) for p in optimizer.parameters()])
    tried = optimizer.metrics["line_search_tries"]
    torch.testing.assert_close(before - after, expected * 0.8 ** (tried - 1), rtol=1e-3, atol=1e-7)


def test_conjugate_gradients_solve_a_linear_system_in_as_many_iterations_as_it_has_unknowns() -> None:
    torch.manual_seed(0)
    half = torch.randn(6, 6, dtype=torch.float64)
    matrix, wanted = half @ half.T + torch.eye(6).double(), torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(matrix @ conjugate_gradients(lambda v: matrix @ v, wanted, 6)[0], wanted)
    assert not conjugate_gradients(lambda v: matrix @ v, torch.zeros(6).double(), 6)[0].any()


def test_conjugate_gradients_tell_what_is_left() -> None:
    matrix, wanted = torch.diag(torch.linspace(1, 9, 9)).double(), torch.ones(9).double()
    x, rest = conjugate_gradients(lambda v: matrix @ v, wanted, 3)
    assert rest.norm() > 1e-3
    torch.testing.assert_close(rest, wanted - matrix @ x)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_kl": 0},
        {"metric": "third_order"},
        {"metric_every": 0},
        {"damping": -1},
        {"iterations": 0},
        {"tries": 0},
        {"backtrack": 1.0},
    ],
)
def test_a_trust_region_out_of_range_is_refused_by_the_setting(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"model.meta_optimizer.{next(iter(settings))} is"):
        TrustRegion([torch.zeros(1)], **settings)


# -- epochs ------------------------------------------------------------------------------------------------------------


def test_epochs_are_so_many_steps_of_the_optimizer_on_one_meta_batch() -> None:
    mine, others = case_of("MAML"), case_of("MAML")
    epochs = Epochs(mine.learner.param_groups(), lambda params: torch.optim.Adam(params, lr=1e-3), epochs=3)
    loss = mine.ask(epochs)
    adam, first = torch.optim.Adam(others.learner.parameters(), lr=1e-3), None
    for _ in range(3):
        adam.zero_grad()
        now = others.engine.meta_gradient(others.learner, others.batch).loss
        first = now if first is None else first
        adam.step()
    assert torch.equal(loss, first)  # type: ignore[arg-type]
    for one, other in zip(mine.learner.parameters(), others.learner.parameters(), strict=True):
        assert torch.equal(one, other)
    assert epochs.metrics["epochs"] == 3
    assert 0 < epochs.metrics["kl"] < 0.05


def test_a_step_beyond_the_kl_is_taken_back_with_the_moments_and_is_the_last() -> None:
    case, reference = case_of("MAML"), case_of("MAML")
    for each, most in ((case, 5), (reference, 1)):
        epochs = Epochs(each.learner.param_groups(), lambda p: torch.optim.Adam(p, lr=0.005), epochs=most, max_kl=1e-3)
        each.ask(epochs)
        assert epochs.metrics["epochs"] == 1
        assert epochs.metrics["kl"] <= 1e-3
        each.optimizer = epochs  # type: ignore[attr-defined]
    for one, other in zip(case.learner.parameters(), reference.learner.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [each.optimizer.state_dict()["state"] for each in (case, reference)]  # type: ignore[attr-defined]
    torch.testing.assert_close(states[0], states[1])


def test_epochs_resume_with_the_moments_of_the_optimizer_that_steps() -> None:
    case = case_of("MAML")
    epochs = Epochs(case.learner.param_groups(), epochs=2)
    case.ask(epochs)
    other = case_of("MAML")
    other.learner.load_state_dict(case.learner.state_dict())
    resumed = Epochs(other.learner.param_groups(), epochs=2)
    resumed.load_state_dict(copy.deepcopy(epochs.state_dict()))
    for each, optimizer in ((case, epochs), (other, resumed)):
        each.ask(optimizer)
    for one, two in zip(case.learner.parameters(), other.learner.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_penalty_on_what_moves_before_adaptation_is_the_kl_of_the_supports() -> None:
    case = case_of("MAML")
    with torch.no_grad():
        for p in case.learner.parameters():
            p.add_(0.05 * torch.randn_like(p))
    tasks = NetworkTasks(case.learner.network, {}, PolicyGradient(inner_penalty=0.7), case.batch, at_once)
    plain = NetworkTasks(case.learner.network, {}, OBJECTIVE, case.batch, at_once)
    meta = case.learner.meta()
    path = case.learner.algorithm.adapt(meta, plain, 2, create_graph=False)
    expected = torch.zeros(3, dtype=torch.float64)
    for number, samples in enumerate(case.batch.support):
        output = plain.run(meta, path[number], samples.x)
        expected += torch.stack(
            [
                OBJECTIVE.constraint(type(output)(*(t[n] for t in output)), {k: v[n] for k, v in samples.y.items()})  # type: ignore[union-attr]
                for n in range(3)
            ]
        ).detach()
    found = evaluate(case.learner, meta, tasks).differentiate - evaluate(case.learner, meta, plain).differentiate
    torch.testing.assert_close(found.detach(), 0.7 * expected)
    assert float(expected.min()) > 0
