"""Random batches that repeat what a call tells: pipelines with guidance put rows without and with the text into one
batch, and several images of a prompt, or beams, stand next to each other. Each row has what was told of its own entry,
as in a call with this entry alone; or the batch is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import torch
from history_world import CLOSE, Wrong, case_of
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from torch import Tensor, nn

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing import NotApplicable
from peftcore.testing.kit import fill

Told = Mapping[str, Any]


def steps(model: nn.Module, drawn: Tensor) -> Told:
    return {"timestep": (400 + 200 * drawn[:, 0, 0, 0]).long().clamp(0, 999)}


def lengths(model: nn.Module, drawn: Tensor) -> Told:
    return {"prompt_length": (3 + drawn[:, 0, 0, 0].sign()).long()}


def tasks(model: nn.Module, drawn: Tensor) -> Told:
    return {"task": (drawn[:, 0, 0, 0] > 0).long()}


def vectors(model: nn.Module, drawn: Tensor) -> Told:
    return {"task_vector": drawn.flatten(1)[:, :16].double()}


TELL = Callable[[nn.Module, Tensor], Told] | None
TOLD: list[tuple[str, str, TELL]] = [
    ("controlnet", "unet", None),
    ("controlnet_lora", "unet", None),
    ("controlnet_xs", "unet", None),
    ("controlnext", "unet", None),
    ("controlnet_lllite", "unet", None),
    ("t2i_adapter", "unet", None),
    ("ip_adapter", "unet", None),
    ("ominicontrol", "dit", None),
    ("tlora", "unet", steps),
    ("text_to_lora", "llama", vectors),
    ("text_to_lora", "unet", vectors),
    ("moelora", "llama", tasks),
    ("polytropon", "llama", tasks),
    ("mtl_lora", "llama", tasks),
    ("attempt", "llama", lengths),
    ("idpg", "llama", lengths),
    ("smop", "llama", lengths),
]
"""Methods that are told something by calls, each with a host and what is told there of random pictures
``[entries, 1, 16, 16]``; None for what the method's own test tells of them."""


class GuidedWorld:
    """A model with an adapter that is told something, and with a LoRA beside it."""

    def __init__(self, method: str, host: str, tell: TELL) -> None:
        self.case = case_of(method, host)
        self.tell = tell or self.case.context
        self.model, self.given = self.case.fresh(torch.float64)
        self.names: list[str] = []
        for name, case in (("told", self.case), ("lora", case_of("lora", host))):
            try:
                with peftcore.activate(self.model):
                    fill(case.apply(self.model, name=name, dtype="float64", seed=7))
            except (PeftcoreError, NotApplicable):
                continue
            self.names.append(name)
        peftcore.activate(self.model, "told")

    def inputs(self, rows: int, seed: int) -> dict[str, Tensor]:
        """A batch of so many rows, all of them different."""
        drawn, found = torch.Generator().manual_seed(seed), {}
        for key, value in self.given.items():
            shape = (rows, *value.shape[1:])
            if value.is_floating_point():
                found[key] = torch.randn(shape, generator=drawn, dtype=value.dtype)
            elif key == "attention_mask":
                found[key] = torch.ones(shape, dtype=value.dtype)
            else:
                found[key] = torch.randint(3, 9, shape, generator=drawn)
        return found

    def context(self, entries: int, seed: int) -> Any:
        """What a call tells of so many pictures."""
        drawn = torch.randn(entries, 1, 16, 16, generator=torch.Generator().manual_seed(seed + 50))
        assert self.tell is not None
        told = self.tell(self.model, drawn)
        return {key: each.double() if each.is_floating_point() else each for key, each in told.items()}

    def entry(self, told: Any, number: int) -> Any:
        """What a call tells of one of them."""
        return {key: value[number : number + 1] for key, value in told.items()}

    def output(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return self.case.host.output(model(**inputs))

    def __repr__(self) -> str:
        return self.case.label


class GuidedHistory(RuleBasedStateMachine):
    """One random history of batches that repeat what calls tell."""

    world: GuidedWorld

    @initialize(which=st.sampled_from(TOLD))
    def begin(self, which: tuple[str, str, TELL]) -> None:
        self.world = GuidedWorld(*which)

    @rule(
        entries=st.integers(1, 3),
        guidance=st.booleans(),
        copies=st.integers(1, 2),
        said=st.booleans(),
        drawn=st.none() | st.lists(st.integers(0, 2), min_size=12, max_size=12),
        seed=st.integers(1, 3),
    )
    def run(self, entries: int, guidance: bool, copies: int, said: bool, drawn: list[int] | None, seed: int) -> None:
        """Without `drawn` the adapter acts on all rows; with it rows have their own."""
        world = self.world
        rows = entries * copies * (2 if guidance else 1)
        inputs, told = world.inputs(rows, seed), world.context(entries, seed)
        chosen: list[str | None] = [None, *world.names]
        names = ["told"] * rows if drawn is None else [chosen[each % len(chosen)] for each in drawn[:rows]]
        plain = entries in (1, rows)
        how: dict[str, Any] = {"guidance": guidance, "copies": copies} if said else {}
        try:
            alone = []
            for row, name in enumerate(names):
                one = world.entry(told, row // copies % entries)
                with peftcore.activate(world.model, *filter(None, [name])), peftcore.call(world.model, **one):
                    alone.append(world.output(world.model, {k: v[row : row + 1] for k, v in inputs.items()}))
            routed = peftcore.activate(world.model, "told") if drawn is None else peftcore.route(world.model, names)
            with routed, peftcore.call(world.model, **told, **how):
                found = world.output(world.model, inputs)
        except PeftcoreError as error:
            if plain and drawn is None:
                raise Wrong(f"{rows} rows with {entries} entries are refused: {error!r}; {world}") from error
            return
        expected = torch.cat(alone)
        off = [float(each) for each in (found - expected).flatten(1).abs().amax(1) / expected.abs().max()]
        if not max(off) <= CLOSE:
            raise Wrong(f"rows under {names} are off by {[f'{each:.0e}' for each in off]}; {world}")
