"""Fewer and larger matrix products in the traced graph of a meta-gradient, by algebra that compilers do not do.

`vmap` makes of every matrix product one product for each of the T tasks (`bmm`). That is more work than is needed

- where nothing but the transpose of a product is used: its factors can be swapped, (A B)' = B' A'. Products of two
  transposed factors, and copies that transpose, are slow on CPUs;
- where the products of all tasks are added up, as at the end of the meta-gradient: that is one product;
- where all tasks multiply by the same matrix, as in the first step of the inner loop, which starts from the
  meta-weights: that is one product of all tasks' samples, too.

The values stay the same but for the order in which they are added up.

Legend: T tasks; a product is (T, N, K) times (T, K, M).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

_aten: Any = torch.ops.aten
_ADD, _BMM, _SUM = _aten.add.Tensor, _aten.bmm.default, _aten.sum.dim_IntList
_VIEWS = {
    _aten.view.default,
    _aten._unsafe_view.default,  # noqa: SLF001 - the name of the operation
    _aten.expand.default,
    _aten.alias.default,
    _aten.detach.default,
}
_POINTWISE = {_ADD, _aten.sub.Tensor, _aten.mul.Tensor, _aten.mul.Scalar, _aten.div.Scalar, _aten.neg.default}


def merge_products(graph: Graph) -> None:
    """Rewrite a graph that was traced (`recording.py`), in place; one that writes into tensors is left as it is."""
    schemas = [getattr(node.target, "_schema", None) for node in graph.nodes]
    if any(schema is not None and schema.is_mutable for schema in schemas):
        return
    simplify(graph)
    _join_what_is_summed(graph)
    _join_what_shares_a_matrix(graph)
    graph.lint()


def simplify(graph: Graph) -> None:
    """The first of the three, in place; every node of a tensor tells its "shape" and its "dtype" in `meta`."""
    _drop_what_does_nothing(graph)
    _swap_factors(graph)


def _drop_what_does_nothing(graph: Graph) -> None:
    """Views of the same shape, products with one and sums with zeros hide what the other passes look for."""
    for node in graph.nodes:
        kept = None
        if node.target in _VIEWS or (node.target is _aten.mul.Scalar and node.args[1] == 1):
            kept = node.args[0]
        elif node.target is _ADD and not node.kwargs:
            others = [term for term in node.args if getattr(term, "target", None) is not _aten.zeros_like.default]
            kept = others[0] if len(others) == 1 else None
        elif _is_transpose(node) and _is_transpose(node.args[0]):
            kept = node.args[0].args[0]
        if isinstance(kept, Node) and kept.meta == node.meta:
            node.replace_all_uses_with(kept)
    graph.eliminate_dead_code()


def _swap_factors(graph: Graph) -> None:
    """Make the transpose of a product at once where nothing else is used of it, or of sums and multiples of such."""
    waiting: list[Any] = [node for node in graph.nodes if _is_transpose(node)]
    gone: set[Node] = set()
    while waiting:
        transpose = waiting.pop()
        if transpose in gone or not all(_is_transpose(user) for user in transpose.args[0].users):
            continue
        node = transpose.args[0]
        turned = _turned(graph, node)
        if turned is None:
            continue
        for user in list(node.users):
            user.replace_all_uses_with(turned)
            graph.erase_node(user)
            gone.add(user)
        graph.erase_node(node)
        waiting += [term for term in turned.all_input_nodes if _is_transpose(term)]
    graph.eliminate_dead_code()


def _turned(graph: Graph, node: Node) -> Node | None:
    """The transpose of a node, made from the transposes of what it is made from; None where that is not known."""
    terms: Sequence[Any] = node.args
    if node.target is _BMM:
        terms = node.args[::-1]
    elif node.target not in _POINTWISE or any(_shape(term) != _shape(node) for term in node.all_input_nodes):
        return None
    with graph.inserting_before(node):
        terms = [_transposed(graph, term) if isinstance(term, Node) else term for term in terms]
        return _call(graph, node.target, terms, _turned_shape(node), node.kwargs)


def _join_what_is_summed(graph: Graph) -> None:
    """The sum over the tasks of X' Y, for X (T, N, K) and Y (T, N, M), is that of all tasks' N samples."""
    for node in graph.nodes:
        if node.target is not _SUM or node.kwargs or list(node.args[1]) != [0] or len(_shape(node.args[0])) != 3:
            continue
        terms: list[tuple[Any, bool]] = list(_terms(node.args[0]))
        if not any(_is_outer(term) for term, _ in terms):
            continue
        with graph.inserting_before(node):
            total = None
            for term, turned in terms:
                if _is_outer(term):
                    left, right = (_all_samples(graph, factor) for factor in (term.args[0].args[0], term.args[1]))
                    left, right = (right, left) if turned else (left, right)
                    part = _call(graph, _aten.mm.default, [_call(graph, _aten.t.default, [left]), right])
                else:
                    part = _call(graph, _SUM, [term, [0]])
                    part = _call(graph, _aten.t.default, [part]) if turned else part
                total = part if total is None else _call(graph, _ADD, [total, part])
            if len(node.args) > 2 and node.args[2]:
                total = _call(graph, _aten.unsqueeze.default, [total, 0])
        node.replace_all_uses_with(total)
    graph.eliminate_dead_code()


def _terms(node: Any, turned: bool = False) -> Iterator[tuple[Node, bool]]:
    """What a node is the sum of, and whether each is transposed there."""
    if _is_transpose(node) and len(node.users) == 1:
        yield from _terms(node.args[0], not turned)
    elif (
        node.target is _ADD
        and len(node.users) == 1
        and not node.kwargs
        and [_shape(term) for term in node.all_input_nodes] == [_shape(node)] * 2
    ):
        for term in node.args:
            yield from _terms(term, turned)
    else:
        yield node, turned


def _is_outer(node: Any) -> bool:
    """Whether a node is X' Y, used only once, and a matrix for every task."""
    is_product = node.target is _BMM and len(node.users) == 1 and _is_transpose(node.args[0])
    return is_product and min(_shape(node)[1:]) > 1


