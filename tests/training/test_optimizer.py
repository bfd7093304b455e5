"""`Injection.optimizer`: groups, gradient rules, steps, saved state, and the company it keeps."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toys import Broken, ByRow, Halved, Plain, Plus, Steps, batch, toy

import peftcore
from peftcore.errors import TrainingError
from peftcore.training import MethodOptimizer

ALL = [
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, id="sgd"),
    pytest.param(torch.optim.AdamW, {}, id="adamw"),
    pytest.param(torch.optim.Adam, {"amsgrad": True, "foreach": False}, id="adam"),
    pytest.param(torch.optim.RMSprop, {}, id="rmsprop"),
    pytest.param(torch.optim.Adagrad, {}, id="adagrad"),
    pytest.param(torch.optim.NAdam, {}, id="nadam"),
    pytest.param(torch.optim.AdamW, {"fused": True}, id="fused"),
]


def gradients(injection: peftcore.Injection, seed: int = 3) -> list[Tensor]:
    """Random gradients, put in place."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in injection.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [parameter.grad for parameter in injection.parameters()]


def values(injection: peftcore.Injection) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in injection.parameters()]


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_plain_method_has_a_plain_optimizer() -> None:
    injection = peftcore.apply(toy(), Plain)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1, weight_decay=0.3, betas=(0.8, 0.9))
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert group["params"] == list(injection.parameters())
    assert (group["lr"], group["weight_decay"], group["betas"]) == (0.1, 0.3, (0.8, 0.9))


def test_what_is_frozen_is_left_out() -> None:
    injection = peftcore.apply(toy(), Plain)
    first, *others = injection.parameters()
    first.requires_grad_(False)
    assert injection.optimizer(torch.optim.SGD, lr=0.1).param_groups[0]["params"] == others
    injection.trainable(False)
    with pytest.raises(TrainingError, match="frozen"):
        injection.optimizer(torch.optim.SGD, lr=0.1)


def test_a_method_may_give_parameters_rates_of_their_own() -> None:
    injection = peftcore.apply(toy(), Plus)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1, momentum=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 1.6]
    assert {group["momentum"] for group in optimizer.param_groups} == {0.5}
    before = values(injection)
    found = gradients(injection)
    optimizer.step()
    for parameter, old, gradient in zip(injection.parameters(), before, found, strict=True):
        rate = 0.1 if parameter in set(optimizer.param_groups[0]["params"]) else 1.6
        torch.testing.assert_close(parameter.detach(), old - rate * gradient)


def test_modules_that_the_user_named_train_with_the_rest() -> None:
    """A method that gives groups of its own need not think of them."""
    model = toy()
    injection = peftcore.apply(model, Plus, target="up", train=["down"])
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    assert [(len(group["params"]), group["lr"]) for group in optimizer.param_groups] == [(1, 0.1), (1, 1.6), (2, 0.1)]
    injection.trainable(False)
    injection.trainable(True)
    assert all(parameter.requires_grad for parameter in injection.parameters())


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_a_rule_without_a_way_back_changes_the_gradients_alone(cls: Any, options: dict[str, Any]) -> None:
    injection, plain = peftcore.apply(toy(), Halved, seed=0), peftcore.apply(toy(), Plain, seed=0)
    ours = injection.optimizer(cls, lr=0.05, weight_decay=0.1, **options)
    theirs = plain.optimizer(cls, lr=0.05, weight_decay=0.1, **options)
    for step in range(4):
        given = gradients(injection, step)
        for gradient in gradients(plain, step):
            gradient.div_(2)
        ours.step()
        theirs.step()
        assert all(parameter.grad is grad for parameter, grad in zip(injection.parameters(), given, strict=True))
    for one, other in zip(values(injection), values(plain), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("cls", "options"), ALL)
