"""One walk over the host, which makes every module and every bare parameter a node of a tree with fast queries on
subtrees.

Nodes are numbered in the order of the walk, so a subtree is an interval of numbers and "which matrices are under this
module" is two binary searches. All rules work on this tree; none of them walks the host again.

Of consecutive list elements with equal structure, only three have nodes, and the third represents the others, since
rules depend only on whether there are two or three of something. If the rules assign different roles to the three
(because of their position), all elements must be surveyed.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.parameter import is_lazy

from peftcore.roles import vocabulary as V
from peftcore.roles.equal_modules import Run, runs

#: Children that are guests of the host and not a part of its architecture: reparametrizations and operators.
GUESTS = frozenset({"parametrizations", "peft"})
LISTS = (nn.ModuleList, nn.Sequential)
NODES = 3
"""The number of nodes for list elements of equal structure."""


class Kind(Enum):
    """The kind of a node, by the rank of its parameters: rule R1 of `docs/roles.md`."""

    CONTAINER = "container"  # no parameter of its own
    LINEAR = "linear"  # a matrix: 2-D weight, or a bare q, k, v, o parameter
    CONV = "conv"
    NORM = "norm"
    TABLE = "table"  # an embedding
    EXPERTS = "experts"  # a module that stacks the matrices of many experts
    MHA = "mha"  # nn.MultiheadAttention: it reads its matrices and calls none
    RAW = "raw"  # other parameters of a module
    TENSOR = "tensor"  # a bare parameter, as a node of its own


@dataclass(slots=True, eq=False)
class Node:
    """A module or a bare parameter of the host. The walk sets the first group of fields, the rules set the second."""

    path: str
    name: str
    module: nn.Module
    parent: Node | None
    index: int
    tensor: str | None = None
    kind: Kind = Kind.CONTAINER
    shape: tuple[int, ...] = ()  # as stored
    fan: tuple[int, int] | None = None  # (in, out) of a matrix; 1x1 convolutions are matrices too
    end: int = 0
    twins: list[str] = field(default_factory=list)  # names of those that follow it, for which it speaks
    children: list[Node] = field(default_factory=list)
    tensors: list[Node] = field(default_factory=list)  # bare parameters
    label: str = ""  # the name that counts (rule R2)
    holder: Node | None = None  # where that name hangs

    role: str | None = None
    context: bool = False
    is_block: bool = False
    block: Node | None = None
    lists_experts: bool = False

    def inside(self, other: Node) -> bool:
        """Whether this node is `other` or under it."""
        return other.index <= self.index < other.end

    def below(self, other: Node | None) -> str:
        """Returns the path relative to `other`."""
        return self.path[len(other.path) + 1 :] if other is not None and other.path else self.path

    def ancestors(self) -> Iterator[Node]:
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    @property
    def depth(self) -> int:
        return self.path.count(".") + 1 if self.path else 0

    @property
    def words(self) -> frozenset[str]:
        return V.words(self.label)

    @property
    def fan_in(self) -> int:
        return self.fan[0] if self.fan else 0

    @property
    def fan_out(self) -> int:
        return self.fan[1] if self.fan else 0

    @property
    def class_name(self) -> str:
        return type(self.module).__name__.lower()


class Ordered:
    """Nodes in the order of the walk, for queries on subtrees."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = sorted(nodes, key=lambda node: node.index)
        self._index = [node.index for node in self.nodes]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def _span(self, top: Node) -> tuple[int, int]:
        return bisect_left(self._index, top.index), bisect_left(self._index, top.end)

    def under(self, top: Node) -> list[Node]:
        start, stop = self._span(top)
        return self.nodes[start:stop]

    def count(self, top: Node) -> int:
        start, stop = self._span(top)
        return stop - start

    def first(self, top: Node) -> Node | None:
        start, stop = self._span(top)
        return self.nodes[start] if start < stop else None

    def last(self, top: Node) -> Node | None:
        start, stop = self._span(top)
        return self.nodes[stop - 1] if start < stop else None


