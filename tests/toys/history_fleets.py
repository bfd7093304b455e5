"""Random fleets: members join, train, leave, are saved and resumed, and after each step each of them has the values and
the losses that it comes to when it trains by itself, in a plain loop on a model of its own."""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from fleet_toys import VOCABULARY, llama, next_token
from history_world import Wrong, case_of, snapshot
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

import peftcore
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.testing import NotApplicable
from peftcore.testing.hosts import APART, MLP, stir
from peftcore.testing.kit import fill
from peftcore.training import Fleet, Member

CLOSE = 1e-8
"""How far values and losses may be apart: all is float64, and optimizers divide by gradients."""
NAMES = ("a", "b", "c", "d")
WITH_LOSSES = (
    "loramoe",
    "pvera",
    "shadow",
    "moelora",
    "molora_moe",
    "mole",
    "moa_adapters",
    "monteclora",
    "polytropon",
)
"""Methods that add losses or keep counts of their own; drawn more often."""
WEIGHT = 0.5
"""The weight of each loss of a method's own; many have none by default, or one so small that nothing would show."""
METHODS = sorted(each.name for each in peftcore.methods() if each.tags.per_row)
OPTIMIZERS = {"sgd": (torch.optim.SGD, 0.1), "adamw": (torch.optim.AdamW, 1e-2), "lbfgs": (torch.optim.LBFGS, 0.1)}
Batch = Mapping[str, Tensor]


class Prototypes(nn.Module):
    """Says how near a token is to each of some points, which it returns too: a tensor without rows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = MLP()
        self.points = nn.Parameter(torch.randn(3, 5), requires_grad=False)

    def forward(self, x: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """The mask says which tokens are padding; methods that compute something of all tokens read it."""
        return {"found": self.body(x), "points": self.points}


@dataclass(frozen=True)
class Base:
    """A model that fleets share, its batches, and the loss over one of them."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], dict[str, Tensor]]
    """From how many rows, of what length."""
    loss: Callable[[Any, Batch], Tensor]
    pad: dict[str, float]


def _texts(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def _clip() -> nn.Module:
    model: Any = APART["clip"].build()[0]
    model.config.text_config.max_position_embeddings = 32  # prefixes take some
    return stir(type(model)(model.config)).double().eval()


def _pairs(rows: int, length: int) -> dict[str, Tensor]:
    length += length >= 5  # pictures have 5 tokens, and what has as many as the mask is taken for text
    ids = torch.randint(3, 39, (rows, length))
    ids[:, -1] = 39  # the largest token ends a text
    images = torch.randn(rows, 1, 8, 8).double()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images}


def _contrast(output: Any, batch: Batch) -> Tensor:
    right = torch.arange(len(batch["input_ids"]))
    return F.cross_entropy(output["logits_per_text"], right) + F.cross_entropy(output["logits_per_image"], right)


def _vectors(rows: int, length: int) -> dict[str, Tensor]:
    labels = torch.randint(0, 3, (rows, length))
    return {"x": torch.randn(rows, length, 12).double(), "attention_mask": torch.ones_like(labels), "labels": labels}


def _nearest(output: Any, batch: Batch) -> Tensor:
    scores = output["found"] @ output["points"].T
    return F.cross_entropy(scores.flatten(0, 1), batch["labels"].flatten())


BASES = {
    "llama": Base(llama, _texts, next_token, {"input_ids": 0, "attention_mask": 0, "labels": -100}),
    "clip": Base(_clip, _pairs, _contrast, {"input_ids": 0, "attention_mask": 0}),
    "prototypes": Base(
        lambda: Prototypes().double(), _vectors, _nearest, {"x": 0.0, "attention_mask": 0, "labels": -100}
    ),
}


