"""Merged matrix products: the same values, by fewer and larger products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_flatten

from dmaml_pl.engines.products import merge_products
from dmaml_pl.engines.recording import trace

TASKS = 3
Function = Callable[..., Any]


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


X, Y, EACH, SHARED = drawn(TASKS, 5, 4), drawn(TASKS, 5, 6), drawn(TASKS, 4, 6), drawn(4, 6)


def products(function: Function, *given: Tensor) -> Counter[str]:
    """What a function's products are when they are merged, which must not change what it computes."""
    graph, constants, _ = trace(function, given, given[0].device)
    merge_products(graph)
    traced = GraphModule(constants, graph)
    torch.testing.assert_close(list(traced(*given)), tree_flatten(function(*given))[0], rtol=1e-12, atol=1e-12)
    return Counter(
        node.target.overloadpacket.__name__ for node in traced.graph.nodes if node.op == "call_function"
    ) & Counter(bmm=9, mm=9, transpose=9)


def test_the_factors_of_a_product_are_swapped_where_its_transpose_is_used() -> None:
    def turned(each: Tensor, x: Tensor) -> Tensor:
        return torch.bmm(each.transpose(1, 2), x.transpose(1, 2)).transpose(1, 2)

    assert products(turned, EACH, X) == {"bmm": 1}


def test_the_factors_of_a_product_are_swapped_through_sums_and_multiples() -> None:
    def turned(each: Tensor, x: Tensor, y: Tensor) -> Tensor:
        both = torch.bmm(each.transpose(1, 2), x.transpose(1, 2)) - y.transpose(1, 2)
        return 1 + (-both * 0.5).transpose(1, 2)

    assert products(turned, EACH, X, Y) == {"bmm": 1}


def test_a_product_that_is_used_both_ways_stays_as_it_is() -> None:
    def both_ways(x: Tensor, each: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.bmm(x, each)
        return product.transpose(1, 2), product + 1

    assert products(both_ways, X, EACH) == {"bmm": 1, "transpose": 1}


@pytest.mark.parametrize("keepdim", [False, True])
def test_products_that_are_summed_over_the_tasks_become_one(keepdim: bool) -> None:
    def summed(x: Tensor, y: Tensor, each: Tensor) -> Tensor:
        first, second = torch.bmm(x.transpose(1, 2), y), torch.bmm(y.transpose(1, 2), x)
        return (each + (second + first.transpose(1, 2)).transpose(1, 2)).sum(0, keepdim)

    assert products(summed, X, Y, EACH) == {"mm": 2}


def test_a_product_that_is_needed_for_every_task_is_not_summed_alone() -> None:
    def needed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        product = torch.bmm(x.transpose(1, 2), y)
        return product.sum(0), product

    assert products(needed, X, Y)["bmm"] == 1


@pytest.mark.parametrize("turned", [False, True])
def test_products_with_one_matrix_become_one(turned: bool) -> None:
    def shared(x: Tensor, matrix: Tensor) -> Tensor:
        expanded = matrix.expand(TASKS, *matrix.shape)
        return torch.bmm(x, expanded.transpose(1, 2) if turned else expanded)

    assert products(shared, X, SHARED.t().contiguous() if turned else SHARED)["mm"] == 1


def test_what_does_nothing_is_dropped_but_not_where_it_changes_shape_or_type() -> None:
    def idle(x: Tensor) -> tuple[Tensor, ...]:
        kept = torch.ops.aten.mul.Scalar(x, 1) + torch.zeros_like(x)
        return kept.view_as(x), torch.zeros_like(x) + x[:, :1], torch.ops.aten.mul.Scalar(x.long(), 1.0)

    assert products(idle, X) == {}


def test_a_graph_that_writes_into_tensors_is_left_as_it_is() -> None:
    def writing(x: Tensor, y: Tensor) -> Tensor:
        x = x.clone()
        product = torch.bmm(x.transpose(1, 2), y).sum(0)
        x.zero_()
        return product

    assert products(writing, X, Y)["bmm"] == 1