class Survey:
    """The tree of one host, with its nodes by kind. With `each`, all list elements have nodes."""

    def __init__(self, model: nn.Module, each: bool = False) -> None:
        self._lists = () if each else LISTS
        self.nodes: list[Node] = []
        self.inputs = declared(model, "get_input_embeddings")
        self.heads = declared(model, "get_output_embeddings") | declared(model, "get_classifier")
        self._seen: set[int] = set()
        self._named = set(map(id, self.inputs | self.heads))
        self.root = self._walk(model, "", "", None)
        self.matrices = Ordered(node for node in self.nodes if node.fan is not None)
        self.weights = Ordered(node for node in self.nodes if node.kind in (Kind.LINEAR, Kind.CONV, Kind.EXPERTS))
        self.convs = Ordered(node for node in self.nodes if node.kind is Kind.CONV)
        self.norms = Ordered(node for node in self.nodes if node.kind is Kind.NORM)

    def close(self) -> None:
        """Remove the references between nodes. Otherwise the nodes and the host would stay in memory until Python
        collects garbage."""
        for node in self.nodes:
            node.parent = node.holder = node.block = None

    def _walk(self, module: nn.Module, path: str, name: str, parent: Node | None) -> Node:
        self._seen.add(id(module))
        node = self._add(Node(path, name, module, parent, len(self.nodes)))
        classify(node)
        prefix = path + "." if path else ""
        for key in bare_parameters(module):
            node.tensors.append(self._add(Node(prefix + key, key, module, node, len(self.nodes), tensor=key)))
            classify_bare(node.tensors[-1])
        for key, child, twins in self._children(module):
            if id(child) not in self._seen:
                node.children.append(self._walk(child, prefix + key, key, node))
                node.children[-1].twins = twins
        node.end = len(self.nodes)
        return node

    def _children(self, module: nn.Module) -> Iterator[tuple[str, nn.Module, list[str]]]:
        """Yields the children that get nodes, each with the names of the children that it represents."""
        children: Run = [
            (key, child, [])
            for key, child in module._modules.items()
            if child is not None and key not in GUESTS and not isinstance(child, torch.jit.ScriptModule)
        ]
        for run in runs(children, self._taken) if isinstance(module, self._lists) else ([child] for child in children):
            for key, child, _ in run[: NODES - 1]:
                yield key, child, []
            for key, child, _ in run[NODES - 1 : NODES]:
                yield key, child, [name for name, _, _ in run[NODES:]]
            for _, _, modules in run[NODES:]:
                self._seen.update(modules)

    def _taken(self, module: int) -> bool:
        return module in self._seen or module in self._named

    def _add(self, node: Node) -> Node:
        self.nodes.append(node)
        node.end = len(self.nodes)
        name_effectively(node)
        return node


def declared(model: nn.Module, getter: str) -> set[nn.Module]:
    """Returns the embeddings or the heads that the host declares; an empty set if it does not declare them."""
    method = getattr(model, getter, None)
    if not callable(method):
        return set()
    try:
        answer = method()
    except (AttributeError, NotImplementedError, TypeError):
        return set()
    answers = answer if isinstance(answer, (tuple, list)) else [answer]
    return {module for module in answers if isinstance(module, nn.Module)}


def conv1d_class() -> type | None:
    """Returns transformers' Conv1D (weight stored as (in, out)), if it is imported."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def weight_of(module: nn.Module) -> torch.Tensor | None:
    """Returns a module's weight: a parameter, a buffer of a frozen norm, or the value of a parametrization."""
    weight: torch.Tensor | None = module._parameters.get("weight")
    if weight is None:
        weight = module._buffers.get("weight")
    if weight is None and "parametrizations" in module._modules:
        with torch.no_grad():
            weight = getattr(module, "weight", None)
    if weight is None:
        weight = module.__dict__.get("weight")  # torch.nn.utils.weight_norm keeps it as a plain attribute
    return weight if isinstance(weight, torch.Tensor) and not is_lazy(weight) else None


def attribute(module: nn.Module, name: str) -> Any:
    """Returns an attribute of a module or its class, or None; tensors and children are left out. For a missing
    attribute, `getattr` would make torch format an error message first, which takes longer than the whole lookup."""
    if name in vars(module):
        return vars(module)[name]
    return None if getattr(type(module), name, None) is None else getattr(module, name)