def _join_what_shares_a_matrix(graph: Graph) -> None:
    """X W, for X (T, N, K) and the same W (K, M) for all tasks, is that of all tasks' N samples."""
    for node in graph.nodes:
        if node.target is not _BMM or _is_transpose(node.args[0]):
            continue
        left, right = node.args
        turned = _is_transpose(right)
        expanded = right.args[0] if turned else right
        shared = expanded.args[0] if expanded.target is _aten.expand.default else None
        if shared is None or len(_shape(shared)) != 2 or min(_shape(expanded)[1:]) == 1:
            continue
        with graph.inserting_before(node):
            matrix = _call(graph, _aten.t.default, [shared]) if turned else shared
            product = _call(graph, _aten.mm.default, [_all_samples(graph, left), matrix])
            node.replace_all_uses_with(_call(graph, _aten.view.default, [product, list(_shape(node))], _shape(node)))
    graph.eliminate_dead_code()


def _all_samples(graph: Graph, node: Any) -> Node:
    """(T, N, K) as (T N, K)."""
    return _call(graph, _aten.reshape.default, [node, [-1, _shape(node)[2]]])


def _is_transpose(node: Any) -> bool:
    """Whether a node swaps the last two of three axes."""
    return (
        isinstance(node, Node)
        and node.target is _aten.transpose.int
        and len(_shape(node)) == 3
        and {axis % 3 for axis in node.args[1:]} == {1, 2}  # type: ignore[operator]
    )


def _transposed(graph: Graph, node: Any) -> Node:
    if _is_transpose(node):
        factor: Node = node.args[0]
        return factor
    return _call(graph, _aten.transpose.int, [node, 1, 2], _turned_shape(node))


def _shape(node: Any) -> tuple[int, ...]:
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


def _turned_shape(node: Node) -> tuple[int, ...]:
    tasks, rows, columns = _shape(node)
    return tasks, columns, rows


def _call(
    graph: Graph, target: Any, arguments: Sequence[Any], shape: tuple[int, ...] = (), settings: Any = None
) -> Node:
    """A new node; its shape matters to what comes after only where it has three axes."""
    node = graph.call_function(target, tuple(arguments), dict(settings or {}))
    node.meta = {"shape": shape, "dtype": node.all_input_nodes[0].meta["dtype"]}
    return node
