"""Which module reads a weight whose own module is not called: rule R15 of `docs/roles.md`."""

from __future__ import annotations

import functools
import inspect
from itertools import chain, takewhile
from types import CodeType, FunctionType
from typing import Any

from torch import nn

from peftcore.roles import vocabulary as V
from peftcore.roles.survey import Kind, Node
from peftcore.roles.vocabulary import FUSED_ROLES

READ_BY_MIXERS = frozenset({"ssm.dt", "ssm.conv"})
"""Roles whose weights and biases kernels of state-space mixers take from their modules."""


def reader_of(node: Node) -> str | None:
    """Returns the module that reads a weight whose own module is not called (R15); for a list of parameters, which has
    no forward, it is the nearest one above that has."""
    above, tensor = node.parent, node.tensor
    if tensor is None and above is not None and (node.role in READ_BY_MIXERS or _adds_bias_to(node, above)):
        return above.path
    holder = node if tensor is None or above is None else above
    reader = next((each for each in holder.ancestors() if _has_forward(each)), None)
    if reader is None or not holder.module._parameters:
        return None
    read = not _has_forward(holder) or (tensor is not None and _holds_for(reader, holder, tensor))
    return reader.path if read else None


def _adds_bias_to(node: Node, parent: Node) -> bool:
    """Whether a module has vectors for the bias that a fused projection of it lacks. It then reads the weight."""
    if node.role not in FUSED_ROLES or node.kind is not Kind.LINEAR or node.module._parameters.get("bias") is not None:
        return False
    beside = ((name, each) for name, each in parent.module._parameters.items() if each is not None)
    return any(each.dim() == 1 and "bias" in V.words(name) for name, each in beside)


def _holds_for(above: Node, holder: Node, tensor: str) -> bool:
    """Whether the code of a module names a tensor of another one, whose own code does not, beyond making it."""
    reader: Any = type(above.module)
    own: Any = type(holder.module)
    return tensor in _names_in(reader) and tensor not in _names_in(own)


@functools.cache
def _names_in(cls: Any) -> frozenset[str]:
    """Returns the names in the functions of a class and of its bases, down to torch's own, but for `__init__`."""
    own = takewhile(lambda each: each is not nn.Module, cls.__mro__)
    members = chain.from_iterable(vars(each).items() for each in own)
    functions = [inspect.unwrap(member) for name, member in members if callable(member) and name != "__init__"]
    codes, names = [each.__code__ for each in functions if isinstance(each, FunctionType)], set[str]()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    return frozenset(names)


def _has_forward(node: Node) -> bool:
    return type(node.module).forward is not nn.Module.forward
