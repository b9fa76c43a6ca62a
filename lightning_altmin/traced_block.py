"""Operations of a traced forward as one module, over the user's own modules, parameters and buffers."""

from __future__ import annotations

import operator
from collections.abc import Iterator, MutableMapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

ROOT = "network"
_READERS = "read"
NORMALIZATION = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm)
NOT_LAYERS = (*NORMALIZATION, nn.PReLU)
"""Modules that have parameters and no code."""
# Functions and methods by which a parameter is added, multiplied, joined or used to normalise; any other is a layer.
# fmt: off
_NOT_LAYER_FUNCTIONS = {
    "add", "iadd", "sub", "isub", "rsub", "mul", "imul", "div", "truediv", "itruediv", "pow", "lerp", "addcmul",
    "addcdiv", "maximum", "minimum", "clamp", "where", "cat", "concat", "stack", "expand", "expand_as", "repeat",
    "view_as", "type_as", "to", "prelu", "layer_norm", "rms_norm", "group_norm", "batch_norm", "instance_norm",
}
# fmt: on
_OF_NUMBERS = {("call_method", "dim"), ("call_method", "size")}


class TracedBlock(nn.Module):
    """Operations of a traced forward that cannot be cut apart, as one module over the user's own modules.

    Parameters and buffers that the forward reads by itself are read from their owners at every call.

    Attributes:
        label: Names of the operations, in order.
        layer: Name of its first layer in the network; empty if it has none.
        has_layer: Whether one of them is a layer: a module with parameters, or a function of a parameter. Parameters
            that are only added, multiplied or used to normalise make none.
    """

    def __init__(self, body: fx.GraphModule, label: str, layer: str) -> None:
        super().__init__()
        self.body = body
        self.label = label
        self.layer = layer
        self.has_layer = bool(layer)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.body(x)
        return output


class Reader(nn.Module):
    """Reads an attribute of a module, as it is when asked.

    A reference to the tensor would not do: ``to``, ``load_state_dict(assign=True)`` or an assignment give the module
    another. What is read is the reader's own parameter or buffer, too, and the only one, for what looks for those of a
    block; the owner is no submodule, for then they would find all that it has.
    """

    def __init__(self, owner: nn.Module, name: str) -> None:
        super().__init__()
        self._source = (owner, name)  # in a tuple, which does not make a submodule of it
        self.__dict__["_parameters"] = _Entry(owner, "_parameters", name)
        self.__dict__["_buffers"] = _Entry(owner, "_buffers", name)

    def forward(self) -> Any:
        return getattr(*self._source)


class _Entry(MutableMapping[str, Any]):
    """One entry of a module's dictionary of parameters or buffers; empty while there is no such entry."""

    def __init__(self, owner: nn.Module, kind: str, name: str) -> None:
        self._owner, self._kind, self._name = owner, kind, name

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = getattr(self._owner, self._kind)
        return entries

    def __getitem__(self, key: str) -> Any:
        if key != self._name:
            raise KeyError(key)
        return self._entries()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key != self._name:
            raise KeyError(key)
        self._entries()[key] = value

    def __delitem__(self, key: str) -> None:
        if key != self._name:
            raise KeyError(key)
        del self._entries()[key]

    def __iter__(self) -> Iterator[str]:
        return iter([self._name] if self._name in self._entries() else [])

    def __len__(self) -> int:
        return int(self._name in self._entries())


def body_of(root: nn.Module, inputs: fx.Node, group: Sequence[fx.Node]) -> fx.GraphModule:
    """The operations of a group as a function of the value that it reads."""
    graph = fx.Graph()
    copies = {inputs: graph.placeholder("x")}
    readers = nn.ModuleList()

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter or buffer: read where it is used
            owner, _, name = str(node.target).rpartition(".")
            copies[node] = graph.call_module(f"{_READERS}.{len(readers)}")
            readers.append(Reader(root.get_submodule(owner), name))
        return copies[node]

    for node in group:
        copies[node] = graph.node_copy(node, copied)
    graph.output(copies[group[-1]])
    holder = nn.Module()
    holder.add_module(ROOT, root.get_submodule(ROOT))
    holder.add_module(_READERS, readers)
    return fx.GraphModule(holder, graph)


def first_layer(root: nn.Module, group: Sequence[fx.Node]) -> str:
    """Name of the first layer among operations: of the module, or of the parameter that a function applies."""
    without_input = computed_without_input(group)
    names: dict[fx.Node, str] = {}  # of the first parameter in what is computed from parameters alone
    for node in group:
        if node.op == "call_module":
            module = root.get_submodule(str(node.target))
            if not isinstance(module, NOT_LAYERS) and any(True for _ in module.parameters()):
                return stripped(str(node.target))
            continue
        read = [name for source in node.all_input_nodes if (name := names.get(source) or _parameter(root, source))]
        if not read or is_of_numbers(node):
            continue
        if node in without_input:
            names[node] = read[0]
        elif operation(node).rstrip("_") not in _NOT_LAYER_FUNCTIONS:
            return read[0]
    return ""


def _parameter(root: nn.Module, node: fx.Node) -> str:
    is_parameter = node.op == "get_attr" and isinstance(attribute(root, node), nn.Parameter)
    return stripped(str(node.target)) if is_parameter else ""


def attribute(root: nn.Module, node: fx.Node) -> Any:
    """What a node that reads an attribute finds."""
    return operator.attrgetter(str(node.target))(root)


def computed_without_input(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Functions of parameters and buffers alone, among nodes in order."""
    found: set[fx.Node] = set()
    for node in nodes:
        reads = node.all_input_nodes
        is_function = node.op in ("call_function", "call_method")
        if is_function and reads and all(source.op == "get_attr" or source in found for source in reads):
            found.add(node)
    return found


def is_of_numbers(node: fx.Node) -> bool:
    """Whether it reads a shape or another property of a tensor, and makes no tensor."""
    return node.target is getattr or (node.op, node.target) in _OF_NUMBERS


def operation(node: fx.Node) -> str:
    """Name of an operation: of the module within its parent, of the function or the method."""
    if node.op == "call_module":
        return stripped(str(node.target)).rpartition(".")[2]
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", node.target))


def stripped(name: str) -> str:
    """A name in the traced root as a name in the user's network."""
    return name.removeprefix(ROOT).removeprefix(".")