def seeded(seed: int, build: Callable[[], Any]) -> Any:
    """What a function returns that draws from torch's global generator, which goes on where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


@dataclass(frozen=True)
class How:
    """How an adapter trains: enough to do it again."""

    method: str
    seed: int = 0
    rows: int = 2
    length: int = 5
    batches: int = 2
    kind: str = "adamw"
    schedule: str | None = None
    accumulate: int = 1
    clip: float | None = None
    steps: int = 4
    dropout: float = 0.0
    folder: str | None = None
    save_every: int | None = None
    broken_at: int | None = None
    """The step whose loss is no number."""
    stops_at: int | None = None

    def __repr__(self) -> str:
        given = [each for each in fields(self) if getattr(self, each.name) != each.default]
        return f"How({', '.join(f'{each.name}={getattr(self, each.name)!r}' for each in given)})"


HOWS = st.builds(
    How,
    method=st.sampled_from([*METHODS, *WITH_LOSSES, *WITH_LOSSES, *WITH_LOSSES]),
    seed=st.integers(0, 3),
    rows=st.integers(1, 3),
    length=st.integers(2, 7),
    batches=st.integers(1, 3),
    kind=st.sampled_from(["adamw", "sgd", "adamw", "sgd", "lbfgs"]),
    schedule=st.sampled_from([None, None, "cosine", "lambda", "plateau"]),
    accumulate=st.integers(1, 3),
    clip=st.sampled_from([None, 0.05]),
    steps=st.integers(1, 6),
    dropout=st.sampled_from([0.0, 0.3]),
    folder=st.sampled_from([None, "own", "shared"]),
    save_every=st.sampled_from([None, 1, 2]),
    broken_at=st.sampled_from([None, None, None, 2, 3]),
    stops_at=st.sampled_from([None, None, None, 1, 2]),
)


TAKEN = {"loss": "none", "data": "none", "optimizer": "others", "schedule": "others", "stop": "all"}
"""Who has taken the step in which something of one member raises."""


class Tripped(Exception):
    """Raised once, where a history says so."""


class Trip:
    """Lets something raise once."""

    def __init__(self) -> None:
        self.armed: tuple[str, str] | None = None

    def __call__(self, name: str, where: str) -> None:
        if self.armed == (name, where):
            self.armed = None
            raise Tripped(f"{where} of {name!r}")


def never(name: str, where: str) -> None:
    """Trips nobody."""


class Data:
    """Batches of one adapter, which may raise once in the middle."""

    def __init__(self, base: Base, how: How, trip: Callable[[], None] = lambda: None) -> None:
        self.batches = seeded(how.seed, lambda: [base.batch(how.rows, how.length) for _ in range(how.batches)])
        self.trip = trip

    def __iter__(self) -> Iterator[Batch]:
        return Turns(self)


class Turns:
    """One epoch of data. What raises has taken nothing."""

    def __init__(self, data: Data) -> None:
        self.data, self.turn = data, 0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self.data.trip()
        if self.turn == len(self.data.batches):
            raise StopIteration
        self.turn += 1
        return self.data.batches[self.turn - 1]


def applied(base: Base, model: nn.Module, name: str, how: How, **changes: Any) -> peftcore.Injection:
    """The adapter on a model, away from its start.

    Raises:
        PeftcoreError, NotApplicable: the method does not go here.
    """
    case = case_of(how.method, "llama")
    if case.context is not None or case.looks_at_data:
        raise NotApplicable("a call of a fleet tells nothing, and its start is made of no data")
    known = case.method.Config.model_fields
    weights = [each for each, field in known.items() if "loss" in (field.description or "")]
    options = {"dtype": torch.float64, "seed": how.seed, **case.settings, **changes}
    options |= {each: WEIGHT for each in weights if isinstance(known[each].default, float)}
    if how.dropout and "dropout" in known:
        options["dropout"] = how.dropout
    with peftcore.activate(model):  # it starts from the base alone
        if isinstance(model, Prototypes):
            options["target"] = ["first", "second"]
        injection = peftcore.apply(model, how.method, name=name, **options)
    fill(injection, how.seed + 1)
    return injection


def with_optimizer(injection: peftcore.Injection, how: How, trip: Callable[[str, str], None] = never) -> Any:
    """The adapter's optimizer and schedule."""
    cls, rate = OPTIMIZERS[how.kind]

    @functools.wraps(cls.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        trip(injection.name, "optimizer")
        return cls.step(self, *args, **kwargs)

    def factor(epoch: int) -> float:
        trip(injection.name, "schedule")
        return 1 / (epoch + 1)

    try:
        optimizer = injection.optimizer(type(cls.__name__, (cls,), {"step": step}), lr=rate, total_steps=how.steps)
    except ValueError as error:  # torch's own, of LBFGS where a method has rates of its own
        raise NotApplicable(str(error)) from None
    if how.schedule == "cosine":
        return optimizer, CosineAnnealingLR(optimizer, 10)
    if how.schedule == "lambda":
        return optimizer, LambdaLR(optimizer, factor)
    if how.schedule == "plateau":
        return optimizer, ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    return optimizer, None


class Alone:
    """An adapter that trains by itself, on a model of its own, in a plain loop; where it draws random numbers in
    training, in a fleet of one, which draws by the same seed. Its steps are taken when somebody asks for them.

    Attributes:
        values: after each step, those of its start first.
        losses: of each step.
    """

    def __init__(self, base: Base, name: str, how: How) -> None:
        self.base, self.how = base, how
        self.model = seeded(0, base.build).train()
        self.injection = applied(base, self.model, name, how)
        self.optimizer, self.schedule = with_optimizer(self.injection, how)
        self.values, self.losses = [snapshot(self.injection.state_dict())], list[float]()
        self.data = Data(base, how)
        self.endless = itertools.cycle(self.data.batches)
        self.member = self._joined() if self._draws() else None

    def at(self, step: int) -> dict[str, Tensor]:
        """The values after a number of steps."""
        while len(self.losses) < step:
            self.losses.append(self._step() if self.member is None else self._step_of_one())
            self.values.append(snapshot(self.injection.state_dict()))
        return self.values[step]

    def _draws(self) -> bool:
        with torch.random.fork_rng(devices=[]):
            before = torch.get_rng_state()
            self._forward(copy.deepcopy(self.model), self.data.batches[0])
            return not torch.equal(before, torch.get_rng_state())

    def _forward(self, model: nn.Module, batch: Batch) -> Any:
        return model(**{key: value for key, value in batch.items() if key != "labels"})

    def _joined(self) -> Member:
        self.fleet = Fleet(self.model)
        return self.fleet.join(
            self.injection,
            self.data,
            optimizer=self.optimizer,
            loss=self.base.loss,
            schedule=self.schedule,
            steps=self.how.steps,
            clip=self.how.clip,
            accumulate=self.how.accumulate,
            seed=self.how.seed,
        )

    def _step_of_one(self) -> float:
        assert self.member is not None
        self.fleet.step()
        return self.member.losses[-1]

    def _step(self) -> float:
        parts = []
        for batch in itertools.islice(self.endless, self.how.accumulate):
            output = self._forward(self.model, batch)
            part = (self.base.loss(output, batch) + self.injection.losses()) / self.how.accumulate
            part.backward()
            parts.append(part.item())
        if self.how.clip is not None:
            torch.nn.utils.clip_grad_norm_([p for p in self.injection.parameters() if p.requires_grad], self.how.clip)
        self.optimizer.step()
        loss = sum(parts)
        if self.how.schedule == "plateau":
            self.schedule.step(loss)
        elif self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad()
        return loss


@dataclass
class Held:
    """What a member ought to be."""

    how: How
    alone: Alone
    step: int = 0
    saved: int | None = None
    """The step of its checkpoint."""
    failed: bool = False
    unasked: bool = False
    """Whether `stop` raised after its last step, so that it is asked again before the next one."""


class FleetWorld:
    """The fleet, and what its members ought to be."""

    def __init__(self, base: str) -> None:
        self.name, self.base = base, BASES[base]
        self.folder, self.trip = Path(tempfile.mkdtemp()), Trip()
        self.members = dict[str, Held]()
        self.gone = dict[str, Held]()
        self.raised = False
        """Whether the last step raised, after forwards."""
        self.begin()

    def begin(self) -> None:
        """A new process: the model as it was, without adapters, and an empty fleet."""
        self.model = seeded(0, self.base.build).train()
        self.fleet = Fleet(self.model, pad=self.base.pad)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def injection(self, name: str) -> peftcore.Injection:
        return peftcore.injections(self.model)[name]

    def join(self, name: str, how: How, saved: int | None = None, **changes: Any) -> bool:
        """Let an adapter join, from its checkpoint where it has one; False where that is refused."""
        try:
            injection = applied(self.base, self.model, name, how, **changes)
        except (PeftcoreError, NotApplicable):
            return False
        folder = how.folder and self.folder / (name if how.folder == "own" else "shared")

        def loss(output: Any, batch: Batch) -> Tensor:
            self.trip(name, "loss")
            found = self.base.loss(output, batch)
            return found * torch.nan if held.step + 1 == how.broken_at else found

        def stop(member: Member) -> bool:
            self.trip(name, "stop")
            return member.step == how.stops_at

        try:
            held = Held(how, Alone(self.base, name, how), saved or 0, saved)
            optimizer, schedule = with_optimizer(injection, how, self.trip)
            self.fleet.join(
                injection,
                Data(self.base, how, lambda: self.trip(name, "data")),
                optimizer=optimizer,
                loss=loss,
                schedule=schedule,
                steps=how.steps,
                clip=how.clip,
                accumulate=how.accumulate,
                seed=how.seed,
                stop=stop,
                folder=folder,
                save_every=how.save_every if folder else None,
                resume=saved is not None,
            )
        except NotApplicable:
            injection.remove()
            return False
        except PeftcoreError as error:
            injection.remove()
            if saved is not None and not changes and not self.shares(name):
                raise Wrong(f"{name!r} cannot be resumed: {error}; {self}") from error
            if changes and not isinstance(error, CheckpointError):
                raise Wrong(f"{name!r} with {changes} is refused as {error!r}; {self}") from error
            return False
        self.members[name] = held
        return True

    def shares(self, name: str) -> bool:
        """Whether another one was told the same folder."""
        everybody = {**self.members, **self.gone}
        return sum(each.how.folder == "shared" for each in everybody.values()) > 1

    def stepped(self, name: str) -> None:
        """Count a step of a member."""
        held = self.members[name]
        if held.step + 1 == held.how.broken_at:
            held.failed = True
            self.settled(held)
            return
        held.step += 1
        self.settled(held)

    def ask(self, *but: str) -> None:
        """Ask again, as a fleet does before a step, where `stop` raised after the last one."""
        for name, held in self.members.items():
            if held.unasked and name not in but:
                held.unasked = False
                self.settled(held)

    def settled(self, held: Held) -> None:
        """Count the checkpoint after a step, if there is one."""
        if held.how.folder and (self.done(held) or held.step % (held.how.save_every or 1_000_000) == 0):
            held.saved = held.step

    def done(self, held: Held) -> bool:
        stopped = held.step == held.how.stops_at and not held.unasked
        return held.failed or held.step >= held.how.steps or stopped

    @property
    def training(self) -> list[str]:
        """The members that still train."""
        return [name for name, held in self.members.items() if not self.done(held)]

    def step(self) -> None:
        """Take a step of all; where members do not go together, the last one leaves until they do."""
        while self.training:
            self.ask()
            due = self.training
            try:
                found = self.fleet.step()
            except PeftcoreError:
                self.check()
                self.leave(due[-1])
                continue
            if sorted(each.name for each in found) != sorted(due):
                raise Wrong(f"a step of {[each.name for each in found]} in place of {due}; {self}")
            for name in due:
                self.stepped(name)
            self.raised = False
            return

    def leave(self, name: str) -> Member:
        self.gone[name] = self.members.pop(name)
        return self.fleet.leave(name)

    def same(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
        """Compare values.

        Raises:
            Wrong: they differ.
        """
        if found.keys() != expected.keys():
            raise Wrong(f"{what}: other tensors, {sorted(found.keys() ^ expected.keys())}; {self}")
        gaps = {key: float((found[key].double() - each.double()).abs().max()) for key, each in expected.items()}
        scales = {key: max(1.0, float(each.abs().max())) for key, each in expected.items()}
        key, gap = max(((key, gap / scales[key]) for key, gap in gaps.items()), key=lambda each: each[1])
        if not gap <= CLOSE:
            raise Wrong(f"{what}: off by {gap:.2e} at {key}; {self}")

    def expected(self, name: str, held: Held) -> dict[str, Tensor]:
        """The values of a member; a buffer that its forward writes (`velora`) is already that of the next step where a
        step raised after the forward."""
        values, injection = held.alone.at(held.step), self.injection(name)
        if not self.raised or self.done(held):
            return values
        trained = {key for key, each in injection.state_dict().items() if isinstance(each, nn.Parameter)}
        found, later = injection.state_dict(), held.alone.at(held.step + 1)
        ahead = {key for key in found.keys() - trained if torch.allclose(found[key], later[key], CLOSE, CLOSE)}
        return {key: later[key] if key in ahead else value for key, value in values.items()}

    def check(self) -> None:
        """Compare each member, and those that left, with itself alone."""
        for name, held in self.members.items():
            member = self.fleet.members[name]
            if (member.step, member.done, member.failed) != (held.step, self.done(held), held.failed):
                raise Wrong(f"{member!r} is to have taken {held.step} of {held.how.steps} steps; {self}")
            self.same(self.injection(name).state_dict(), self.expected(name, held), f"values of {name!r}")
            pairs = [*zip(member.losses, held.alone.losses, strict=False)]
            if len(member.losses) != held.step or not all(abs(a - b) <= CLOSE * max(1, abs(b)) for a, b in pairs):
                raise Wrong(f"losses of {name!r}: {member.losses}, alone {held.alone.losses[: held.step]}; {self}")
        for name, held in self.gone.items():
            self.same(self.injection(name).state_dict(), self.expected(name, held), f"values of {name!r}, which left")

    def __repr__(self) -> str:
        return f"a fleet on {self.name} of { ({name: f'{h.how}, step {h.step}' for name, h in self.members.items()}) }"


names = st.sampled_from(NAMES)


class FleetHistory(RuleBasedStateMachine):
    """One random fleet."""

    world: FleetWorld

    @initialize(
        base=st.sampled_from(["llama", "llama", "clip", "prototypes"]), hows=st.lists(HOWS, min_size=2, max_size=4)
    )
    def begin(self, base: str, hows: list[How]) -> None:
        self.world = FleetWorld(base)
        for name, how in zip(NAMES, hows, strict=False):
            self.join(name, how)

    @rule(name=names, how=HOWS)
    def join(self, name: str, how: How) -> None:
        if name not in self.world.members and name not in self.world.gone:
            self.world.join(name, how)

    @rule(times=st.integers(1, 3))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.world.step()
            self.world.check()

    @rule(name=names, save=st.booleans())
    def leave(self, name: str, save: bool) -> None:
        world = self.world
        if name in world.members:
            member = world.leave(name)
            if save and member.folder is not None:
                member.save()
                world.gone[name].saved = world.gone[name].step

    @rule()
    def save(self) -> None:
        self.world.fleet.save()
        for held in self.world.members.values():
            if held.how.folder:
                held.saved = held.step

    @rule(name=names)
    def save_other_values(self, name: str) -> None:
        """As an EMA: a checkpoint of other values, and then one of those that train."""
        world = self.world
        if name not in world.members or not world.members[name].how.folder:
            return
        member, injection = world.fleet.members[name], world.injection(name)
        before = snapshot(injection.state_dict())
        for factor in (0.9, 1.0):
            with torch.no_grad():
                for key, value in injection.state_dict().items():
                    value.copy_(before[key] * factor if value.is_floating_point() else before[key])
            loaded = peftcore.load(seeded(0, world.base.build), member.save())
            world.same(loaded.state_dict(), injection.state_dict(), f"the checkpoint of {name!r}")
        world.members[name].saved = world.members[name].step

    @rule(name=names, where=st.sampled_from([*TAKEN]))
    def step_that_raises(self, name: str, where: str) -> None:
        """Something raises once: where it is a member's own optimizer or schedule, that member is as before the step
        and the others have taken theirs; where it is data or a loss, nobody has; where it is `stop`, everybody has.
        Then the step is run again."""
        world = self.world
        if name not in world.training:
            return
        world.trip.armed = name, where
        if where == "stop" and world.members[name].unasked:  # which is asked first
            with pytest.raises(Tripped):
                world.fleet.step()
            world.ask(name)
            return
        try:
            world.step()
        except Tripped:
            world.raised = True
            world.members[name].unasked = where == "stop"
            for each in world.training:
                if TAKEN[where] == "all" or (TAKEN[where] == "others" and each != name):
                    world.stepped(each)
        world.trip.armed = None

    @rule(name=names)
    def step_of_a_frozen_one(self, name: str) -> None:
        """It is refused, or the frozen one takes none."""
        world = self.world
        if name not in world.training:
            return
        world.ask()
        others = [each for each in world.training if each != name]
        world.injection(name).trainable(False)
        try:
            world.fleet.step()
        except PeftcoreError:
            others = []
        for each in others:
            world.stepped(each)
        world.check()
        world.injection(name).trainable(True)

    @rule(more=st.integers(0, 3), turned=st.booleans())
    def killed_and_resumed(self, more: int, turned: bool) -> None:
        """In a new process: each goes on from its checkpoint, those that ended too where they are to take more steps;
        those without one begin anew."""
        world = self.world
        before = {**world.gone, **world.members}
        world.members, world.gone = {}, {}
        world.begin()
        for name in [*before][:: -1 if turned else 1]:
            held = before[name]
            how = replace(held.how, steps=held.how.steps + more, broken_at=None, stops_at=None)
            saved = held.saved or 0
            if more:
                longer = Alone(world.base, name, how).at(saved)
                if any(not torch.equal(longer[key], value) for key, value in held.alone.at(saved).items()):
                    how = replace(how, steps=held.how.steps)  # what it did so far depends on how many steps there are
            world.join(name, how, held.saved)

    @rule(name=names)
    def resumed_with_other_options(self, name: str) -> None:
        world = self.world
        held = world.members.get(name)
        if held is None or held.saved is None:
            return
        if "alpha" not in case_of(held.how.method, "llama").method.Config.model_fields:
            return
        world.leave(name)
        world.injection(name).remove()
        del world.gone[name]
        if world.join(name, held.how, held.saved, alpha=99):
            raise Wrong(f"{name!r} goes on with alpha=99; {world}")
        world.join(name, replace(held.how, broken_at=None, stops_at=None), held.saved)

    @invariant()
    def each_is_as_alone(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.close()
