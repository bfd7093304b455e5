"""Compositions of several injections. They can be nested, and `activate` accepts them in place of a name.

    activate(model, Stack("style", Average("german", "french")))

In a composition other than `Stack`, each part is a branch. At each module, every branch runs its injections one after
the other. Then the outputs of the branches are combined, or the inputs that the branches pass to the module
(`Combiner.mixes_inputs`). In a stack, the parts after a composition act in each branch of that composition.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftcore.contract.calls import Calls
from peftcore.contract.operators import Combiner, on_first
from peftcore.errors import CompositionError

Names = tuple[str, ...]
Outputs = Mapping[Names, Any]
"""The output of a module in each branch. The key is the names of the branch's injections, in the order in which they
act."""
Combiners = Mapping[str, Combiner]
"""The combiners at a module, by the name of the injection that each belongs to."""


class Composition(ABC):
    """Base class of compositions, which combine several injections or other compositions. Compositions are immutable
    and compared by value."""

    def __init__(self, *parts: str | Composition, **options: Any) -> None:
        wrong = [part for part in parts if not isinstance(part, str | Composition)]
        if wrong or not parts:
            what = f"not {wrong}" if wrong else "and got nothing"
            raise CompositionError(f"{type(self).__name__} takes names of injections and compositions of them, {what}")
        self.parts = parts
        self.options = options
        """The other arguments of the composition, plain values, which a file stores with the parts."""

    def names(self) -> Iterator[str]:
        """Yields the names of all injections in the composition, in order."""
        for part in self.parts:
            yield from (part,) if isinstance(part, str) else part.names()

    def combined(self) -> Iterator[str]:
        """Yields the names of the injections whose outputs are combined with outputs of other injections."""
        yield from self.names()

    def mixer(self, here: Combiners) -> Combiner | None:
        """Returns the combiner that mixes the inputs of a module, one from each part; None if the parts' outputs are
        combined instead."""
        return None

    @abstractmethod
    def combine(self, outputs: list[Tensor], base: Tensor, here: Combiners) -> Tensor:
        """Returns one output, combined from the outputs of the branches and from `base`, the module's output without
        the branches."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), self.parts, json.dumps(self.options, sort_keys=True)))

    def __repr__(self) -> str:
        options = [f"{key}={value!r}" for key, value in self.options.items() if value is not None]
        return f"{type(self).__name__}({', '.join([*map(repr, self.parts), *options])})"


class Stack(Composition):
    """A composition whose parts act one after the other, in the given order."""

    def __init__(self, *parts: str | Composition) -> None:
        super().__init__(*parts)

    def combined(self) -> Iterator[str]:
        for part in self.parts:
            yield from () if isinstance(part, str) else part.combined()

    def combine(self, outputs: list[Tensor], base: Tensor, here: Combiners) -> Tensor:
        raise NotImplementedError("a stack is unrolled into branches")


def _weights(parts: Sequence[object], weights: Sequence[float] | None) -> list[float]:
    given = [1.0] * len(parts) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(parts):
        raise CompositionError(f"{len(parts)} parts need {len(parts)} weights, one for each, not {len(given)}")
    return given


class Sum(Composition):
    """``base + sum_i w_i (y_i - base)``: the base output plus the weighted sum of the parts' changes. Without
    `weights`, every weight is 1; a negative weight subtracts a change.

    Raises:
        CompositionError: there are not as many weights as parts.
    """

    def __init__(self, *parts: str | Composition, weights: Sequence[float] | None = None) -> None:
        super().__init__(*parts, weights=_weights(parts, weights))

    def combine(self, outputs: list[Tensor], base: Tensor, here: Combiners) -> Tensor:
        total = base
        for weight, output in zip(self.options["weights"], outputs, strict=True):
            total = total + weight * (output - base)
        return total


class Average(Composition):
    """``sum_i w_i y_i / sum_i w_i``: the weighted mean of the parts' outputs. Without `weights`, every weight is 1.

    Raises:
        CompositionError: there are not as many weights as parts, or they add up to 0.
    """

    def __init__(self, *parts: str | Composition, weights: Sequence[float] | None = None) -> None:
        super().__init__(*parts, weights=_weights(parts, weights))
        if not sum(self.options["weights"]):
            raise CompositionError("the weights of an average must not add up to 0")

    def combine(self, outputs: list[Tensor], base: Tensor, here: Combiners) -> Tensor:
        weights = self.options["weights"]
        pairs = zip(weights, outputs, strict=True)
        return torch.stack([weight / sum(weights) * output for weight, output in pairs]).sum(0)


