"""Checks of training: gradients reach what should train, and nothing else moves or is kept."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.contract import Method
from peftcore.injection import Injection
from peftcore.testing.kit import TOLERANCES, Case, NotApplicable, check
from peftcore.testing.tools import differences, raises, trace


def loss(output: Tensor) -> Tensor:
    """Uneven in every entry, so that gradients do not cancel in norms and softmaxes."""
    weights = torch.linspace(-1.0, 1.5, output.numel(), device=output.device).view_as(output)
    return (output.float() * weights).sum() + output.float().square().mean()


def gradients_of(injection: Injection) -> dict[str, Tensor]:
    """Gradients by tensor name; zeros where there is none."""
    named = ((f"{path}.{name}", p) for path, module in injection.modules() for name, p in module.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def backward(
    case: Case, model: nn.Module, inputs: Mapping[str, Any], injection: Injection
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients of one pass in the model's present mode."""
    model.zero_grad()
    output = case.run(model, inputs)
    loss(output).backward()  # type: ignore[no-untyped-call]
    return output.detach(), gradients_of(injection)


def expect_same_gradients(case: Case, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Fail unless gradients agree, each relative to its own largest value; to a hundredth of the largest of them all,
    where that is more: what is smaller is what is left of terms that cancel, and has their rounding errors."""
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), largest / 100)
        error = (actual[name].double() - gradient.double()).abs().max().item() / scale
        allowed = 10 * TOLERANCES[gradient.dtype]
        case.expect(error <= allowed, f"{what}: gradient of {name}: relative error {error:.2e} > {allowed:.0e}")


@torch.no_grad()
def _without_dropout(model: nn.Module) -> None:
    """In training mode only what trains should differ from evaluation."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "p"):
                setattr(module, name, 0.0)


@check(
    "outputs and gradients are finite, also where the host has rows of zeros (pruned, padded)",
    "a division by the norm of a row; a row of zeros has none",
)
def zero_rows_stay_finite(case: Case) -> None:
    model, inputs = case.fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter[..., 0, :] = 0.0
                parameter[0] = 0.0
    injection = case.apply(model)
    output, gradients = backward(case, model, inputs, injection)
    case.expect(bool(torch.isfinite(output).all()), "the output is not finite")
    wrong = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    case.expect(not wrong, f"gradients that are not finite: {', '.join(wrong[:3])}")


def _trained(case: Case, steps: int = 3) -> tuple[nn.Module, Injection, dict[str, Tensor], dict[str, Tensor], set[str]]:
    """Train a little: model, injection, the base before, the operators before, and the names that got a gradient."""
    model, inputs = case.fresh()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    injection = case.apply(model)
    before = {key: value.clone() for key, value in injection.state_dict().items()}
    optimizer = torch.optim.SGD(list(injection.parameters()), lr=0.05)
    model.train()
    touched: set[str] = set()
    for _ in range(steps):
        _, gradients = backward(case, model, inputs, injection)
        touched |= {name for name, gradient in gradients.items() if gradient.any()}
        optimizer.step()
    return model, injection, base, before, touched


@check(
    "every trainable tensor gets a gradient and moves within three steps",
    "a parameter that forward does not use, or that is detached; both factors of a product start at zero",
)
def every_trainable_tensor_learns(case: Case) -> None:
    _, injection, _, before, touched = _trained(case)
    named = {f"{path}.{name}": p for path, module in injection.modules() for name, p in module.named_parameters()}
    idle = [
        name for name, p in named.items() if p.requires_grad and (name not in touched or torch.equal(p, before[name]))
    ]
    case.expect(not idle, f"without a gradient: {', '.join(idle[:3])}")


@check(
    "training leaves the base and its statistics as they were, to the bit",
    "an operator writes into the host's tensors; record a replacement instead",
)
def training_leaves_the_base_alone(case: Case) -> None:
    model, _, base, _, _ = _trained(case)
    state = model.state_dict()
    for key, value in base.items():
        case.expect_equal(state[key], value, f"{key} of the base after training")


@check(
    "the effect is the same in training and in evaluation under no_grad, fused paths and padding included",
    "forward asks `self.training` for more than dropout, or a fused path of the host goes around the operator",
)
def the_effect_is_the_same_in_training_and_evaluation(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    _without_dropout(model)  # also without that of the method
    evaluated = case.quiet(model, inputs)
    case.expect_moved(evaluated, base, "the output")
    model.train()
    case.expect_close(case.run(model, inputs).detach(), evaluated, "output in training", factor=10)
    with injection.disabled():
        case.expect_close(case.run(model, inputs).detach(), base, "the base's output in training", factor=10)


@check(
    "dropout acts in training only",
    "torch's functional dropout is called without `training=self.training`",
)
def dropout_acts_in_training_only(case: Case) -> None:
    if "dropout" not in case.method.Config.model_fields:
        raise NotApplicable("the method has no option called dropout")
    plain, inputs = case.fresh()
    case.filled(plain)
    model, _ = case.fresh()
    _without_dropout(model)
    try:
        case.filled(model, dropout=0.5)
    except peftcore.errors.UnsupportedSite as error:
        raise NotApplicable(str(error)) from None
    case.expect_equal(
        case.run(model, inputs).detach(), case.run(plain, inputs).detach(), "output in evaluation, with dropout=0.5"
    )
    model.train()
    torch.manual_seed(0)
    first, second = case.run(model, inputs).detach(), case.run(model, inputs).detach()
    case.expect_moved(second, first, "a second pass in training")


@check(
    "operators follow train() and eval() of the host",
    "an operator overrides train(), or hides a module in a list or closure",
)
def operators_follow_the_training_mode(case: Case) -> None:
    model, _ = case.fresh()
    injection = case.apply(model)
    for mode in (False, True, False):
        model.train(mode)
        wrong = [
            path for path, operator in injection.modules() if any(m.training is not mode for m in operator.modules())
        ]
        case.expect(not wrong, f"after train({mode}), in the other mode: {', '.join(wrong[:3])}")


@check(
    "both kinds of gradient checkpointing give the same gradients",
    "forward does something else when it is computed again in backward",
)
def gradient_checkpointing_changes_nothing(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    output, expected = backward(case, model, inputs, injection)
    for reentrant in (False, True):
        model.zero_grad()
        trigger = torch.zeros((), requires_grad=True)  # the reentrant kind wants an input that requires a gradient
        again: Tensor = checkpoint(lambda _: case.run(model, inputs), trigger, use_reentrant=reentrant)
        case.expect_close(again.detach(), output, f"output, reentrant={reentrant}")
        loss(again).backward()  # type: ignore[no-untyped-call]
        expect_same_gradients(case, gradients_of(injection), expected, f"reentrant={reentrant}")


CHECKPOINTED = ("llama", "bert", "t5", "gpt2", "moe", "mistral", "vit")
"""Hosts that checkpoint each of their blocks by themselves."""


@check(
    "blocks that run again in backward, each by itself, give the same gradients, with both kinds of checkpointing",
    "one block reads what an operator of another left in a Tap without `kept=True`; or, in the reentrant kind, a "
    "block's output does not depend on its input",
    hosts=CHECKPOINTED,
)
def each_block_may_run_again(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    _without_dropout(model)  # also without that of the method
    model.train()
    _, expected = backward(case, model, inputs, injection)
    model.enable_input_require_grads()  # type: ignore[operator]  # what the reentrant kind needs
    for reentrant in (False, True):
        model.zero_grad()
        kind = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)  # type: ignore[operator]
        _, again = backward(case, model, inputs, injection)
        expect_same_gradients(case, again, expected, f"reentrant={reentrant}")


@check(
    "in training, no effective weight is kept for backward",
    "forward computes a weight by itself; say it as a WeightOperator, and the core computes it again in backward",
)
def effective_weights_do_not_outlive_their_use(case: Case) -> None:
    model, inputs = case.fresh()
    plain = _kept_shapes(case, model.requires_grad_(), inputs)  # activations that happen to be as large as a weight
    model, inputs = case.fresh()
    injection = case.filled(model)
    weights = [graft.site.layer.read(graft.site.module, graft.site.tensor) for graft in injection.grafts]
    shapes = {tuple(sorted(weight.shape)) for weight in weights if weight is not None and weight.dim() > 1}
    more = {shape: count for shape, count in (_kept_shapes(case, model, inputs) - plain).items() if shape in shapes}
    case.expect(not more, f"tensors as large as weights are kept: {', '.join(map(str, more))}")


def _kept_shapes(case: Case, model: nn.Module, inputs: dict[str, Any]) -> Counter[tuple[int, ...]]:
    """Shapes of what a forward keeps for backward, without the model's own tensors; their sides sorted, since weights
    are kept transposed."""
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: Counter[tuple[int, ...]] = Counter()

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in held:
            kept[tuple(sorted(tensor.shape))] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(model, inputs)
    return kept


@check(
    "after torch.inference_mode, training goes on as if nothing had been",
    "a cache keeps tensors made in inference mode; they cannot be used in training",
)
def inference_mode_leaves_nothing_behind(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    output, expected = backward(case, model, inputs, injection)
    with torch.inference_mode():
        case.expect_close(case.run(model, inputs), output, "output in inference mode")
    again, gradients = backward(case, model, inputs, injection)
    case.expect_close(again, output, "output after inference mode")
    expect_same_gradients(case, gradients, expected, "after inference mode")


SEVERAL = ("mlp", "encoder", "llama")
"""Hosts for promises that hardly depend on the host."""


@check(
    "`needs_data` is claimed exactly when `calibrate` finds something else in other data",
    "`calibrate` is defined and the tag forgotten, or it makes nothing of the data",
    hosts=SEVERAL,
)
def data_counts_where_it_is_asked_for(case: Case) -> None:
    defined, claimed = case.method.calibrate is not Method.calibrate, case.tags.needs_data
    case.expect(defined == claimed, f"needs_data={claimed}, calibrate is {'' if defined else 'not '}defined")
    if not claimed:
        return
    found = []
    for half in (0, 1):
        model, inputs = case.fresh()
        data = case.batches(lambda host, given=inputs: case.run(host, given))["data"]  # type: ignore[misc]
        found.append({key: value.clone() for key, value in case.apply(model, data=[data[half]]).state_dict().items()})
    same = all(torch.equal(value, found[1][key]) for key, value in found[0].items())
    case.expect(not same, "other data gives the same adapter")


class _Interrupted(Exception):
    pass


@check(
    "data that breaks off leaves no trace",
    "`calibrate` changes the host, or hooks it, and undoes that only when all goes well",
    when=lambda tags: tags.needs_data,
)
def data_that_breaks_off_leaves_no_trace(case: Case) -> None:
    model, inputs = case.fresh()
    model.train()
    before = trace(model)

    def broken() -> Iterator[Any]:
        yield case.batches(lambda host: case.run(host, inputs))["data"][0]
        raise _Interrupted

    with raises(case, _Interrupted, "apply() with data that breaks off"):
        case.apply(model, data=broken())
    case.expect(not (wrong := differences(before, trace(model))), f"other than before: {wrong}")


def _everything(injection: Injection) -> dict[str, Tensor]:
    """Parameters and buffers, those included that no file has."""
    named = ((path, [*module.named_parameters(), *module.named_buffers()]) for path, module in injection.modules())
    return {f"{path}.{name}": tensor.detach().clone() for path, tensors in named for name, tensor in tensors}


@check(
    "`scheduled` is claimed exactly when `on_step` changes something",
    "`on_step` is defined and the tag forgotten, or the schedule never begins",
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
    "the method's own loss is a finite number that depends on what trains",
    "`aux_loss` returns a tensor with dimensions, or a detached one; without anything to add it returns None",
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
    "the optimizer holds everything that trains, each once, and nothing that is frozen",
    "`parameter_groups` does not ask for `requires_grad`, or names a parameter twice",
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
        groups = injection.optimizer(torch.optim.SGD, lr=0.1, total_steps=1).param_groups
        held = [id(parameter) for group in groups for parameter in group["params"]]
        case.expect(sorted(held) == sorted(wanted), f"{len(held)} parameters in groups, {len(wanted)} train")


@check(
    "training goes on exactly from saved state: that of the host and that of the method's optimizer",
    "a method keeps numbers between steps in attributes; put them into buffers, or into `state` of its gradient rule",
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