def test_a_rule_with_a_way_back_runs_any_optimizer_in_its_own_shape(cls: Any, options: dict[str, Any]) -> None:
    """The same optimizer on small parameters of its own gives the updates; weight decay comes last, decoupled."""
    injection = peftcore.apply(toy(), ByRow)
    ours = injection.optimizer(cls, lr=0.05, weight_decay=0.1, **options)
    expected = values(injection)
    small = [nn.Parameter(torch.zeros(1, parameter.shape[1])) for parameter in injection.parameters()]
    theirs = cls(small, lr=0.05, **{**options, "weight_decay": 0.0})
    for step in range(4):
        for one, gradient in zip(small, gradients(injection, step), strict=True):
            one.data.zero_()
            one.grad = gradient[:1].clone()
        ours.step()
        theirs.step()
        for index, one in enumerate(small):
            expected[index] = (expected[index] + 2 * one.detach()) * (1 - 0.05 * 0.1)
    for one, other in zip(values(injection), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    shapes = {tuple(v.shape) for state in ours.state.values() for v in state.values() if v.dim() == 2}
    assert all(shape[0] == 1 for shape in shapes)


def test_parameters_without_a_gradient_stay() -> None:
    injection = peftcore.apply(toy(), ByRow)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05)
    gradients(injection)
    idle = next(injection.parameters())
    idle.grad, before = None, idle.detach().clone()
    optimizer.step()
    assert torch.equal(idle, before)
    assert len(optimizer.state) == 3


def test_a_failing_rule_leaves_everything_in_place() -> None:
    injection = peftcore.apply(toy(), Broken)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05, weight_decay=0.1)
    before, given = values(injection), gradients(injection)
    with pytest.raises(ZeroDivisionError):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(values(injection), before, strict=True))
    assert all(parameter.grad is grad for parameter, grad in zip(injection.parameters(), given, strict=True))
    assert optimizer.param_groups[0]["weight_decay"] == 0.1


@pytest.mark.parametrize("method", [Halved, ByRow, Steps])
@pytest.mark.parametrize(("cls", "options"), ALL)
def test_saved_state_goes_on_to_the_bit(method: Any, cls: Any, options: dict[str, Any]) -> None:
    def make() -> tuple[peftcore.Injection, Any]:
        injection = peftcore.apply(toy(), method, seed=0)
        return injection, injection.optimizer(cls, lr=0.05, total_steps=6, **options)

    whole, optimizer = make()
    for step in range(6):
        if step == 3:
            state, weights = through_file(optimizer.state_dict()), values(whole)
        gradients(whole, step)
        optimizer.step()
    resumed, again = make()
    with torch.no_grad():
        for parameter, value in zip(resumed.parameters(), weights, strict=True):
            parameter.copy_(value)
    again.load_state_dict(state)
    for step in range(3, 6):
        gradients(resumed, step)
        again.step()
    for one, other in zip(values(resumed), values(whole), strict=True):
        assert torch.equal(one, other)
    for path, operator in whole.operators.items():
        assert torch.equal(operator.get_buffer("kept"), resumed.operators[path].get_buffer("kept"))
    assert again.steps == optimizer.steps == 6
    for ours, theirs in zip(optimizer.rules, again.rules, strict=True):
        pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
        assert all(ours.state[one] == theirs.state[other] for one, other in pairs)


def test_state_of_another_optimizer_is_refused() -> None:
    injection = peftcore.apply(toy(), ByRow)
    plain = torch.optim.AdamW(list(injection.parameters()))
    with pytest.raises(TrainingError, match="belongs to another injection"):
        injection.optimizer(torch.optim.AdamW, lr=0.1).load_state_dict(plain.state_dict())


def test_a_loaded_state_is_a_copy() -> None:
    injection = peftcore.apply(toy(), Steps)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=2)
    state = optimizer.state_dict()
    gradients(injection)
    optimizer.step()
    taken = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(taken)
    optimizer.step()
    assert taken["peftcore"]["steps"] == 1
    assert {float(buffer) for buffer in taken["peftcore"]["buffers"].values()} == {0.5}
    assert state["peftcore"]["steps"] == 0


