"""One adapter that trains in a fleet: clipping, and what it says of itself."""

import pytest
import torch
from fleet_toys import applied, llama, next_token, texts
from torch import nn

import peftcore
from peftcore.errors import TrainingError
from peftcore.fleets.member import Member, clip_gradients
from peftcore.training import Fleet


@pytest.mark.parametrize("largest", [0.1, 100.0])
def test_clipping_is_torchs(largest: float) -> None:
    torch.manual_seed(0)
    one = [
        nn.Parameter(torch.zeros(3, 2).double()),
        nn.Parameter(torch.zeros(4).double()),
        nn.Parameter(torch.zeros(1)),
    ]
    two = [nn.Parameter(each.detach().clone()) for each in one]
    for a, b in zip(one[:2], two[:2], strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norms = clip_gradients(one, largest), nn.utils.clip_grad_norm_(two, largest)
    torch.testing.assert_close(*norms, rtol=1e-15, atol=0)
    for a, b in zip(one[:2], two[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-14, atol=0)
    assert clip_gradients(one[2:], 1.0) == 0


def joined(**options: object) -> tuple[Fleet, Member]:
    model = llama()
    injection = applied(model, "lora", "a")
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3)
    fleet = Fleet(model)
    return fleet, fleet.join("a", texts(1), loss=next_token, optimizer=optimizer, **options)  # type: ignore[arg-type]


def test_it_says_where_it_is() -> None:
    fleet, member = joined(steps=2)
    assert repr(member) == "Member('a': step 0 of 2)" and member.loss is None and not member.done
    fleet.step()
    assert "step 1 of 2, loss 3." in repr(member) and member.loss == member.losses[-1]
    fleet.run()
    assert member.done and "all steps are taken" in repr(fleet) and member.tokens == 2 * 2 * 5
    assert fleet.step() == [] and len(fleet) == 1 and [*fleet] == [member]


def test_without_a_number_of_steps_it_is_one_epoch() -> None:
    fleet, member = joined(accumulate=2)
    fleet.run()
    assert (member.step, member.ended, member.forwards) == (2, "its epoch is over", 3)  # of 2 batches, and of 1


def test_data_that_ends_too_early_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = llama()
    injection = applied(model, "lora", "a")
    fleet = Fleet(model)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-3)
    member = fleet.join(injection, iter(texts(1)), loss=next_token, optimizer=optimizer, steps=9)
    fleet.run()
    assert (
        member.step == 3
        and member.ended == "its data ended after 3 of 9 steps"
        and "can be iterated again" in caplog.text
    )


def test_methods_with_a_schedule_need_the_number_of_steps() -> None:
    model = llama()
    injection = applied(model, "adalora", "a")
    with pytest.raises(TrainingError, match="steps=N"):
        Fleet(model).join(
            injection, texts(1), loss=next_token, optimizer=injection.optimizer(torch.optim.AdamW, lr=1e-3)
        )
    plain = torch.optim.AdamW(injection.parameters(), lr=1e-3)
    fleet = Fleet(model)
    fleet.join(injection, texts(1), loss=next_token, optimizer=plain, steps=3)
    fleet.run()  # the fleet takes the method's steps
    assert isinstance(injection, peftcore.Injection)


def test_it_needs_a_folder_to_be_saved() -> None:
    _, member = joined(steps=2)
    with pytest.raises(TrainingError, match="has no folder"):
        member.save()
