"""The common part of methods with a side network that reads the outputs of blocks. Its output replaces that of the last
block, and no gradient reaches the blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from peftcore.author import BlockSite, Operator, Surgeon, Tap, TokenStacks, block_sites, on_first
from peftcore_additive._side import Ends


class BesideOperator(Operator):
    """Stores the detached output of a block. If `answers` is True, the output is replaced by the result of `answer` on
    all stored states."""

    def __init__(self, site: BlockSite, taps: Sequence[Tap], answers: bool) -> None:
        super().__init__(site)
        self.taps, self.answers = taps, answers

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(self.taps) == 2:
            self.taps[0].put(x.detach())
        told = self.told(x, *args, **kwargs)
        output = call(x.detach() if x.requires_grad else x, *args, **kwargs)
        return on_first(output, lambda h: self._passed(h.detach(), x, told))

    def _passed(self, h: Tensor, x: Tensor, told: Any) -> Tensor:
        self.taps[-1].put(h)
        if self.answers:
            return self.answer([tap.get() for tap in self.taps], told).to(h.dtype).view_as(h)
        return Ends.apply(h, x) if x.requires_grad else h

    def told(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return values of the block's arguments that `answer` needs. It is called before the block adds to its
        cache."""
        return None

    def answer(self, states: list[Tensor], told: Any) -> Tensor:
        """Return the replacement of the last state, given the states ``[..., d]`` before the first block and after each
        block. It has the shape of the last state, except that dimensions of positions may be flattened."""
        raise NotImplementedError


def beside(surgeon: Surgeon) -> list[tuple[BlockSite, list[Tap]]]:
    """Return the target blocks that collect states, each with taps for the states before the first block and after each
    block up to itself."""
    sites = TokenStacks(surgeon).answering(block_sites(surgeon), surgeon.wishes.target is not None)
    taps = [Tap(until_backward=True) for _ in (None, *sites)]
    return [(site, taps[:number]) for number, site in enumerate(sites, 2)]
