"""Finding where a network with a forward of its own can be cut, by tracing that forward with torch.fx."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from lightning_altmin.traced_block import (
    ROOT,
    TracedBlock,
    attribute,
    body_of,
    computed_without_input,
    first_layer,
    is_of_numbers,
    operation,
    stripped,
)

_CHECKS = (operator.eq, operator.ne, operator.gt, operator.ge, operator.lt, operator.le, getattr)


@dataclass(frozen=True)
class Piece:
    """A part of the network that is applied as a whole, between two places where it could be cut.

    Attributes:
        name: Its name in the network.
        module: The user's own module, or a `TracedBlock` over several of them.
        reason: Why several operations are one piece; empty if there is nothing to explain.
    """

    name: str
    module: nn.Module
    reason: str = ""


class UntraceableError(Exception):
    """A network whose forward cannot be followed; the message says why."""


def trace(network: nn.Module, kept: Callable[[str, nn.Module], bool]) -> list[Piece]:
    """The network's pieces in the order they are applied, each of them reading only the one before it.

    Modules of ``torch.nn`` stay whole, and so does a module whose forward cannot be followed, depends on the training
    mode, or has hooks.

    Args:
        network: A module whose forward takes one tensor (other arguments keep their defaults).
        kept: Whether the user wants a module, given by name, to stay whole.

    Raises:
        UntraceableError: If the network's own forward cannot be followed, or returns something else than one tensor.
    """
    if why := _closed(network):
        raise UntraceableError(why)
    root = _Root(network)
    tracer = _Tracer(kept)
    try:
        graph = tracer.trace(root)
    except Exception as error:  # whatever the user's forward does with what is not a tensor
        raise UntraceableError(f"its forward cannot be traced: {_first_line(error)}") from error
    _drop_checks(graph)
    _compute_where_read(graph)
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise UntraceableError(f"its forward returns a {type(result).__name__} and not one tensor")
    return _named(list(_pieces(root, graph, tracer.reasons)))


class _Root(nn.Module):
    """Calls the network with one argument, so that the others are what the user's defaults make them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.add_module(ROOT, network)

    def forward(self, x: Any) -> Any:
        return self.get_submodule(ROOT)(x)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True  # what is computed from a buffer is computed anew at every call, not once

    def __init__(self, kept: Callable[[str, nn.Module], bool]) -> None:
        super().__init__()
        self._kept = kept
        self.reasons: dict[str, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = stripped(module_qualified_name)
        if name and self._kept(name, m):
            self.reasons[name] = "kept whole, as asked for"
            return True
        if m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential):
            return True
        if why := _closed(m):
            self.reasons[name] = why
        return bool(why)


class _OpensOne(fx.Tracer):
    """Traces one module's own forward; the modules in it stay calls."""

    proxy_buffer_attributes = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = module

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m is not self._module


def _closed(module: nn.Module) -> str:
    """Why a module cannot be opened, by a trace in either mode that opens none of its own modules; empty if it can."""
    if module.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential):
        return "it is a module of torch.nn"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    training, codes, constants = module.training, [], []
    tracer = _OpensOne(module)
    try:
        for mode in (True, False):
            module.training = mode
            root = _Root(module)  # a tracer begins with the forward of the root's type, and leaves tensors in the root
            graph = tracer.trace(root)
            codes.append(str(graph))
            constants.append([getattr(root, name) for name in _left_in_root(graph)])
    except Exception as error:  # as above
        return f"its forward cannot be traced: {_first_line(error)}"
    finally:
        module.training = training
    if codes[0] != codes[1]:
        return "its forward depends on the training mode"
    if any(first is not second for first, second in zip(*constants, strict=True)):
        return "its forward makes a tensor without reading its input or a buffer"
    return "its forward changes a buffer" if _changes_attributes(graph) else ""


def _left_in_root(graph: fx.Graph) -> list[str]:
    """Tensors that a trace found ready made: global ones, which the next trace finds too, and those it has made."""
    return [str(node.target) for node in graph.nodes if node.op == "get_attr" and "." not in str(node.target)]


