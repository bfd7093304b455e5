"""Budgets of an adapter: a number of trainable parameters, a share of the model's parameters, or memory in training.
The costs of an adapter are computed before training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

import peftcore
from peftcore.author.formats import host_map
from peftcore.errors import BadInput, PeftcoreError
from peftcore.injection.applying import install, plan_of, record
from peftcore.injection.request import Request
from peftcore.models.activation_memory import ExampleBatch, Pretended
from peftcore.models.costs import Memory, Passes, held
from peftcore.models.example_inputs import UnknownInputs
from peftcore.models.skeletons import emptied
from peftcore.utils.numbers import size
from peftcore.utils.quiet import quiet
from peftcore_lab.comparisons.comparison import Candidate
from peftcore_lab.tasks.task import Prepared
from peftcore_lab.training.task_rows import options_for, without_names

COUNT = re.compile(r"([0-9][0-9_,]*(?:\.[0-9]+)?)\s*([kKmMbB%]?)")
COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}
BYTES = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]?)(i?)[bB]")
POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
LOOKED_AT = 16
"""Number of batches among which the largest is used for the estimate."""


def values(text: str | int, total: int) -> int:
    """Parse a number of trainable parameters: ``50k``, ``1.5M``, ``20000``, or a share of the model's parameters:
    ``0.5%``.

    Raises:
        BadInput: the text is neither a number nor a share.
    """
    found = COUNT.fullmatch(str(text).strip())
    if found is None:
        raise BadInput(f"budget={text}: write a number of trainable parameters, such as 50k or 1.5M, or a share: 0.5%")
    number, unit = float(found[1].replace(",", "").replace("_", "")), found[2].lower()
    return int(total * number / 100) if unit == "%" else int(number * COUNTS[unit])


def memory(text: str | int) -> int:
    """Parse a number of bytes: ``2GB``, ``500 MB``, ``1.5GiB``.

    Raises:
        BadInput: the text is not a size.
    """
    found = BYTES.fullmatch(str(text).strip())
    if found is None:
        raise BadInput(f"memory={text}: write a size, such as 500MB or 2GB")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** POWERS[found[2].lower()])


@dataclass(frozen=True)
class CandidateCosts:
    """The numbers of trainable parameters and of bytes that training a candidate needs."""

    trainable: int
    """Number of trainable parameters, including those of a new head, as in ``peftcore compare``."""
    memory: int | None = None
    """Memory of a step in bytes, as estimated by ``peftcore plan``; None if the search does not limit it."""


@dataclass(frozen=True)
class Budget:
    """The limits of a search; None means unlimited."""

    trainable: int | None
    memory: int | None

    def over(self, needs: CandidateCosts) -> str | None:
        """Return why a candidate is over the budget; None if it fits."""
        if self.trainable is not None and needs.trainable > self.trainable:
            return f"{needs.trainable:,} trainable parameters, the budget is {self.trainable:,}"
        if self.memory is not None and needs.memory is not None and needs.memory > self.memory:
            return f"{size(needs.memory)} of memory, the budget is {size(self.memory)}"
        return None

    def excess(self, needs: CandidateCosts) -> float:
        """Return the largest relative excess over a limit. Above 0 the candidate does not fit; a smaller excess is
        nearer to the budget."""
        limits = ((needs.trainable, self.trainable), (needs.memory, self.memory))
        return max((need / limit - 1 for need, limit in limits if need is not None and limit is not None), default=-1.0)


class Planner:
    """Computes the costs of candidates on a model without weights, from shapes only.

    Args:
        prepared: the model and its examples; the model loses its weights.
        batch_size: examples in a step.
        with_memory: whether memory is computed too. This needs a run without values for each candidate.
    """

    def __init__(self, prepared: Prepared, batch_size: int, with_memory: bool) -> None:
        rows = DataLoader(prepared.train, batch_size=batch_size, collate_fn=without_names(prepared))
        # What trains beside each candidate.
        plans = (peftcore.plan(each.part, each.method, **each.options) for each in prepared.beside)
        self._beside = sum(plan.trainable for plan in plans)
        self._whole = emptied(prepared.model)
        self.model = self._whole if prepared.adapted is None else emptied(prepared.adapted)
        self.head, self.floor, self.tasks = prepared.head, prepared.floor, prepared.tasks
        self.train_size, self.held_out_size = len(prepared.train), len(prepared.held_out)
        self._weights = held((*self._whole.parameters(), *self._whole.buffers()))
        self._batch = largest(list(islice(rows, LOOKED_AT))) if with_memory else None
        self._known: dict[str, CandidateCosts] = {}
        self.host = host_map(self.model)

    @property
    def total(self) -> int:
        """Return the number of parameters of the model."""
        return sum(each.numel() for each in self._whole.parameters())

    def layered(self, method: str) -> bool:
        """Return whether a method acts in more than one layer by default, so that its depth can be chosen."""
        try:
            with quiet():
                surgeon = record(self._request(Candidate(name=method)), dry=True)
        except PeftcoreError:
            return False
        blocks = {entry.block for entry in self.host.entries if entry.block is not None}
        paths = [f"{graft.site.path}." for graft in surgeon.grafts]
        return sum(any(path.startswith(f"{block}.") for path in paths) for block in blocks) > 1

    def needs(self, candidate: Candidate) -> CandidateCosts:
        """Return the costs of one candidate.

        Raises:
            PeftcoreError: the method cannot be used with these options on this model.
        """
        key = f"{candidate.name} {sorted(candidate.arguments.items())}"
        if key not in self._known:
            with quiet():
                self._known[key] = self._planned(candidate)
        return self._known[key]

    def _request(self, candidate: Candidate) -> Request:
        arguments = options_for(candidate, self.tasks)
        train = (*self.head, *arguments.pop("train", ()))
        where = {"target": arguments.pop("target", None), "exclude": arguments.pop("exclude", None), "train": train}
        return Request.of(self.model, candidate.name, arguments, name="planned", seed=0, **where)

    def _planned(self, candidate: Candidate) -> CandidateCosts:
        request = self._request(candidate)
        surgeon = record(request, dry=True)
        trainable = plan_of(surgeon).trainable + self._beside
        if self._batch is None:
            return CandidateCosts(trainable)
        injection = install(surgeon, request)
        try:
            trained = [each for each in self.model.parameters() if each.requires_grad]
            told: dict[str, Any] = {"task": self.tasks[0]} if self.tasks else {}
            with peftcore.call(self.model, **told):
                kept = Pretended().kept(self._whole, self._batch)
        except UnknownInputs as error:
            raise BadInput(f"cannot estimate the memory of {candidate.name}: {error}; remove memory") from None
        finally:
            injection.remove()
        needed = Memory.of(self._weights, held(trained), trained, Passes(kept)).total
        return CandidateCosts(trainable, needed)


def largest(batches: list[dict[str, Any]]) -> ExampleBatch:
    """Return the batch with most values."""
    sizes = [sum(each.numel() for each in batch.values()) for batch in batches]
    return ExampleBatch(dict(batches[sizes.index(max(sizes))]), True)