def test_steps_come_after_each_step_with_the_gradients_still_there() -> None:
    injection = peftcore.apply(toy(), Steps)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=4)
    assert isinstance(optimizer, MethodOptimizer)
    for step in range(1, 5):
        gradients(injection)
        optimizer.step()
        optimizer.zero_grad()
        assert {float(o.get_buffer("kept")) for o in injection.operators.values()} == {sum(range(1, step + 1)) / 4}
    assert all(parameter.grad is None for parameter in injection.parameters())


def test_a_schedule_must_know_its_length() -> None:
    injection = peftcore.apply(toy(), Steps)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    before = values(injection)
    gradients(injection)
    with pytest.raises(TrainingError, match="total_steps"):
        optimizer.step()
    assert all(torch.equal(*pair) for pair in zip(values(injection), before, strict=True))


SCHEDULERS = [
    pytest.param(lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step), id="lambda"),
    pytest.param(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=6), id="one-cycle"),
    pytest.param(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6), id="cosine"),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_schedulers_reach_the_optimizer_inside(make: Any, recwarn: pytest.WarningsRecorder) -> None:
    injection, plain = peftcore.apply(toy(), Halved, seed=0), peftcore.apply(toy(), Plain, seed=0)
    rates = []
    for each in (injection, plain):
        optimizer = each.optimizer(torch.optim.AdamW, lr=0.1)
        scheduler = make(optimizer)
        rates.append([])
        for step in range(5):
            for gradient in gradients(each, step):
                gradient.mul_(2 if each is injection else 1)
            optimizer.step()
            rates[-1].append(optimizer.param_groups[0]["lr"])
            if step == 2:
                optimizer.load_state_dict(through_file(optimizer.state_dict()))
            scheduler.step()
    assert rates[0] == rates[1]
    assert len(set(rates[0])) == 5
    assert all(torch.equal(*pair) for pair in zip(values(injection), values(plain), strict=True))
    assert not [each for each in recwarn if "lr_scheduler.step()" in str(each.message)]


def test_closures_are_called() -> None:
    """Lightning's loops hand forward and backward to the optimizer's step."""
    model = toy()
    injection = peftcore.apply(model, ByRow)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.01)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(**batch())["loss"]
        loss.backward()
        losses.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == losses[0]
    assert len(losses) == 1
    injection.remove()
    steps = peftcore.apply(model, Steps).optimizer(torch.optim.LBFGS, lr=0.1, total_steps=2)
    optimizer = steps
    steps.step(closure)
    assert steps.steps == 1
    assert losses[-1] < losses[1]


def test_a_gradient_scaler_skips_steps_with_infinities() -> None:
    injection = peftcore.apply(toy(), Steps)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = values(injection)
    for bad in (True, False):
        loss = scaler.scale(sum(parameter.sum() for parameter in injection.parameters()))
        optimizer.zero_grad()
        loss.backward()
        if bad:
            next(injection.parameters()).grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.steps == (0 if bad else 1)
    for one, old in zip(values(injection), before, strict=True):
        torch.testing.assert_close(one, old - 0.1)


def test_a_copy_trains_its_own_copy() -> None:
    injection = peftcore.apply(toy(), ByRow)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.1)
    gradients(injection)
    optimizer.step()
    before = values(injection)
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    twin.step()
    assert all(torch.equal(*pair) for pair in zip(values(injection), before, strict=True))
    assert twin.steps == 2
    assert twin.param_groups is twin.inner.param_groups
    moved = [parameter for group in twin.param_groups for parameter in group["params"]]
    assert not any(torch.equal(*pair) for pair in zip(moved, before, strict=True))


def test_hooks_of_torch_optimizers_run() -> None:
    injection = peftcore.apply(toy(), Halved)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *args: seen.append("before"))
    optimizer.register_step_post_hook(lambda *args: seen.append("after"))
    gradients(injection)
    optimizer.step()
    assert seen == ["before", "after"]
    assert "lr: 0.1" in repr(optimizer)
