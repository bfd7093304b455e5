"""Steps of members are taken whole or not at all, and what cannot take one is refused before it joins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_toys import ADAMW, SGD, alone, applied, expect_same, llama, next_token, texts
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

import peftcore
from peftcore.errors import TrainingError
from peftcore.training import Fleet, Member


class Raises(Exception):
    pass


class Breaking:
    """What raises at one of its calls, after the values have moved."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, *args: Any) -> None:
        self.left -= 1
        if self.left == 0:
            raise Raises("broken")


def seed_of(name: str) -> int:
    return sum(map(ord, name))


def join(fleet: Fleet, name: str, method: Any = "lora", cls: Any = torch.optim.AdamW, **how: Any) -> Member:
    injection = applied(fleet.model, method, name, seed_of(name))
    optimizer = injection.optimizer(cls, lr=1e-2, total_steps=6)
    schedule = how.pop("schedule", None)
    return fleet.join(
        injection,
        texts(seed_of(name)),
        optimizer=optimizer,
        schedule=None if schedule is None else schedule(optimizer),
        **{"loss": next_token, "steps": 6, **how},
    )


def expect(member: Member, method: Any = "lora", cls: Any = torch.optim.AdamW, tolerance: float = ADAMW) -> None:
    model = llama()
    injection = applied(model, method, member.name, seed_of(member.name))
    optimizer = injection.optimizer(cls, lr=1e-2, total_steps=6)
    expect_same(member, injection, alone(model, injection, texts(seed_of(member.name)), optimizer, steps=6), tolerance)


def optimizer_that(breaking: Breaking, base: type[torch.optim.Optimizer]) -> Any:
    class Breaks(base):  # type: ignore[misc,valid-type]
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            breaking()

    return Breaks


class Scheduled(LRScheduler):
    """A schedule of a user's own that raises after it has moved."""

    breaking: Breaking

    def get_lr(self) -> Any:
        return [group["lr"] * 0.5 for group in self.optimizer.param_groups]

    def step(self, epoch: int | None = None) -> None:
        super().step(epoch)
        if self.last_epoch > 0:
            self.breaking()


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("names", ["abc", "cab"])
@pytest.mark.parametrize("kind", ["sgd", "adamw", "rule"])
def test_an_optimizer_that_raises_takes_no_step_and_others_take_theirs(kind: str, names: str, at: int) -> None:
    """Whoever comes first, also with a rule for gradients, and with what an optimizer remembers."""
    method = "galore" if kind == "rule" else "lora"
    base = torch.optim.SGD if kind == "sgd" else torch.optim.AdamW
    tolerance = SGD if kind == "sgd" else ADAMW
    fleet = Fleet(llama())
    members = {
        name: join(fleet, name, method, optimizer_that(Breaking(at), base) if name == "b" else base) for name in names
    }
    for _ in range(at - 1):
        fleet.step()
    before = {key: each.clone() for key, each in members["b"].injection.state_dict().items()}
    with pytest.raises(Raises) as raised:
        fleet.step()
    assert f"in step {at} of 'b'" in raised.value.__notes__[0]
    after = members["b"].injection.state_dict()
    assert all(torch.equal(each, before[key]) for key, each in after.items())
    assert {name: each.step for name, each in members.items()} == {"a": at, "b": at - 1, "c": at}
    assert all(each.grad is None for each in fleet.model.parameters())
    fleet.run()
    for member in members.values():
        expect(member, method, base, tolerance)


@pytest.mark.parametrize("at", [1, 3])
def test_a_schedule_that_raises_takes_its_optimizers_step_back(at: int) -> None:
    fleet = Fleet(llama())

    def broken(optimizer: Any) -> Any:
        found = Scheduled(optimizer)
        found.breaking = Breaking(at)
        return found

    one, two = join(fleet, "a", schedule=broken), join(fleet, "b")
    for _ in range(at - 1):
        fleet.step()
    rates, before = one.optimizer.param_groups[0]["lr"], [each.clone() for each in one.injection.parameters()]
    with pytest.raises(Raises):
        fleet.step()
    assert one.optimizer.param_groups[0]["lr"] == rates and (one.step, two.step) == (at - 1, at)
    assert all(map(torch.equal, before, one.injection.parameters()))
    fleet.run()
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.5**7)  # one when it is made
    expect(two)


def test_a_method_whose_step_raises_takes_the_optimizers_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for plain in (False, True):
        fleet = Fleet(llama())
        injection = applied(fleet.model, "adalora", "a", 97)
        made = torch.optim.AdamW(injection.parameters(), lr=1e-2)
        optimizer = made if plain else injection.optimizer(torch.optim.AdamW, lr=1e-2)
        member = fleet.join(injection, texts(97), loss=next_token, optimizer=optimizer, steps=6)
        fleet.step()
        before = {key: each.clone() for key, each in injection.state_dict().items()}
        with monkeypatch.context() as patch, pytest.raises(Raises):
            patch.setattr(type(injection.method), "on_step", Breaking(1))
            fleet.step()
        assert all(torch.equal(each, before[key]) for key, each in injection.state_dict().items())
        fleet.run()
        expect(member, "adalora")


