"""Fewer passes over memory in a recorded graph: sums that products add to, and results in the place of what is used up.

With features of many samples an operation that is no product takes as long as memory does. The values stay the same but
for the order in which they are added up.

Legend: T tasks; a product is (T, N, K) times (T, K, M).
"""

from typing import Any

import torch
from torch.fx import Graph, Node

from dmaml_pl.engines.products import simplify

_aten: Any = torch.ops.aten
_ADD, _BMM = _aten.add.Tensor, _aten.bmm.default

THIN = 8
"""Columns of a product that PyTorch makes in half of the time where it is turned round."""


def fuse(graph: Graph) -> None:
    """Rewrite a graph of `recording` that writes nowhere, in place."""
    simplify(graph)
    for node in list(graph.nodes):
        if node.target is _BMM and 4 * _shape(node)[2] < _shape(node)[1] and _shape(node)[2] <= THIN:
            _turn_round(graph, node)
    for node in list(graph.nodes):
        if node.target is _ADD and not node.kwargs:
            _add_by_product(graph, node)
    for node in list(graph.nodes):
        if torch.Tag.pointwise in getattr(node.target, "tags", ()):
            _write_into_what_is_used_up(graph, node)
    graph.eliminate_dead_code()
    graph.lint()


def _turn_round(graph: Graph, node: Node) -> None:
    """A B is (B' A')'."""
    with graph.inserting_before(node):
        left, right = (_transposed(graph, factor) for factor in node.args)
        product = graph.call_function(_BMM, (right, left))
        tasks, rows, columns = _shape(node)
        product.meta = node.meta | {"shape": (tasks, columns, rows)}
        turned = _transposed(graph, product)
    node.replace_all_uses_with(turned)
    graph.erase_node(node)


def _transposed(graph: Graph, node: Any) -> Node:
    if node.target is _aten.transpose.int and {axis % 3 for axis in node.args[1:]} == {1, 2}:
        original: Node = node.args[0]
        return original
    found = graph.call_function(_aten.transpose.int, (node, 1, 2))
    tasks, rows, columns = _shape(node)
    found.meta = node.meta | {"shape": (tasks, columns, rows)}
    return found


def _add_by_product(graph: Graph, node: Node) -> None:
    """A sum of a product and of something that is used up: the product adds to it."""
    for product, other in (node.args, node.args[::-1]):
        if not (isinstance(product, Node) and isinstance(other, Node) and product is not other):
            continue
        if product.target is _BMM and _is_used_up(product, node) and _is_used_up(other, node):
            with graph.inserting_before(node):
                total = graph.call_function(_aten.baddbmm_.default, (other, *product.args))
            total.meta = dict(node.meta)
            node.replace_all_uses_with(total)
            graph.erase_node(node)
            graph.erase_node(product)
            return


def _write_into_what_is_used_up(graph: Graph, node: Node) -> None:
    """An operation on each number alone: its result takes the place of an argument that nothing else uses."""
    free = [each for each in node.args if isinstance(each, Node) and _is_used_up(each, node)]
    writing = _writing(node.target)
    if free and writing is not None:
        target, out = writing
        with graph.inserting_before(node):
            written = graph.call_function(target, node.args, {**node.kwargs, out: free[0]})
        written.meta = dict(node.meta)
        node.replace_all_uses_with(written)
        graph.erase_node(node)


def _is_used_up(node: Node, by: Node) -> bool:
    """Whether a tensor has memory of its own that nothing uses after `by`, and that its result fits in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.meta != by.meta or len(node.users) > 1 or len(schema.returns) != 1:
        return False
    return schema.is_mutable or schema.returns[0].alias_info is None


def _writing(target: Any) -> tuple[Any, str] | None:
    """The same operation that writes into a tensor, and the name of that argument."""
    wanted = [(argument.name, str(argument.type)) for argument in target._schema.arguments]  # noqa: SLF001 - not public
    for name in target.overloadpacket.overloads():
        other = getattr(target.overloadpacket, name)
        arguments = other._schema.arguments  # noqa: SLF001
        out = [argument.name for argument in arguments if argument.is_out]
        if len(out) == 1 and [(a.name, str(a.type)) for a in arguments if not a.is_out] == wanted:
            return other, out[0]
    return None


def _shape(node: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape
