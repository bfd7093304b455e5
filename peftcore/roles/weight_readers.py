"""Finds the module that reads a weight whose own module is not called: rule R15 of `docs/roles.md`.

The rule uses only the names in compiled code. It needs neither the source nor `code_frames`, which follows values.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections import defaultdict
from itertools import chain, pairwise, takewhile
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from peftcore.roles import vocabulary as V
from peftcore.roles.survey import Kind, Node
from peftcore.roles.vocabulary import FUSED_ROLES

READ_BY_MIXERS = frozenset({"ssm.dt", "ssm.conv"})
"""Roles of modules whose weights and biases are read by kernels of state-space mixers."""


def reader_of(node: Node) -> str | None:
    """Returns the path of the module that reads a weight whose own module is not called (R15); None if its own module
    is called. For a list of parameters, which lacks a forward, it is the nearest enclosing module with a forward."""
    above, tensor = node.parent, node.tensor
    if (
        tensor is None
        and above is not None
        and (node.role in READ_BY_MIXERS or _adds_bias_to(node, above) or _reads_only(above, node))
    ):
        return above.path
    holder = node if tensor is None or above is None else above
    reader = next((each for each in holder.ancestors() if _has_forward(each)), None)
    if reader is None or not holder.module._parameters:
        return None
    read = not _has_forward(holder) or (tensor is not None and _holds_for(reader, holder, tensor))
    return reader.path if read else None


def _adds_bias_to(node: Node, parent: Node) -> bool:
    """Whether a module has vectors for the bias that its fused projection lacks. If so, it reads the weight."""
    if node.role not in FUSED_ROLES or node.kind is not Kind.LINEAR or node.module._parameters.get("bias") is not None:
        return False
    beside = ((name, each) for name, each in parent.module._parameters.items() if each is not None)
    return any(each.dim() == 1 and "bias" in V.words(name) for name, each in beside)


def _reads_only(parent: Node, node: Node) -> bool:
    """Whether the code of a module only uses tensors of a child, as in `self.q_proj.weight`."""
    if parent.kind is Kind.MHA:
        return False  # sites in torch's own attention are those of the attention
    name = node.path.rpartition(".")[2]
    after = [then for code in _code_of(parent) for this, then in _steps(code) if this == name]
    return bool(after) and all(then in node.module._parameters for then in after)


def _holds_for(above: Node, holder: Node, tensor: str) -> bool:
    """Whether the code of a module names a tensor of another module, whose own code only creates the tensor."""
    return _names(above, tensor) and not _names(holder, tensor)


def _names(node: Node, tensor: str) -> bool:
    return any(tensor in code.co_names for code in _code_of(node))


def _code_of(node: Node) -> tuple[CodeType, ...]:
    cls: Any = type(node.module)
    return _codes(cls)


@functools.cache
def _codes(cls: Any) -> tuple[CodeType, ...]:
    """Returns the code that a forward runs: its own code, and the code of all functions of the class that this code
    names, directly or indirectly. Functions of base classes are included, up to torch's own."""
    functions = defaultdict[str, list[CodeType]](list)
    for base in takewhile(lambda each: each is not nn.Module, cls.__mro__):
        for name, member in vars(base).items():
            if callable(member) and isinstance(function := inspect.unwrap(member), FunctionType):
                functions[name].append(function.__code__)
    codes = functions.pop("forward", [])
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        codes += chain.from_iterable(functions.pop(name, ()) for name in code.co_names)
    return tuple(codes)


@functools.cache
def _steps(code: CodeType) -> tuple[tuple[str, str], ...]:
    """Returns pairs of attribute names: an attribute that the code reads, and the attribute that it reads next from the
    result. The second name is "" if the code does something else with the result."""
    steps = [each.argval if each.opname in ("LOAD_ATTR", "LOAD_METHOD") else "" for each in dis.get_instructions(code)]
    return tuple(pair for pair in pairwise([*steps, ""]) if pair[0])


def _has_forward(node: Node) -> bool:
    """Whether the module can be called: its forward is not torch's, and does more than to raise."""
    forward: Any = type(node.module).forward
    raises = isinstance(forward, FunctionType) and forward.__code__.co_names == ("NotImplementedError",)
    return forward is not nn.Module.forward and not raises
