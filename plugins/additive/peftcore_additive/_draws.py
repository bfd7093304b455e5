"""Random numbers that a method draws once for each forward of the model, the same in all of its layers."""

from __future__ import annotations

import random
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peftcore.author import ForwardContext
from peftcore.errors import AmbiguousBackward, TrainingError


class Draws(nn.Module):
    """A whole number from 0 to `most`, drawn evenly for each forward of the model in training.

    It depends only on the seed and on the number of forwards: the global generator is not advanced, all processes of
    one training draw the same number, and a resumed training continues the sequence. Recomputation in backward
    (checkpointing) gets the number of the first run.
    """

    seed: Tensor
    count: Tensor

    def __init__(self, most: int) -> None:
        """Draw the seed of the numbers from torch's generator, which the surgeon seeds."""
        super().__init__()
        self.most = most
        self.register_buffer("seed", torch.randint(2**62, ()), persistent=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
        self.drawn: WeakKeyDictionary[ForwardContext, int] = WeakKeyDictionary()
        self.blind: set[int] = set()  # what forwards without gradients drew: a reentrant checkpoint round the host
        self.repeated = False  # runs them again inside backward, in another forward context

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch annotates it without its parameters
    def forward(self, call: ForwardContext) -> int:
        """Return the number of one forward.

        Raises:
            TrainingError: a part of the host runs by itself, so one forward cannot be distinguished from the next.
            AmbiguousBackward: backward repeats a whole forward, and several could be meant.
        """
        if call not in self.drawn:
            self.drawn[call] = self._again() if call.repeating else self._anew(call)
        return self.drawn[call]

    def _anew(self, call: ForwardContext) -> int:
        if not call.inputs:
            raise TrainingError(
                "this method draws once for each forward of the host: train the host itself, not a part"
            )
        self.count += 1
        number = random.Random(f"{self.seed} {self.count}").randint(0, self.most)
        if not torch.is_grad_enabled():
            self.blind, self.repeated = {number, *(() if self.repeated else self.blind)}, False
        return number

    def _again(self) -> int:
        if len(self.blind) != 1:
            raise AmbiguousBackward("several forwards drew before this backward: run backward after each of them")
        self.repeated = True
        return min(self.blind)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "drawn"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "drawn": WeakKeyDictionary()})
