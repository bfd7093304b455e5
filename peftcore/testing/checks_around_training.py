"""Checks of what a method adds to training: calibration with data, a schedule, a loss, an optimizer."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.contract.method import Method
from peftcore.injection.injection import Injection
from peftcore.testing.checks_training import backward
from peftcore.testing.kit import Case, NotApplicable, check, fill
from peftcore.testing.tools import differences, findable, raises, trace

SEVERAL = ("mlp", "encoder", "llama")
"""Hosts for checks that need only a few hosts, because their results hardly depend on the host."""


@check(
    "`needs_data` or `data_options` is claimed exactly when `calibrate` finds something else in other data",
    cause="`calibrate` is defined and the tag forgotten, or it makes nothing of the data",
    remedy="declare one of them with it, and put what it finds into parameters or buffers",
    hosts=SEVERAL,
)
def data_counts_where_it_is_asked_for(case: Case) -> None:
    defined, tags = case.method.calibrate is not Method.calibrate, case.tags
    claimed = tags.needs_data or tags.data_options is not None
    case.expect(defined == claimed, f"claimed: {claimed}; calibrate is {'' if defined else 'not '}defined")
    if not case.looks_at_data:
        return
    found = []
    for half in (0, 1):
        model, inputs = case.fresh()
        data = case.batches(lambda host, given=inputs: case.run(host, given), inputs)["data"]  # type: ignore[misc]
        found.append({key: value.clone() for key, value in case.apply(model, data=[data[half]]).state_dict().items()})
    same = all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    case.expect(not same, "other data gives the same adapter")


class _Interrupted(Exception):
    pass


@check(
    "data that breaks off leaves no trace",
    cause="`calibrate` changes the host, or hooks it, and undoes that only when all goes well",
    remedy="undo it in `finally`, or by a context manager",
    when=lambda tags: tags.needs_data or tags.data_options is not None,
)
def data_that_breaks_off_leaves_no_trace(case: Case) -> None:
    if not case.looks_at_data:
        raise NotApplicable("with these options it looks at no data")
    model, inputs = case.fresh()
    model.train()
    before = trace(model)

    def broken() -> Iterator[Any]:
        yield case.batches(lambda host: case.run(host, inputs), inputs)["data"][0]
        raise _Interrupted

    with raises(case, _Interrupted, "apply() with data that breaks off"):
        case.apply(model, data=broken())
    case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")


def _everything(injection: Injection) -> dict[str, Tensor]:
    """Return copies of all parameters and buffers of an injection, including buffers that are not saved in files."""
    named = ((path, [*module.named_parameters(), *module.named_buffers()]) for path, module in injection.modules())
    return {f"{path}.{name}": tensor.detach().clone() for path, tensors in named for name, tensor in tensors}


@check(
    "`scheduled` is claimed exactly when `on_step` changes something",
    cause="`on_step` is defined and the tag forgotten, or the schedule never begins",
    remedy="declare `scheduled` with it; of `total` steps it must change something in one, also when they are few",
    hosts=SEVERAL,
)
def steps_count_where_they_are_asked_for(case: Case) -> None:
    defined, claimed = case.method.on_step is not Method.on_step, case.tags.scheduled
    case.expect(defined == claimed, f"scheduled={claimed}, on_step is {'' if defined else 'not '}defined")
    if not claimed:
        return
    model, inputs = case.fresh()
    injection = case.filled(model)
    backward(case, model, inputs, injection)
    before, total = _everything(injection), 8
    with torch.no_grad():
        for step in range(1, total + 1):
            injection.method.on_step(injection, step, total)
    after = _everything(injection)
    case.expect(any(not torch.equal(before[key], after[key]) for key in after), f"{total} steps change nothing")


@check(
    "what steps of a schedule did is in the file",
    cause="`on_step` changes a plain attribute of an operator, which no file has",
    remedy="change parameters or buffers alone",
    when=lambda tags: tags.scheduled,
    hosts=SEVERAL,
)
def what_a_schedule_did_is_saved(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    for step in range(1, 4):
        backward(case, model, inputs, injection)
        with torch.no_grad():
            injection.method.on_step(injection, step, 8)
    expected, (other, _) = case.quiet(model, inputs), case.fresh()
    with tempfile.TemporaryDirectory() as folder, findable(case.method):
        injection.save(folder)
        peftcore.load(other, folder)
    case.expect_close(case.quiet(other, inputs), expected, "output of the file, after three steps")


@check(
    "the method's own loss is a finite number that depends on what trains",
    cause="`aux_loss` returns a tensor with dimensions, or a detached one",
    remedy="sum it up without `detach` or `no_grad`; return None where there is nothing to add",
)
def the_own_loss_is_a_number(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    case.run(model, inputs)
    own = injection.method.aux_loss(injection)
    if own is None:
        return
    case.expect(own.dim() == 0 and bool(torch.isfinite(own)), f"aux_loss gives {own.detach()}")
    case.expect(own.requires_grad, "aux_loss depends on no parameter that trains")


@check(
    "own losses of each forward wait where the model's output has no loss, and train what they depend on",
    cause="`aux_loss` returns a tensor that it made in an earlier step, or an operator adds one that it kept",
    remedy="compute losses in each forward from parameters and activations as they are, and keep none",
)
def own_losses_wait_for_a_loop(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    model.train()
    trained = [parameter for parameter in injection.parameters() if parameter.requires_grad]
    for step in range(2):
        case.run(model, inputs)
        own = injection.losses()
        if own.dim() or not own.requires_grad:
            return
        gradients = torch.autograd.grad(own, trained, allow_unused=True)
        finite = all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)
        case.expect(finite, f"gradients of the own loss are not finite in step {step}")
        case.expect(not injection.losses(), "losses that were taken are there again")
        fill(injection, seed=2)
        case.run(model, inputs)
        later = injection.losses()
        if torch.equal(later, own):  # where it counts something, that may be as many as before: its gradient tells
            slopes = torch.autograd.grad(later, trained, allow_unused=True)
            pairs = [(a, b) for a, b in zip(gradients, slopes, strict=True) if a is not None and b is not None]
            same = all(torch.equal(a, b) for a, b in pairs)
            case.expect(not same, f"the own loss and its gradient are the same after step {step}")


@check(
    "the optimizer holds everything that trains, each once, and nothing that is frozen",
    cause="`parameter_groups` does not ask for `requires_grad`, or names a parameter twice",
    remedy="divide `injection.parameters()` that have `requires_grad` into groups, each into one",
)
def the_optimizer_holds_what_trains(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.apply(model)
    first = next(injection.parameters())
    for frozen in (False, True):
        first.requires_grad_(not frozen)
        wanted = {id(parameter) for parameter in injection.parameters() if parameter.requires_grad}
        if not wanted:
            return
        groups = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=4).param_groups
        held = [id(parameter) for group in groups for parameter in group["params"]]
        case.expect(sorted(held) == sorted(wanted), f"{len(held)} parameters in groups, {len(wanted)} train")


@check(
    "training goes on exactly from saved state: that of the host and that of the method's optimizer",
    cause="a method keeps numbers between steps in plain attributes, which no file has",
    remedy="put them into buffers, or into `state` of its gradient rule",
    hosts=SEVERAL,
)
def training_resumes_exactly(case: Case) -> None:
    def train(saved: dict[str, Any] | None, first: int, last: int) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        model, inputs = case.fresh()
        injection = case.apply(model)
        optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05, total_steps=4)
        if saved is not None:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
        for _ in range(first, last):
            backward(case, model, inputs, injection)
            optimizer.step()
        file = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
        file.seek(0)
        return model, torch.load(file, weights_only=True)

    whole, _ = train(None, 0, 4)
    _, half = train(None, 0, 2)
    resumed, _ = train(half, 2, 4)
    for key, value in whole.state_dict().items():
        case.expect_equal(resumed.state_dict()[key], value, f"{key} after two steps, saving, and two more")
