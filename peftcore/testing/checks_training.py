"""Checks of training: gradients reach what should train, and nothing else moves or is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.injection import Injection
from peftcore.testing.kit import Case, NotApplicable, check


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
    """Fail unless gradients agree, relative to the largest of them all."""
    scale = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        case.expect_close(actual[name] / scale, gradient / scale, f"{what}: gradient of {name}", factor=10)


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
    _without_dropout(model)
    base = case.quiet(model, inputs)
    injection = case.filled(model)
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


@check(
    "in training, no effective weight is kept for backward",
    "forward computes a weight by itself; say it as a WeightOperator, and the core computes it again in backward",
)
def effective_weights_do_not_outlive_their_use(case: Case) -> None:
    model, inputs = case.fresh()
    injection = case.filled(model)
    held = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    weights = [graft.site.layer.read(graft.site.module, graft.site.tensor) for graft in injection.grafts]
    shapes = {tuple(sorted(weight.shape)) for weight in weights if weight is not None and weight.dim() > 1}
    kept: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        if tuple(sorted(tensor.shape)) in shapes and tensor.untyped_storage().data_ptr() not in held:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        case.run(model, inputs)
    case.expect(
        not kept, f"{len(kept)} tensors as large as weights are kept, the first of shape {kept[0] if kept else ()}"
    )


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
