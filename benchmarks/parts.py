"""``python -m benchmarks.parts``: how much each part of OFT's rotation adds to a step, by leaving out the others; a
table of milliseconds."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import memory
from benchmarks.contenders import PAIRS, Step, limit_step, training_step
from benchmarks.hosts import PROJECTIONS, llama, tokens
from benchmarks.steps import LAYOUTS, LENGTH
from benchmarks.timing import take_turns
from peftcore_reparameterized import _kernels as kernels

SIZE, TERMS = 32, 5


@dataclass(frozen=True)
class Parts:
    """The parts of a rotation that are carried out; its input is kept for backward anyway."""

    makes: bool = False
    """The rotation comes of what trains, and its gradient goes back there."""
    turns: bool = False
    """Inputs turn."""
    turns_back: bool = False
    """Their gradients turn."""
    learns: bool = False
    """The gradient of the rotation is computed; else it is the rotation."""

    def on(self, host: Any) -> Any:
        """Return the frozen host with such rotations before its projections."""
        host.requires_grad_(False)
        for name, layer in list(host.named_modules()):
            if name.rpartition(".")[2] in PROJECTIONS:
                self._before(layer)
        return host

    def _before(self, layer: nn.Linear) -> None:
        blocks = layer.in_features // SIZE
        entries = nn.Parameter(torch.randn(blocks, SIZE * (SIZE - 1) // 2) * 0.01, requires_grad=self.makes)
        layer.register_parameter("entries", entries)
        fixed = torch.eye(SIZE).repeat(blocks, 1, 1)

        def forward(x: Tensor) -> Tensor:
            R = kernels.neumann(entries, SIZE, TERMS) if self.makes else fixed
            return F.linear(_Parted.apply(x, R, self), layer.weight)  # type: ignore[no-untyped-call]

        layer.forward = forward  # type: ignore[method-assign, assignment]


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, parts: Parts) -> Tensor:
        ctx.save_for_backward(x, R)
        ctx.parts = parts
        return kernels.rotate(x, R) if parts.turns else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (x, R), (gradient,) = ctx.saved_tensors, gradients
        of_x = kernels.rotate(gradient, R.mT) if ctx.parts.turns_back else gradient
        if not ctx.needs_input_grad[1]:
            return of_x, None, None
        rows, of_rows = (each.reshape(-1, *R.shape[:2]).transpose(0, 1) for each in (x, gradient))
        return of_x, rows.mT @ of_rows if ctx.parts.learns else R, None


KEPT = Parts()
PARTS: Mapping[str, tuple[Parts, Parts | None]] = {
    "inputs kept for backward": (KEPT, None),
    "turning inputs": (Parts(turns=True), KEPT),
    "turning gradients": (Parts(turns_back=True), KEPT),
    "rotations, and back through them": (Parts(makes=True), KEPT),
    "gradients of rotations": (Parts(makes=True, learns=True), Parts(makes=True)),
}
"""The parts with that of the figure, and those with all but it; None is the limit."""


def steps() -> Mapping[str | Parts, Step]:
    """Return steps of the limit, all parts, ours and theirs, on copies of one host."""
    base, ids = llama(), tokens(4, LENGTH)
    pair = PAIRS["oft"]
    made: dict[str | Parts, Step] = {
        "limit": limit_step(copy.deepcopy(base), ids),
        "all of ours": training_step(pair.ours_on(copy.deepcopy(base)), ids),
        "all of peft's": training_step(pair.theirs_on(copy.deepcopy(base)), ids),
    }
    for parts, _ in PARTS.values():
        host = parts.on(copy.deepcopy(base))
        made[parts] = training_step(host, ids) if parts.makes else limit_step(host, ids)
    return made


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    memory.keep_memory()
    found: dict[str | Parts, list[float]] = {}
    for _ in range(LAYOUTS):
        for who, seconds in take_turns(steps(), -(-given.rounds // LAYOUTS)).items():  # type: ignore[arg-type]
            found.setdefault(who, []).extend(seconds)
    median = {who: 1e3 * float(np.median(seconds)) for who, seconds in found.items()}
    table = Table("part", "ms beyond the limit")
    for name, (parts, without) in PARTS.items():
        table.add_row(name, f"{median[parts] - median[without or 'limit']:.1f}")
    for who in ("all of ours", "all of peft's"):
        table.add_row(who, f"{median[who] - median['limit']:.1f}")
    table.add_row("(the limit)", f"{median['limit']:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