class Split(Composition):
    """Parts that each act on a range of the tokens, in outputs [batch, tokens, ...]. The first part acts on the first
    ``lengths[0]`` tokens, and so on. If the last length is None, the last part acts on all remaining tokens. Every
    module must get the whole sequence, so generation cannot use a cache.

    Raises:
        CompositionError: the lengths do not fit the parts (on construction), or the sequence (in forward).
    """

    def __init__(self, *parts: str | Composition, lengths: Sequence[int | None]) -> None:
        super().__init__(*parts, lengths=list(lengths))
        fixed = list(lengths[:-1]) + ([] if lengths and lengths[-1] is None else list(lengths[-1:]))
        if len(lengths) != len(parts) or not all(isinstance(each, int) and each > 0 for each in fixed):
            raise CompositionError(
                f"a split of {len(parts)} parts needs {len(parts)} lengths: whole numbers above 0, of which the last "
                f"may be None; not {list(lengths)}"
            )

    def combine(self, outputs: list[Tensor], base: Tensor, here: Combiners) -> Tensor:
        lengths = list(self.options["lengths"])
        fixed = sum(each for each in lengths if each is not None)
        tokens = base.shape[1] if base.dim() > 2 else 0
        rest = tokens - fixed
        if rest < 0 or (lengths[-1] is not None and rest):
            raise CompositionError(
                f"a split into {lengths} cannot be applied to a module that returns {list(base.shape)}: it needs "
                "[batch, tokens, features] with all tokens of the sequence (generate with use_cache=False)"
            )
        lengths = [rest if each is None else each for each in lengths]
        pieces = zip(*(torch.split(output, lengths, dim=1) for output in outputs), strict=True)
        return torch.cat([piece[index] for index, piece in enumerate(pieces)], dim=1)


class Fuse(Composition):
    """Combines the parts' outputs by the operators of another injection, named `by`: for example by the learned
    attention of the method adapter_fusion. At modules without an operator of `by`, the outputs are averaged."""

    def __init__(self, *parts: str | Composition, by: str) -> None:
        super().__init__(*parts, by=by)

    def names(self) -> Iterator[str]:
        yield from super().names()
        yield self.options["by"]

    def combined(self) -> Iterator[str]:
        yield from super().names()

    def mixer(self, here: Combiners) -> Combiner | None:
        combiner = here.get(self.options["by"])
        return combiner if combiner is not None and combiner.mixes_inputs else None

    def combine(self, outputs: list[Tensor], base: Tensor, here: Combiners) -> Tensor:
        combiner = here.get(self.options["by"])
        if combiner is None:
            return torch.stack(outputs).mean(0)
        fused: Tensor = combiner.combine(outputs, base)
        return fused


KINDS = {kind.__name__: kind for kind in (Stack, Sum, Average, Split, Fuse)}


def composed(composition: Composition, outputs: Outputs, here: Combiners, calls: Calls) -> Any:
    """Returns a module's output under a composition. If the module returns tuples, only the first entries are combined,
    and the other entries come from the module's output without the branches.

    Args:
        outputs: the output of each branch (see `branches`); branches with the same operators share one object.
        here: the combiners at the module.
        calls: the recorded calls of the module in branches that only change the module's input.
    """
    return _branches([composition], (), outputs, here, calls)


def _branches(
    nodes: Sequence[str | Composition], before: Names, outputs: Outputs, here: Combiners, calls: Calls
) -> Any:
    if not nodes:
        return outputs[before]
    first, rest = nodes[0], nodes[1:]
    if isinstance(first, str):
        return _branches(rest, (*before, first), outputs, here, calls)
    if isinstance(first, Stack):
        return _branches([*first.parts, *rest], before, outputs, here, calls)
    base = _branches(rest, before, outputs, here, calls)
    found = [_branches([part, *rest], before, outputs, here, calls) for part in first.parts]
    if all(output is base for output in found):
        return base  # none of them acts here
    mixer = first.mixer(here)
    if mixer is not None:
        inputs = [calls.given(output) for output in found]
        return calls.again(base, mixer.combine_inputs(inputs, calls.given(base), _first_of(base)))
    kept = [_first_of(output) for output in found]
    return on_first(base, lambda plain: first.combine(kept, plain, here))


def _first_of(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


def branches(nodes: Sequence[str | Composition], before: Names = ()) -> Iterator[Names]:
    """Yields every branch that `composed` may run. A branch is a tuple of the names of injections, in the order in
    which they act."""
    for names, _ in _ways(nodes, before, {}, None):
        if not isinstance(names, Composition):
            yield names


def mixed(composition: Composition, here: Combiners) -> Iterator[tuple[Composition, Names | Composition]]:
    """Yields the branches whose inputs a combiner in `here` mixes. The injections of these branches may only change the
    module's input. Each item is a pair: first the composition whose parts are mixed, then either one of its branches or
    a composition inside it that mixes outputs."""
    for inside, by in _ways([composition], (), here, None):
        if by is not None:
            yield by, inside


def _ways(
    nodes: Sequence[str | Composition], before: Names, here: Combiners, by: Composition | None
) -> Iterator[tuple[Names | Composition, Composition | None]]:
    """Yields every branch, and every composition that mixes outputs. Each is paired with the nearest composition around
    it that mixes inputs, or None."""
    if not nodes:
        yield before, by
        return
    first, rest = nodes[0], nodes[1:]
    if isinstance(first, str):
        yield from _ways(rest, (*before, first), here, by)
    elif isinstance(first, Stack):
        yield from _ways([*first.parts, *rest], before, here, by)
    else:
        mixes = first.mixer(here) is not None
        if not mixes:
            yield first, by
        around = first if mixes else by
        yield from _ways(rest, before, here, around)
        for part in first.parts:
            yield from _ways([part, *rest], before, here, around)
