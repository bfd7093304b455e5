"""Checkpoints of members: whose a folder is, what goes on from one, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fleet_toys import SGD, alone, applied, expect_same, llama, next_token, texts
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau

import peftcore
from peftcore.errors import CheckpointError, TrainingError
from peftcore.fleets import adapter_checkpoints
from peftcore.training import Fleet, Member


def begun(folder: Path | None, name: str = "a", fleet: Fleet | None = None, rate: float = 0.1, **how: Any) -> Fleet:
    """A fleet that an adapter has joined."""
    fleet = Fleet(llama()) if fleet is None else fleet
    injection = applied(fleet.model, how.pop("method", "lora"), name, **how.pop("options", {}))
    optimizer = injection.optimizer(how.pop("cls", torch.optim.SGD), lr=rate, total_steps=how.get("steps", 4))
    schedule = how.pop("schedule", None)
    fleet.join(
        injection,
        how.pop("data", None) or texts(1),
        **{"loss": next_token, "steps": 4, "folder": folder, **how},
        optimizer=optimizer,
        schedule=None if schedule is None else schedule(optimizer),
    )
    return fleet


def values(member: Member) -> list[torch.Tensor]:
    return [each.detach().clone() for each in member.injection.parameters()]


def loop(steps: int, rate: float = 0.1, schedule: Any = None) -> tuple[peftcore.Injection, list[float]]:
    """The same adapter in a plain loop."""
    model = llama()
    injection = applied(model, "lora", "a")
    optimizer = torch.optim.SGD(injection.parameters(), lr=rate)
    made = None if schedule is None else schedule(optimizer)
    return injection, alone(model, injection, texts(1), optimizer, made, steps=steps)


@pytest.mark.parametrize("other", ["", "..", "x/.."])
def test_two_members_have_two_folders(tmp_path: Path, other: str) -> None:
    """However the path is spelled."""
    place = tmp_path / "fleet"
    fleet = begun(place)
    spelled = {"": place, "..": place / ".." / "fleet", "x/..": place / "x" / ".."}[other]
    for resume in (False, True):
        name = f"b{resume}"
        with pytest.raises(TrainingError, match=rf"'a' has its checkpoints in .*folder=.*{name}"):
            begun(spelled, name, fleet, resume=resume)
    assert [*fleet.members] == ["a"]
    begun(place / "b", "b", fleet)
    fleet.run()
    assert adapter_checkpoints.newest(place) == place / "step-00000004" == fleet.members["a"].folder / "step-00000004"  # type: ignore[operator]
    assert adapter_checkpoints.newest(place / "b") is not None


def test_two_fleets_have_two_folders(tmp_path: Path) -> None:
    """Also where neither has written a checkpoint; and the one that goes on has the folder."""
    one = begun(tmp_path, save_every=2)
    with pytest.raises(TrainingError, match="belongs to an earlier training"):
        begun(tmp_path)
    two = begun(tmp_path, resume=True)
    one.step()
    with pytest.raises(TrainingError, match="one that still runs"):
        one.step()
    assert one.members["a"].step == 2 and adapter_checkpoints.newest(tmp_path) is None  # nothing of it is lost
    assert one.members["a"].save(tmp_path / "elsewhere").exists()
    two.run()
    held = adapter_checkpoints.newest(tmp_path)
    with pytest.raises(TrainingError, match="pass another folder"):
        one.members["a"].save()
    with pytest.raises(TrainingError, match="pass another folder"):
        begun(tmp_path / "free").members["a"].save(tmp_path)
    assert adapter_checkpoints.newest(tmp_path) == held


def test_saving_again_at_one_step_writes_what_there_is_now(tmp_path: Path) -> None:
    member = begun(tmp_path).members["a"]
    member.save()
    with torch.no_grad():
        next(member.injection.parameters()).fill_(3.0)
    loaded = peftcore.load(llama(), member.save())
    assert next(loaded.parameters()).unique().item() == 3.0


@pytest.mark.parametrize("schedule", [None, lambda it: LambdaLR(it, lambda n: 1 / (1 + n))])
def test_a_member_that_had_ended_goes_on_for_more_steps(tmp_path: Path, schedule: Any) -> None:
    begun(tmp_path, schedule=schedule).run()
    again = begun(tmp_path, steps=7, schedule=schedule, resume=True)
    assert again.members["a"].step == 4 and not again.members["a"].done
    again.run()
    injection, losses = loop(7, schedule=schedule)
    expect_same(again.members["a"], injection, losses, SGD)
    assert adapter_checkpoints.newest(tmp_path) == tmp_path / "step-00000007"
    fewer = begun(tmp_path, steps=5, schedule=schedule, resume=True)
    assert fewer.members["a"].ended == "all steps are taken" and fewer.step() == []


def test_a_member_that_left_goes_on(tmp_path: Path) -> None:
    fleet = begun(tmp_path)
    fleet.step()
    fleet.leave("a").save()
    again = begun(tmp_path, resume=True)
    again.run()
    expect_same(again.members["a"], *loop(4), SGD)


def test_a_member_whose_loss_was_no_number_goes_on_with_the_batch_that_failed(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(output: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return next_token(output, batch) * (math.nan if len(calls) == 3 else 1.0)

    fleet = begun(tmp_path, loss=loss)
    fleet.run()
    assert fleet.members["a"].failed and adapter_checkpoints.newest(tmp_path) == tmp_path / "step-00000002"
    again = begun(tmp_path, resume=True)
    assert not again.members["a"].failed
    again.run()
    expect_same(again.members["a"], *loop(4), SGD)


def test_a_member_of_one_epoch_is_saved_at_its_end_and_goes_on(tmp_path: Path) -> None:
    begun(tmp_path, steps=None).run()
    assert adapter_checkpoints.newest(tmp_path) == tmp_path / "step-00000003"
    same = begun(tmp_path, steps=None, resume=True)
    same.run()
    assert (same.members["a"].step, same.members["a"].ended) == (3, "its epoch is over")
    more = begun(tmp_path, steps=5, resume=True)
    more.run()
    expect_same(more.members["a"], *loop(5), SGD)


def test_a_member_that_was_stopped_goes_on_unless_it_is_stopped_again(tmp_path: Path) -> None:
    begun(tmp_path, stop=lambda member: member.step >= 2).run()
    assert begun(tmp_path, stop=lambda member: member.step >= 2, resume=True).members["a"].ended == "stopped early"
    again = begun(tmp_path, resume=True)
    again.run()
    expect_same(again.members["a"], *loop(4), SGD)


@pytest.mark.parametrize("kind", ["rate", "length", "plateau", "none"])
def test_options_of_the_optimizer_and_the_schedule_are_those_of_now(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A schedule of another length stands where it would stand after as many steps."""
    then: Any = {"length": lambda it: CosineAnnealingLR(it, 4), "none": ReduceLROnPlateau}
    now: Any = {"length": lambda it: CosineAnnealingLR(it, 9), "plateau": ReduceLROnPlateau}
    rate = 0.02 if kind == "rate" else 0.1
    begun(tmp_path, schedule=then.get(kind)).run()
    again = begun(tmp_path, rate=rate, steps=9, schedule=now.get(kind), resume=True).members["a"]
    assert "goes on with other options" in caplog.text
    expected = {"length": 0.05 * (1 + math.cos(math.pi * 4 / 9))}.get(kind, rate)
    assert again.optimizer.param_groups[0]["lr"] == pytest.approx(expected)
    before = values(again)
    assert not all(map(torch.equal, before, values(begun(None).members["a"])))  # those of the checkpoint