@pytest.mark.parametrize("which", ["stop", "save"])
def test_what_raises_after_a_step_leaves_it_taken(which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, or `stop`: no batch is trained on twice, and other members are asked and saved all the same."""
    fleet = Fleet(llama())
    breaking: Callable[..., Any] = Breaking(2)
    one = join(fleet, "a", folder=tmp_path / "a", save_every=2, stop=breaking if which == "stop" else None)
    two = join(fleet, "b", folder=tmp_path / "b", save_every=2)
    fleet.step()
    with monkeypatch.context() as patch, pytest.raises(Raises) as raised:
        if which == "save":
            patch.setattr(one, "save", Breaking(1))
        fleet.step()
    assert "after step 2 of 'a', which was taken" in raised.value.__notes__[0]
    assert (one.step, two.step) == (2, 2) and [*(tmp_path / "b").glob("step-00000002")]
    assert bool([*(tmp_path / "a").glob("step-00000002")]) == (which == "stop")
    fleet.run()
    for member in (one, two):
        expect(member)


def test_what_raised_after_a_step_is_tried_again_before_the_next(tmp_path: Path) -> None:
    fleet, breaking = Fleet(llama()), Breaking(2)

    def stop(member: Member) -> bool:
        breaking()
        return member.step == 2

    one = join(fleet, "a", folder=tmp_path / "a", stop=stop)
    two = join(fleet, "b", folder=tmp_path / "b", save_every=2)
    fleet.step()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two, "save", Breaking(1))
        with pytest.raises(Raises):
            fleet.step()
        patch.setattr(two, "save", Breaking(1))
        with pytest.raises(Raises):
            fleet.step()
    assert (one.step, one.ended, two.step) == (2, "stopped early", 2)
    assert [*(tmp_path / "a").glob("step-00000002")] and not [*(tmp_path / "b").glob("step-*")]
    assert fleet.step() == [two] and [*(tmp_path / "b").glob("step-00000002")]
    assert (one.step, two.step) == (2, 3)


def test_what_needs_more_than_gradients_is_refused_before_it_joins() -> None:
    fleet = Fleet(llama())
    with pytest.raises(TrainingError, match=r"LBFGS of 'a' computes the loss several times.*AdamW"):
        join(fleet, "a", cls=torch.optim.LBFGS)

    class Told(LambdaLR):
        def step(self, progress: float) -> None:  # type: ignore[override]
            raise AssertionError

    Told._initial_step = lambda self: None  # type: ignore[method-assign]
    with pytest.raises(TrainingError, match=r"Told\.step of 'b' needs arguments.*default"):
        join(fleet, "b", schedule=lambda it: Told(it, lambda n: 1.0))
    other = torch.optim.SGD(fleet.model.parameters(), lr=1.0)
    with pytest.raises(TrainingError, match="learning rates of another optimizer"):
        join(fleet, "c", schedule=lambda it: LambdaLR(other, lambda n: 1.0))
    assert not fleet.members


SHORT = {
    "adalora": ({"warmup": 2}, "leave none of the 2 steps"),
    "adamss": ({"target_subspaces": 2, "warmup": 1, "until": 3}, "until=3 is not reached in 2 steps"),
}


@pytest.mark.parametrize("own", [True, False], ids=["the method's optimizer", "torch's"])
@pytest.mark.parametrize("method", SHORT)
def test_a_schedule_that_needs_more_steps_is_refused_before_it_joins(method: str, own: bool) -> None:
    """With the default options of neither a test would see it: no step is too few for them."""
    options, why = SHORT[method]
    fleet = Fleet(llama())
    join(fleet, "a")
    injection = peftcore.apply(fleet.model, method, name="b", **options)
    optimizer = (injection.optimizer if own else lambda cls, lr: cls(injection.parameters(), lr=lr))(
        torch.optim.SGD, lr=0.1
    )
    with pytest.raises(TrainingError, match=why):
        fleet.join(injection, texts(1), optimizer=optimizer, loss=next_token, steps=2)
    assert [*fleet.members] == ["a"] and getattr(optimizer, "total_steps", None) is None
    assert fleet.join(injection, texts(1), optimizer=optimizer, loss=next_token, steps=4).steps == 4
    with pytest.raises(TrainingError, match=why):
        injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=2)


def test_a_plateau_is_told_the_loss_and_chains_work() -> None:
    fleet = Fleet(llama())
    one = join(fleet, "a", schedule=lambda it: ReduceLROnPlateau(it, patience=0, threshold=10.0, threshold_mode="abs"))
    two = join(fleet, "b", schedule=lambda it: SequentialLR(
        it, [LambdaLR(it, lambda n: 1.0), LambdaLR(it, lambda n: 0.1)], [3]))  # fmt: skip
    fleet.run()
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**5)  # no loss is better by 10 than the first
    assert one.schedule.best == one.losses[0]  # type: ignore[union-attr]
    assert two.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


def test_a_member_that_was_frozen_takes_no_steps() -> None:
    fleet = Fleet(llama())
    one, two = join(fleet, "a"), join(fleet, "b")
    fleet.step()
    one.injection.trainable(False)
    with pytest.raises(TrainingError, match=r"'a' was frozen after it joined.*leave\('a'\)"):
        fleet.step()
    assert (one.step, two.step) == (1, 1)
    one.injection.trainable(True)
    fleet.run()
    for member in (one, two):
        expect(member)
    peftcore.activate(fleet.model)


@pytest.mark.parametrize("how", ["merge", "remove"])
def test_a_member_that_is_merged_or_removed_takes_no_steps(how: str) -> None:
    fleet = Fleet(llama())
    one, two = join(fleet, "a"), join(fleet, "b")
    fleet.step()
    getattr(one.injection, how)()
    with pytest.raises(peftcore.errors.PeftcoreError, match="'a'"):
        fleet.step()
    assert (one.step, two.step) == (1, 1)
    fleet.leave("a")
    if how == "merge":
        one.injection.unmerge()
    fleet.run()
    expect(two)
