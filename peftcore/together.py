"""What operators make of their parameters alone, such as rotations, made for many sites at once.

At each site it is small, and asking for it takes longer than making it. So the first of a group of sites that asks in a
forward of the host gets it for all of them; the others find theirs. It ends with the forward, as another one may be
differentiated by itself. Where a gradient could go astray, or somebody takes what autograd saves (a checkpoint, an
offload), each site makes its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.contract.operators import WeightOperator, full_precision
from peftcore.forward.context import Tap, current_call
from peftcore.forward.host_state import HostState
from peftcore.forward.slot import Beside
from peftcore.layers.fsdp import MANAGED
from peftcore.layers.kernels import saves_elsewhere

Kind = tuple[type[WeightOperator], Hashable]
"""What may be made at once."""
MOST = {"cpu": 2**16, "other": 2**23}
"""Numbers of which a group makes something: on a CPU what is made on the way is to stay in its cache, and elsewhere to
be little beside a model."""


@dataclass(frozen=True, eq=False, slots=True)
class _Made:
    """What was made for one operator, and of what."""

    value: Any
    sources: list[tuple[Tensor, int]]

    def holds(self, operator: WeightOperator) -> bool:
        """Whether the operator's parameters are still those, and nobody has changed them meanwhile."""
        now = zip(self.sources, _parameters(operator), strict=True)
        return all(each is source and each._version == version for (source, version), each in now)


class _Group:
    """Operators of one kind, which make at once what they make when the first of them is asked."""

    def __init__(self, operators: Sequence[WeightOperator]) -> None:
        self._operators = operators
        self._made: dict[WeightOperator, _Made] | None = None

    def find(self, operator: WeightOperator) -> _Made | None:
        """What was made for one of them, if it still holds."""
        if self._made is None:
            self._made = _make(self._operators)
        found = self._made.get(operator)
        return found if found is not None and found.holds(operator) else None


_GROUPS = Tap()
"""By kind: the groups of this forward of the host, by operator."""


def prepared(state: HostState, beside: Beside, module: nn.Module) -> Any:
    """What an operator beside the weight of a module needs that no input changes, in training."""
    operator = beside.operator
    alike = operator.alike()
    if alike is None or not _runs_whole(state):
        return beside.prepare(module)
    groups: dict[Kind, dict[WeightOperator, _Group]] | None = _GROUPS.get()
    if groups is None:
        _GROUPS.put(groups := {})
    kind = type(operator), alike
    if kind not in groups:
        groups[kind] = _grouped(_asking(state, kind))
    group = groups[kind].get(operator)
    found = None if group is None else group.find(operator)
    return beside.prepare(module) if found is None else found.value


def _runs_whole(state: HostState) -> bool:
    """Whether the host itself runs, not a part of it or what backward repeats of it, and autograd keeps what it
    saves."""
    if not torch.is_grad_enabled() or saves_elsewhere():
        return False
    call = current_call()
    return call.state is state and call.of_host


def _asking(state: HostState, kind: Kind) -> Iterator[WeightOperator]:
    """The operators of a kind that the present choice lets act beside weights."""
    choice = state.now()
    for slot in state.slots:
        acting = slot.plan_for(choice).acting
        if acting.beside is not None and not acting.frugal:
            operator = acting.beside.operator
            if (type(operator), operator.alike()) == kind:
                yield operator


def _grouped(operators: Iterator[WeightOperator]) -> dict[WeightOperator, _Group]:
    """Those one after the other that are not too many numbers together."""
    groups: dict[WeightOperator, _Group] = {}
    members: list[WeightOperator] = []
    left = 0
    for operator in operators:
        parameters = _parameters(operator)
        numbers = sum(each.numel() for each in parameters)
        if not members or numbers > left:
            members = []
            left = MOST["cpu" if all(each.device.type == "cpu" for each in parameters) else "other"]
            group = _Group(members)
        members.append(operator)
        left -= numbers
        groups[operator] = group
    return groups


def _parameters(operator: WeightOperator) -> list[nn.Parameter]:
    """Its parameters: seldom in modules of its own, among which torch would look for those that are shared."""
    if operator._modules:
        return list(operator.parameters())
    return [each for each in operator._parameters.values() if each is not None]


def _make(operators: Sequence[WeightOperator]) -> dict[WeightOperator, _Made]:
    """For all of them, or for none: what somebody cuts, moves or stands in for is in its place when its own module
    runs, not before."""
    each_has = [_parameters(operator) for operator in operators]
    tensors = [tensor for has in each_has for tensor in has]
    at_hand = all(type(tensor) is nn.Parameter and tensor.numel() for tensor in tensors)
    alike = len({(tensor.device, tensor.dtype, tensor.requires_grad) for tensor in tensors}) == 1
    if not (at_hand and alike) or any(MANAGED in vars(operator) for operator in operators):
        return {}
    with full_precision(tensors[0]):
        values = type(operators[0]).prepare_all(operators)
    sources = [[(tensor, tensor._version) for tensor in has] for has in each_has]
    return {operator: _Made(*made) for operator, *made in zip(operators, values, sources, strict=True)}