def test_a_schedule_that_is_too_short_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    begun(tmp_path).run()
    fleet = Fleet(llama())
    with pytest.raises(CheckpointError, match="cannot be advanced through the 4 steps"):
        begun(tmp_path, "a", fleet, schedule=lambda it: OneCycleLR(it, 0.1, total_steps=3), resume=True)
    injection = peftcore.injections(fleet.model)["a"]
    assert all(map(torch.equal, injection.parameters(), begun(None).members["a"].injection.parameters()))
    assert not fleet.members


def changed_base() -> nn.Module:
    model = llama()
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"options": {"alpha": 99}}, "alpha was 8.0 and is 99.0"),
        ({"options": {"dropout": 0.5}}, "dropout was 0.0 and is 0.5"),
        ({"options": {"rank": 3}}, "rank was 8 and is 3"),
        ({"options": {"target": "q_proj"}}, "target modules: 2 are missing, such as model.layers.0.self_attn.v_proj"),
        ({"method": "dora"}, "method was 'lora' and is 'dora'"),
        ({"seed": 5}, "seed was 0 and is 5"),
        ({"cls": torch.optim.AdamW}, "optimizer was"),
        ({"base": True}, "the weights of the base have other values"),
    ],
    ids=str,
)
def test_another_training_is_refused_and_what_differs_is_named(tmp_path: Path, how: dict[str, Any], words: str) -> None:
    begun(tmp_path).run()
    owner = (tmp_path / adapter_checkpoints.OWNER).read_bytes()
    fleet = Fleet(changed_base() if how.pop("base", False) else llama())
    with pytest.raises(CheckpointError, match=rf"{words}.*trainable=True"):
        begun(tmp_path, "a", fleet, steps=8, resume=True, **how)
    assert not fleet.members and (tmp_path / adapter_checkpoints.OWNER).read_bytes() == owner
    begun(tmp_path, steps=8, resume=True).run()  # it is still there


def test_a_method_with_a_schedule_over_all_steps_does_not_get_longer(tmp_path: Path) -> None:
    begun(tmp_path, method="adalora").run()
    with pytest.raises(CheckpointError, match="steps of the method's schedule was 4 and is 8"):
        begun(tmp_path, method="adalora", steps=8, resume=True)


def test_a_checkpoint_of_an_older_version_is_refused_with_a_way_on(tmp_path: Path) -> None:
    begun(tmp_path).run()
    (place,) = tmp_path.glob("step-*")
    text = (place / adapter_checkpoints.STATE).read_text(encoding="utf-8")
    (place / adapter_checkpoints.STATE).write_text(text.replace('["version", 2]', '["version", 1]'), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"peftcore\.load\(model, .*step-00000004"):
        begun(tmp_path, resume=True)
