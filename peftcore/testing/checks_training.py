"""Checks of training: the adapter's parameters get gradients, no other tensor changes, and no needless tensors are
saved for backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.errors import TrainingError
from peftcore.injection.injection import Injection
from peftcore.testing.kit import TOLERANCES, Case, NotApplicable, check
from peftcore.testing.tools import raises

STEP = 1e-6
"""The step size of finite differences, for float64."""


def loss(output: Tensor) -> Tensor:
    """Return a loss that weights each entry of the output differently, so that gradients do not cancel in norms and
    softmaxes."""
    weights = torch.linspace(-1.0, 1.5, output.numel(), device=output.device).view_as(output)
    return (output.float() * weights).sum() + output.float().square().mean()


def gradients_of(injection: Injection) -> dict[str, Tensor]:
    """Return the gradients by tensor name; zeros for tensors without a gradient."""
    named = ((f"{path}.{name}", p) for path, module in injection.modules() for name, p in module.named_parameters())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}


def backward(
    case: Case, model: nn.Module, inputs: Mapping[str, Any], injection: Injection
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of one forward and backward, in the model's current mode."""
    model.zero_grad()
    output = case.run(model, inputs)
    loss(output).backward()  # type: ignore[no-untyped-call]
    return output.detach(), gradients_of(injection)