def _changes_attributes(graph: fx.Graph) -> bool:
    attributes = computed_without_input(list(graph.nodes)) | set(graph.find_nodes(op="get_attr"))
    return any(
        node.kwargs.get("out") in attributes
        or (node.op == "call_method" and str(node.target).endswith("_") and node.args[0] in attributes)
        for node in graph.nodes
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _drop_checks(graph: fx.Graph) -> None:
    """Remove assertions on shapes and what only they read; a stage refuses a wrong shape itself."""
    for node in reversed(list(graph.nodes)):
        reads_shape = node.target in _CHECKS or is_of_numbers(node)
        if node.target is torch._assert or (reads_shape and not node.users):
            graph.erase_node(node)


def _compute_where_read(graph: fx.Graph) -> None:
    """Move what is computed from parameters and buffers alone to what reads it first: there is no cut between."""
    nodes = list(graph.nodes)
    without_input = computed_without_input(nodes)
    for node in reversed(nodes):
        if node.users and node in without_input:
            position = {other: index for index, other in enumerate(graph.nodes)}
            min(node.users, key=position.__getitem__).prepend(node)


def _pieces(root: nn.Module, graph: fx.Graph, reasons: dict[str, str]) -> Iterator[Piece]:
    groups, tied = _uncut_where_tied(root, _groups(graph))
    inputs = next(node for node in graph.nodes if node.op == "placeholder")
    for group in groups:
        yield _piece(root, inputs, group, reasons, tied=bool(tied & set(group)))
        inputs = group[-1]


def _groups(graph: fx.Graph) -> list[list[fx.Node]]:
    """Operations between cuts. A cut is after an operation whose result is all that later ones read."""
    operations = [node for node in graph.nodes if node.op.startswith("call")]
    position = {node: index for index, node in enumerate(operations)}
    end = len(operations)
    last_use = {
        node: max((position.get(user, end) for user in node.users), default=-1)
        for node in graph.nodes
        if node.op in ("placeholder", "call_module", "call_function", "call_method")
    }
    groups: list[list[fx.Node]] = [[]]
    live = {node for node in last_use if node.op == "placeholder"}
    for index, node in enumerate(operations):
        groups[-1].append(node)
        live = {value for value in (*live, node) if last_use[value] > index}
        if live == {node} and not _is_taken_apart(node):
            groups.append([])
    return [group for group in groups if group]


def _is_taken_apart(node: fx.Node) -> bool:
    """Whether its result is a tuple or a number, judged by how it is read."""
    reads_part = any(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    return reads_part or is_of_numbers(node)


def _uncut_where_tied(root: nn.Module, groups: list[list[fx.Node]]) -> tuple[list[list[fx.Node]], set[fx.Node]]:
    """Join groups that share a parameter, with all between them; also the operations that were joined so."""
    used: dict[nn.Parameter, list[int]] = {}
    for index, group in enumerate(groups):
        for parameter in dict.fromkeys(_parameters(root, group)):
            used.setdefault(parameter, []).append(index)
    closed = {cut for places in used.values() for cut in range(places[0], places[-1])}
    joined: list[list[fx.Node]] = []
    tied: set[fx.Node] = set()
    for index, group in enumerate(groups):
        if index - 1 in closed:
            joined[-1].extend(group)
            tied.update(joined[-1])
        else:
            joined.append(list(group))
    return joined, tied


def _parameters(root: nn.Module, group: Sequence[fx.Node]) -> Iterator[nn.Parameter]:
    for node in group:
        if node.op == "call_module":
            yield from root.get_submodule(str(node.target)).parameters()
        for source in node.all_input_nodes:
            if source.op == "get_attr" and isinstance(value := attribute(root, source), nn.Parameter):
                yield value


def _piece(root: nn.Module, inputs: fx.Node, group: list[fx.Node], reasons: dict[str, str], tied: bool) -> Piece:
    names = [stripped(str(node.target)) for node in group if node.op == "call_module"]
    kept = "; ".join(
        f"{name}: {reasons[name]}" if len(group) > 1 else reasons[name] for name in names if name in reasons
    )
    if len(group) == 1 and (module := _as_module(root, inputs, group[0])) is not None:
        return Piece(names[0] if names else group[0].name, module, kept)
    layer = first_layer(root, group)
    block = TracedBlock(body_of(root, inputs, group), "-".join(map(operation, _tensors(group))), layer)
    why = []
    if any(True for _ in block.parameters()):
        why = ["its parts share a parameter"] if tied else _skips(inputs, group)
    name = _common_name([*names, layer] if layer and layer not in names else names)
    return Piece(name or layer or group[0].name, block, "; ".join([*why, *([kept] if kept else [])]))


def _skips(inputs: fx.Node, group: Sequence[fx.Node]) -> list[str]:
    """What keeps the operations of a group together: results that are read more than once, or in parts."""
    inside = _tensors(group)
    if len(set(inside) - computed_without_input(group)) < 2:
        return []  # it is one operation
    found = []
    for source in (inputs, *group):
        readers = [user for user in source.users if user in inside]
        if len(readers) > 1:
            by = " and ".join(operation(reader) for reader in readers)
            found.append(f"{'its input' if source is inputs else operation(source)} is read by {by}")
    if not found and any(is_of_numbers(node) for node in group):
        return ["a shape is read from its input"]
    return found or [f"{operation(node)} returns several values" for node in inside if _is_taken_apart(node)]


def _tensors(group: Sequence[fx.Node]) -> list[fx.Node]:
    """The operations of a group on tensors: without those on shapes, and the parts of tuples."""
    numbers: set[fx.Node] = set()
    parts: set[fx.Node] = set()
    for node in group:
        reads = node.all_input_nodes
        if is_of_numbers(node) or (reads and numbers.issuperset(reads)):
            numbers.add(node)
        elif node.target is operator.getitem and isinstance(node.args[1], int):
            parts.add(node)
    return [node for node in group if node not in numbers | parts]


def _common_name(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    common = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _as_module(root: nn.Module, inputs: fx.Node, node: fx.Node) -> nn.Module | None:
    """One operation as a module: the user's own, or the one that does the same as a function of torch."""
    if node.op == "call_module":
        alone = node.args == (inputs,) and not node.kwargs
        return root.get_submodule(str(node.target)) if alone else None
    make = _FUNCTIONS.get(node.target)
    if make is None or not node.args or node.args[0] is not inputs or _has_node((node.args[1:], node.kwargs)):
        return None
    try:
        return make(*node.args[1:], **node.kwargs)
    except TypeError:  # called in a way that the module has no word for
        return None


def _has_node(arguments: Any) -> bool:
    found = False

    def note(node: fx.Node) -> fx.Node:
        nonlocal found
        found = True
        return node

    fx.node.map_arg(arguments, note)
    return found


def _activation(kind: type[nn.Module]) -> Callable[..., nn.Module]:
    return lambda inplace=False: kind()  # out of place is the same function


def _flatten(start_dim: int = 0, end_dim: int = -1) -> nn.Module:
    return nn.Flatten(start_dim, end_dim)


_FUNCTIONS: dict[Any, Callable[..., nn.Module]] = {
    torch.flatten: _flatten,
    "flatten": _flatten,
    functional.adaptive_avg_pool2d: lambda output_size: nn.AdaptiveAvgPool2d(output_size),
    functional.max_pool2d: nn.MaxPool2d,
    functional.avg_pool2d: nn.AvgPool2d,
    functional.gelu: nn.GELU,
    **{f: _activation(nn.ReLU) for f in (torch.relu, functional.relu, "relu")},
    **{f: _activation(nn.Tanh) for f in (torch.tanh, functional.tanh, "tanh")},
    **{f: _activation(nn.Sigmoid) for f in (torch.sigmoid, functional.sigmoid, "sigmoid")},
    functional.silu: _activation(nn.SiLU),
}


def _named(pieces: list[Piece]) -> list[Piece]:
    """Two pieces of one module are told apart by their first layer."""
    counts = Counter(piece.name for piece in pieces)
    return [
        Piece(p.module.layer or p.name, p.module, p.reason)
        if counts[p.name] > 1 and isinstance(p.module, TracedBlock)
        else p
        for p in pieces
    ]