def declared_fan(module: nn.Module) -> tuple[int, int] | None:
    """Returns (in_features, out_features) of a Linear or a similar module, as its attributes declare them; None for
    other modules. The shape of a quantized weight does not show these numbers."""
    if not GUESTS.issuperset(module._modules):
        return None
    inputs, outputs = attribute(module, "in_features"), attribute(module, "out_features")
    if not isinstance(inputs, int) or not isinstance(outputs, int):
        return None
    return (inputs, outputs) if inputs > 0 else None  # a lazy Linear declares 0


def bare_parameters(module: nn.Module) -> list[str]:
    """Returns the names of a module's parameters with two or more dimensions, except plain weights and biases."""
    return [
        name
        for name, parameter in module._parameters.items()
        if name not in ("weight", "bias") and parameter is not None and not is_lazy(parameter) and parameter.dim() >= 2
    ]


def classify(node: Node) -> None:
    """Set the kind of a node by R1: by the rank of its parameters, or by the class if the rank is ambiguous."""
    module, weight = node.module, weight_of(node.module)
    node.shape = tuple(weight.shape) if weight is not None else ()
    fan = declared_fan(module)
    if isinstance(module, nn.MultiheadAttention):
        node.kind = Kind.MHA
    elif V.EXPERT_CLASS.search(node.class_name) and (len(bare_parameters(module)) >= 2 or len(node.shape) == 3):
        node.kind = Kind.EXPERTS
    elif fan is not None and len(node.shape) != 3 and not isinstance(module, _ConvNd):
        node.kind, node.fan = Kind.LINEAR, fan
    elif isinstance(module, nn.Embedding) or (V.TABLE_CLASS.search(node.class_name) and len(node.shape) == 2):
        node.kind = Kind.TABLE
    elif weight is None:
        node.kind = Kind.RAW if any(p is not None for p in module._parameters.values()) else Kind.CONTAINER
    elif len(node.shape) == 1:
        node.kind = Kind.NORM if V.NORM_CLASS.search(node.class_name) else Kind.RAW
    elif isinstance(module, _ConvNd):
        node.kind, node.fan = Kind.CONV, pointwise_fan(module)
    elif len(node.shape) == 2:
        node.kind = Kind.LINEAR
        transposed = isinstance(module, conv1d_class() or ())
        node.fan = node.shape if transposed else node.shape[::-1]
    else:
        node.kind = Kind.RAW


def classify_bare(node: Node) -> None:
    """Set the kind of a bare parameter: it is a matrix if it is called q, k, v or o (XLNet)."""
    parameter = node.module._parameters[node.name]
    assert parameter is not None and node.parent is not None
    node.kind, node.shape = Kind.TENSOR, tuple(parameter.shape)
    if node.parent.kind not in (Kind.MHA, Kind.EXPERTS) and V.RAW_PROJECTION.fullmatch(node.name):
        node.kind, node.fan = Kind.LINEAR, (node.shape[0], math.prod(node.shape[1:]))


def pointwise_fan(conv: _ConvNd) -> tuple[int, int] | None:
    """Returns (in, out) of a 1x1 convolution that mixes channels, a matrix applied at each position; None for
    others."""
    depthwise = conv.groups == conv.in_channels > 1
    pointwise = all(size == 1 for size in conv.kernel_size) and not isinstance(conv, _ConvTransposeNd)
    return (conv.in_channels, conv.out_channels) if pointwise and not depthwise else None


def name_effectively(node: Node) -> None:
    """Set the label of a node by R2. It begins as the node's name. While its first name is generic, or is `proj` inside
    a module called q, k or v, the name of the enclosing module is put in front."""
    top, label = node, node.name
    while top.parent is not None and top.parent.path:
        if not (V.is_generic(top.name) or (top.name == "proj" and V.operands(top.parent.name))):
            break
        top = top.parent
        label = f"{top.name}.{label}"
    node.label, node.holder = label, top.parent
