"""What holds of every merge, whoever the workers are: searched for counterexamples, without processes.

Values are multiples of 1/8, whose sums are exact, so that what must be equal is so to the bit.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dmaml_pl import MeanMerge, OuterOptimizerMerge, TaskWeightedMerge, ValidationWeightedMerge
from dmaml_pl.errors import NonFiniteError
from dmaml_pl.runs import RunReport
from dmaml_pl.strategies.exchange import Exchange, Merged, Offer, Sent
from dmaml_pl.strategies.flat import FlatState
from tests.recipes import same, state_of

searched = settings(deadline=None, max_examples=50, derandomize=True)

RULES = [MeanMerge, TaskWeightedMerge, ValidationWeightedMerge]
values = st.integers(-1000, 1000).map(lambda number: number / 8)
sizes = st.integers(1, 5)
counts = st.integers(1, 6)


def vectors(size: int, workers: int) -> st.SearchStrategy[list[Tensor]]:
    vector = st.lists(values, min_size=size, max_size=size).map(torch.tensor)
    return st.lists(vector, min_size=workers, max_size=workers)


class _Arrived:
    def is_completed(self) -> bool:
        return True

    def wait(self) -> None: ...


def report_of(worker: int, loss: Tensor | None = None, seconds: float = 1.0) -> RunReport:
    return {
        "loss": torch.tensor(0.0),
        "series": {"loss": torch.full((2,), float(worker)) if loss is None else loss},
        "tasks": worker + 1,
        "iterations": 2,
        "seconds": seconds,
        "cpu_seconds": 1.0,
    }


def exchanged(
    weights: list[float],
    ends: list[Tensor],
    start: Tensor,
    reports: list[RunReport],
    *,
    run: int = 0,
    exclude: bool = False,
    bfloat16: bool = False,
) -> list[Merged]:
    """What each worker holds after an exchange in which all take part, in this process."""
    sent: list[Sent] = []
    exchanges = [Exchange(exclude=exclude, bfloat16=bfloat16) for _ in ends]
    with patch.object(torch.distributed, "all_reduce", lambda payload, async_op: _Arrived()):
        for worker, (exchange, end, weight) in enumerate(zip(exchanges, ends, weights, strict=True)):
            offer = Offer(
                end, start, 0.0, torch.tensor([float(worker)]), reports[worker], weight, run, 0, parameters=len(end)
            )
            sent.append(exchange.send(offer, worker, len(ends)))
    total = torch.stack([one.payload for one in sent]).sum(dim=0)
    for one in sent:
        one.payload = total
    return [exchange.read(exchange.wait(one)) for exchange, one in zip(exchanges, sent, strict=True)]


def merge(weights: list[float], ends: list[Tensor], start: Tensor, *, bfloat16: bool = False) -> list[Merged]:
    """As `exchanged`, of workers whose runs are alike."""
    return exchanged(weights, ends, start, [report_of(worker) for worker in range(len(ends))], bfloat16=bfloat16)


@st.composite
def workers(draw: Any, least: int = 1) -> tuple[Tensor, list[Tensor]]:
    size, count = draw(sizes), draw(counts.filter(lambda count: count >= least))
    start, *ends = draw(vectors(size, count + 1))
    return start, ends


@searched
@given(workers(), st.randoms(use_true_random=False))
def test_the_order_of_the_workers_does_not_matter(given_workers: tuple[Tensor, list[Tensor]], chance: Any) -> None:
    start, ends = given_workers
    weights = [float(number + 1) for number in range(len(ends))]
    order = list(range(len(ends)))
    chance.shuffle(order)
    first = merge(weights, ends, start)
    second = merge([weights[worker] for worker in order], [ends[worker] for worker in order], start)
    assert torch.equal(first[0].mean, second[0].mean)


@searched
@given(workers())
def test_all_workers_hold_the_same_bits_and_know_of_each_other(given_workers: tuple[Tensor, list[Tensor]]) -> None:
    start, ends = given_workers
    for merged in (first := merge([1.0] * len(ends), ends, start)):
        assert torch.equal(merged.mean, first[0].mean)
        assert merged.integers.tolist() == [0.0], "worker 0's"
        assert merged.report["workers"]["loss"].tolist() == [[float(worker)] * 2 for worker in range(len(ends))]
        assert merged.report["tasks"] == sum(range(1, len(ends) + 1))


@pytest.mark.parametrize("bfloat16", [False, True])
@searched
@given(start_and_end=sizes.flatmap(lambda size: vectors(size, 2)), count=counts)
def test_equal_workers_are_a_fixed_point(bfloat16: bool, start_and_end: list[Tensor], count: int) -> None:
    start, end = start_and_end
    (merged, *_) = merge([1.0] * count, [end] * count, start, bfloat16=bfloat16)
    if bfloat16:
        assert torch.allclose(merged.mean, end, rtol=0, atol=2**-7 * float((end - start).abs().max()) + 1e-6)
    else:
        assert torch.equal(merged.mean, end)


def test_a_worker_that_is_not_finite_is_left_out_also_when_it_sends_again_under_another_number() -> None:
    """As it does where a worker before it was lost in the merge."""
    failure = NonFiniteError("the query loss", worker=2, run=3, iteration=1)
    reports = [report_of(0), report_of(1) | {"failure": failure}]
    ends = [torch.ones(1), torch.full((1,), torch.nan)]
    for merged in exchanged([1.0, 1.0], ends, torch.zeros(1), reports, run=3, exclude=True):
        assert merged.mean.tolist() == [1.0]
        assert [(each.worker, each.run, each.iteration) for each in merged.failures] == [(1, 3, 1)]


@searched
@given(workers(), st.data())
def test_the_merge_is_the_mean_by_weights_that_sum_to_one(
    given_workers: tuple[Tensor, list[Tensor]], data: Any
) -> None:
    start, ends = given_workers
    weights = data.draw(st.lists(st.floats(0.125, 8.0, width=16), min_size=len(ends), max_size=len(ends)))
    merged = merge(weights, ends, start)[0].mean
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    expected = (shares[:, None] * torch.stack(ends).double()).sum(dim=0)
    assert torch.allclose(merged.double(), expected, rtol=1e-5, atol=1e-3)
    assert bool((merged <= torch.stack(ends).amax(dim=0) + 1e-3).all())
    assert bool((merged >= torch.stack(ends).amin(dim=0) - 1e-3).all())


@pytest.mark.parametrize("rule", RULES)
@searched
@given(pair=sizes.flatmap(lambda size: vectors(size, 2)))
def test_one_worker_and_a_mean_change_nothing_to_the_bit(rule: Any, pair: list[Tensor]) -> None:
    start, end = pair
    mean = merge([1.0], [end], start)[0].mean
    assert torch.equal(rule().merge(start, mean), end)
    assert not rule.acts_alone


@pytest.mark.parametrize("rule", [*RULES, OuterOptimizerMerge])
@searched
@given(pair=sizes.flatmap(lambda size: vectors(size, 2)))
def test_a_rule_leaves_what_it_is_given_alone_and_is_the_same_on_every_worker(rule: Any, pair: list[Tensor]) -> None:
    start, mean = pair
    copies = start.clone(), mean.clone()
    assert torch.equal(rule().merge(start, mean), rule().merge(*copies))
    assert torch.equal(start, copies[0])
    assert torch.equal(mean, copies[1])


FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
INTEGERS = [torch.int64, torch.int32, torch.uint8, torch.bool]
shapes = st.lists(st.integers(0, 3), max_size=3)


@searched
@given(
    st.lists(st.tuples(shapes, st.sampled_from(FLOATS)), max_size=4),
    st.lists(st.tuples(shapes, st.sampled_from([*FLOATS, *INTEGERS])), max_size=4),
    st.integers(0, 2**31),
)
def test_what_is_packed_flat_is_unpacked_to_the_same_bits(parameters: Any, buffers: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    module = nn.Module()
    for number, (shape, kind) in enumerate(parameters):
        module.register_parameter(f"p{number}", nn.Parameter(torch.randn(shape, generator=generator).to(kind)))
    for number, (shape, kind) in enumerate(buffers):
        if kind in FLOATS:
            filled = torch.randn(shape, generator=generator).to(kind)
        else:
            filled = torch.randint(-(2**62), 2**62, shape, generator=generator).to(kind)
        module.register_buffer(f"b{number}", filled)
    before, flat = state_of(module), FlatState(module)
    floats, integers = flat.pack_floats(), flat.pack_integers()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.zero_()
    flat.unpack_floats(floats)
    flat.unpack_integers(integers)
    assert same(before, state_of(module))
