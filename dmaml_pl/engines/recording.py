"""What a function does with tensors: recorded once, as plain operations below `vmap` and autograd, and done again.

Small networks take longer to start their operations than to compute them, and what is differentiated twice does much
that is used nowhere. A record has neither, and does once what depends on no input that changes. Compilers take a trace.

PyTorch's `make_fx` traces, too, but registers a CUDA device that is not there, after which no process can be forked.
"""

from collections.abc import Callable, Sequence
from operator import getitem
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map

_aten: Any = torch.ops.aten
_VIEW: set[Any] = {_aten.view.default, _aten._unsafe_view.default}  # noqa: SLF001 - its name in PyTorch


class Trace(NamedTuple):
    """What a function does, from the tensors that it was given to a tuple of all tensors of the result.

    Attributes:
        graph: of operations; every node of a tensor tells its "shape" and its "dtype" in `meta`.
        constants: holds what is neither given nor made inside.
        form: of the result.
    """

    graph: Graph
    constants: nn.Module
    form: TreeSpec


class Record(NamedTuple):
    """What a function does.

    Attributes:
        once: from what stays to what `each` needs of it, a list of tensors.
        each: from those, followed by what changes, to all tensors of the result, a tuple.
        form: of the result.
        pure: nothing is drawn at random, and nothing is written into.
    """

    once: GraphModule
    each: GraphModule
    form: TreeSpec
    pure: bool


def record(
    call: Callable[..., Any],
    staying: Sequence[Tensor],
    changing: Sequence[Tensor],
    device: torch.device,
    rewrite: Callable[[Graph], None] = lambda graph: None,
) -> Record:
    """Record what `call` does with tensors, which it must do whatever their values are.

    Args:
        call: is given `staying`, followed by `changing`. Random numbers are drawn anew each time.
        staying: such as stay while those of `changing` change.
        changing: the others.
        device: of the tensors that a record is run with. Those that are given may be of the device `meta`: then nothing
            is computed, and no memory is needed.
        rewrite: is given both graphs, to make them faster, where nothing is drawn at random or written into.
    """
    graph, constants, form = trace(call, [*staying, *changing], device)
    pure = not any(_is_random(node) or _writes(node) for node in graph.nodes)
    graph.eliminate_dead_code()
    once, each = _split(graph, len(staying))
    if pure:
        rewrite(once)
        rewrite(each)
    return Record(GraphModule(constants, once), GraphModule(nn.Module(), each), form, pure)


def trace(call: Callable[..., Any], given: Sequence[Tensor], device: torch.device) -> Trace:
    """Trace what `call` does with tensors; see `record`.

    Raises:
        RuntimeError: it asks for the value of a tensor, which may be another one the next time.
    """
    recorder = _Recorder(given, device)
    with recorder:
        found, form = tree_flatten(call(*given))
    recorder.graph.output(tuple(recorder.node_of(each) for each in found))
    return Trace(recorder.graph, recorder.constants, form)


class _Recorder(TorchDispatchMode):
    """Makes a graph of what is done inside."""

    def __init__(self, given: Sequence[Tensor], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's to type
        self.graph = Graph()
        self.constants = nn.Module()
        """Holds tensors that are neither given nor made inside."""
        self._device = device
        self._tensors: list[Tensor] = []
        """All are kept, so that no other tensor comes to have the identity of one, and none is written into by
        autograd to save memory."""
        self._nodes: dict[int, Node] = {}
        for number, tensor in enumerate(given):
            self._know(tensor, self.graph.placeholder(f"given_{number}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if (func.is_view or func in _VIEW) and isinstance(found, Tensor) and _alike(found, args[0]):
            self._know(found, self.node_of(args[0]))
            return found
        # What is made of a view may lie otherwise in memory than at the time of recording.
        target = _aten.reshape.default if func in _VIEW else func
        node = self.graph.call_function(target, *tree_map(self._as_recorded, (tuple(args), kwargs or {})))
        if isinstance(found, Tensor):
            self._know(found, node)
        elif found is not None and not isinstance(found, tuple | list):
            raise RuntimeError(f"what it does depends on values ({func})")
        else:
            for number, tensor in enumerate(found or ()):
                if isinstance(tensor, Tensor):
                    self._know(tensor, self.graph.call_function(getitem, (node, number)))
        return found

    def _as_recorded(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        return self._device if isinstance(value, torch.device) else value

    def _know(self, tensor: Tensor, node: Node) -> None:
        node.meta = {"shape": tuple(tensor.shape), "dtype": tensor.dtype}
        self._tensors.append(tensor)
        self._nodes[id(tensor)] = node

    def node_of(self, tensor: Tensor) -> Node:
        """What a tensor is in the graph."""
        if id(tensor) not in self._nodes:
            name = f"constant_{len(self._tensors)}"
            self.constants.register_buffer(name, tensor)
            self._know(tensor, self.graph.create_node("get_attr", name))
        return self._nodes[id(tensor)]


def _alike(view: Tensor, of: Tensor) -> bool:
    """Whether a view of a tensor is that tensor again."""
    return (view.shape, view.stride(), view.storage_offset()) == (of.shape, of.stride(), of.storage_offset())


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _writes(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _split(graph: Graph, staying: int) -> tuple[Graph, Graph]:
    """What is done once, of the first placeholders alone, and what is done each time."""
    given, (output,) = ([node for node in graph.nodes if node.op == op] for op in ("placeholder", "output"))
    changing = set(given[staying:])
    for node in graph.nodes:
        if node is not output and (_is_random(node) or changing & set(node.all_input_nodes)):
            changing.add(node)
    uses = [used for node in graph.nodes if node in changing or node is output for used in node.all_input_nodes]
    kept = [node for node in dict.fromkeys(uses) if node not in changing]
    once, each = Graph(), Graph()
    copies: dict[Graph, dict[Node, Node]] = {once: {}, each: {}}

    def copy(node: Node, to: Graph) -> None:
        copies[to][node] = to.node_copy(node, copies[to].__getitem__)

    for node in kept:
        copies[each][node] = each.placeholder(node.name)
        copies[each][node].meta = dict(node.meta)
    for node in graph.nodes:
        if node is not output:
            copy(node, each if node in changing else once)
    once.output([copies[once][node] for node in kept])
    each.output(tuple(copies[each][node] for node in output.args[0]))
    return once, each