def expect_same_gradients(case: Case, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Fail unless two sets of gradients agree. The error of a gradient is relative to its own largest value, or to a
    hundredth of the largest value of all gradients, whichever is larger. Very small gradients are sums of terms that
    cancel, so they have the rounding errors of these larger terms."""
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), largest / 100)
        error = (actual[name].double() - gradient.double()).abs().max().item() / scale
        allowed = 10 * TOLERANCES[gradient.dtype]
        case.expect(error <= allowed, f"{what}: gradient of {name}: relative error {error:.2e} > {allowed:.0e}")


@torch.no_grad()
def _without_dropout(model: nn.Module) -> None:
    """Turn off dropout and noise, so that the model computes the same in training mode as in evaluation."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name in ("p", "noise")):
                setattr(module, name, 0.0)


@check(
    "outputs and gradients are finite, also where the host has rows of zeros (pruned, padded)",
    cause="a division by the norm of a row; a row of zeros has none",
    remedy="divide by `norm.clamp_min(eps)`, and look at the gradient too: that of a norm at zero is not finite",
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
    """Train the method for a few steps, with its own losses added. Return the model, the injection, copies of the
    base's tensors and of the operators' tensors before training, and the names of the parameters that got a
    gradient."""
    model, inputs = case.fresh()
    base = {key: value.clone() for key, value in model.state_dict().items()}
    injection = case.apply(model)
    before = {key: value.clone() for key, value in injection.state_dict().items()}
    optimizer = torch.optim.SGD(list(injection.parameters()), lr=0.05)
    model.train()
    touched: set[str] = set()
    for _ in range(steps):
        model.zero_grad()
        output = case.run(model, inputs)
        (loss(output) + injection.losses()).backward()  # type: ignore[no-untyped-call]
        touched |= {name for name, gradient in gradients_of(injection).items() if gradient.any()}
        optimizer.step()
    return model, injection, base, before, touched


@check(
    "every trainable tensor gets a gradient and moves within three steps",
    cause="a parameter that forward does not use, or that is detached; both factors of a product start at zero",
    remedy="use it, start one factor at random, or freeze in `trainable` what is not to learn",
)
def every_trainable_tensor_learns(case: Case) -> None:
    _, injection, _, before, touched = _trained(case)
    named = {f"{path}.{name}": p for path, module in injection.modules() for name, p in module.named_parameters()}
    idle = [
        name for name, p in named.items() if p.requires_grad and (name not in touched or torch.equal(p, before[name]))
    ]
    case.expect(not idle, f"without a gradient: {', '.join(idle[:3])}")


def _held(case: Case, model: nn.Module, inputs: Mapping[str, Any], seed: int = 0) -> Tensor:
    """Return the output of one forward with torch's random generator seeded, so that all calls draw the same
    numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.run(model, inputs)


@check(
    "`random` is claimed exactly when training draws random numbers, and torch's global generator decides which",
    cause="an operator draws in its forward and the tag was forgotten, or it has a generator of its own",
    remedy="declare `random`, and draw from the global generator, which checkpoints and users can hold",
    hosts=("mlp", "encoder", "llama"),
)
def draws_are_declared(case: Case) -> None:
    model, inputs = case.fresh(torch.float64)
    injection = case.filled(model, dtype="float64")
    for _, module in injection.modules():
        module.train()
    first, again, other = (_held(case, model, inputs, seed) for seed in (0, 0, 1))
    case.expect(torch.equal(first, again), "the same draws of torch give something else")
    drawn = not torch.equal(first, other)
    case.expect(drawn == case.tags.random, f"random={case.tags.random}, but draws {'do' if drawn else 'do not'} count")


@check(
    "gradients are those of what forward computes, by finite differences with the same draws",
    cause="part of the forward is detached or in no_grad, or a backward written by hand is wrong",
    remedy="let autograd see all of it; where the paper takes another gradient, say `exact_gradient=False` in the tags",
    hosts=("mlp", "encoder", "vit"),
)
def gradients_are_those_of_the_forward(case: Case) -> None:
    model, inputs = case.fresh(torch.float64)
    injection = case.filled(model, dtype="float64")
    model.train()
    trained = [parameter for parameter in injection.parameters() if parameter.requires_grad]
    generator = torch.Generator().manual_seed(5)
    along = [torch.randn(each.shape, generator=generator, dtype=each.dtype) for each in trained]

    def value() -> Tensor:
        output = _held(case, model, inputs)
        weights = torch.linspace(-1.0, 1.5, output.numel(), dtype=output.dtype).view_as(output)
        return (output * weights).mean() + output.square().mean()

    gradients = torch.autograd.grad(value(), trained, allow_unused=True)
    slopes = [(g * v).sum().item() for g, v in zip(gradients, along, strict=True) if g is not None]
    values = []
    for step in (STEP, -2 * STEP):
        with torch.no_grad():
            for parameter, direction in zip(trained, along, strict=True):
                parameter.add_(direction, alpha=step)
            values.append(value().item())
    found, scale = (values[0] - values[1]) / (2 * STEP), max(map(abs, slopes), default=0.0) + 1e-9
    error = abs(found - sum(slopes)) / scale
    case.expect(
        (error <= 1e-4) == case.tags.exact_gradient,
        f"exact_gradient={case.tags.exact_gradient}, but the slope is {found:.6g}, the gradient's {sum(slopes):.6g}",
    )


@check(
    "training leaves the base and its statistics as they were, to the bit",
    cause="an operator writes into the host's tensors",
    remedy="record a value that stands for the tensor: `surgeon.replace`",
)
def training_leaves_the_base_alone(case: Case) -> None:
    model, _, base, _, _ = _trained(case)
    state = model.state_dict()
    for key, value in base.items():
        case.expect_equal(state[key], value, f"{key} of the base after training")


@check(
    "the effect is the same in training and in evaluation under no_grad, fused paths and padding included",
    cause="forward asks `self.training` for more than dropout, or a fused path of the host goes around the operator",
    remedy="compute the same in both, or say `trains_only` where that is the method; a fused path that reads weights "
    "by itself is turned off with the hook `peftcore_forced_attributes`",
)
def the_effect_is_the_same_in_training_and_evaluation(case: Case) -> None:
    model, inputs = case.fresh()
    base = case.quiet(model, inputs)
    injection = case.filled(model)
    _without_dropout(model)  # also without that of the method
    evaluated = case.quiet(model, inputs)
    case.expect_moved(evaluated, base, "the output")
    model.train()
    if not any(each.trains_only for each in injection.operators.values()):
        case.expect_close(case.run(model, inputs).detach(), evaluated, "output in training", factor=10)
    with injection.disabled():
        case.expect_close(case.run(model, inputs).detach(), base, "the base's output in training", factor=10)


@check(
    "dropout acts in training only",
    cause="torch's functional dropout is called without `training=self.training`",
    remedy="pass it, or use `nn.Dropout`",
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
    try:
        first, second = case.run(model, inputs).detach(), case.run(model, inputs).detach()
    except peftcore.errors.TrainingError as error:  # at several slices of one weight, say
        raise NotApplicable(str(error)) from None
    case.expect_moved(second, first, "a second pass in training")


@check(
    "operators follow train() and eval() of the host",
    cause="an operator overrides train(), or hides a module in a list or closure",
    remedy="leave `train()` alone, and hold modules as attributes or in an `nn.ModuleList`",
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
    cause="forward does something else when it is computed again in backward",
    remedy="make it a function of its inputs and the operator's tensors: nothing counted, no generator but torch's",
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
"""Hosts that support gradient checkpointing of their blocks."""


@check(
    "blocks that run again in backward, each by itself, give the same gradients, with both kinds of checkpointing",
    cause="one block reads what an operator of another left in a `Tap`, and that is gone when it runs alone; or, in "
    "the reentrant kind, a block's output does not depend on its input",
    remedy="make it `Tap(until_backward=True)`, and let what the block returns depend on what it gets; where that "
    "cannot be, the tag `reentrant=False` says so",
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
        if reentrant and not case.tags.reentrant:
            _reentrant_is_refused(case)
            return
        _, again = backward(case, model, inputs, injection)
        expect_same_gradients(case, again, expected, f"reentrant={reentrant}")


def _reentrant_is_refused(case: Case) -> None:
    """Check that training the method under reentrant gradient checkpointing raises TrainingError."""
    model, inputs = case.fresh()
    injection = case.filled(model)
    model.train().enable_input_require_grads()  # type: ignore[operator]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})  # type: ignore[operator]
    with raises(case, TrainingError, "reentrant checkpointing, with reentrant=False in the tags,"):
        backward(case, model, inputs, injection)


@check(
    "what draws in training draws the same where a block runs again in backward: gradients are those of its forward",
    cause="an operator draws from a generator of its own, which goes on when the block runs again",
    remedy="draw from torch's global generator, which checkpoints restore",
    when=lambda tags: tags.random,
    hosts=("llama",),
)
def draws_are_those_of_the_forward(case: Case) -> None:
    found = []
    for again in (False, True):
        model, inputs = case.fresh(torch.float64)
        injection = case.filled(model, dtype="float64")
        for _, module in injection.modules():
            module.train()
        model.train().enable_input_require_grads()  # type: ignore[operator]
        if again:
            kind = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kind)  # type: ignore[operator]
        output = _held(case, model, inputs)
        loss(output).backward()  # type: ignore[no-untyped-call]
        found.append((output.detach(), gradients_of(injection)))
    (output, expected), (other, gradients) = found
    case.expect_close(other, output, "the output of blocks that will run again")
    expect_same_gradients(case, gradients, expected, "run again with draws")


@check(
    "in training, no effective weight is kept for backward",
    cause="forward computes a weight by itself (`B @ A`), and autograd keeps it",
    remedy="apply one factor after the other; or say it as a WeightOperator, whose weight is computed again in "
    "backward",
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
    """Count the tensors that a forward saves for backward, by shape, without the model's own tensors. The dimensions of
    a shape are sorted, because weights may be saved transposed."""
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
    cause="a cache keeps tensors made in inference mode; they cannot be used in training",
    remedy="keep nothing that forward makes",
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
