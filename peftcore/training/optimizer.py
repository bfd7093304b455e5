"""Creates optimizers for an injection, with the method's parameter groups, its rule for gradients, and its schedule.

If the method has neither a rule nor a schedule, the optimizer is a plain torch optimizer. Otherwise it is a
`MethodOptimizer` that wraps one. `MethodOptimizer` is a subclass of torch's `Optimizer`, so it works with schedulers,
`transformers.Trainer`, accelerate and gradient scalers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map

from peftcore.contract.installed_methods import AppliedMethod
from peftcore.contract.method import GradientRule
from peftcore.errors import TrainingError
from peftcore.layers.fsdp import gathered, stand_ins_for, standing
from peftcore.layers.pieces import cut_like, is_cut, whole

KEY = "peftcore"
"""The key in an optimizer's state dict under which a `MethodOptimizer` saves its own state."""


class MethodOptimizer(Optimizer):
    """An optimizer that wraps a torch optimizer, and applies a method's rules for gradients and its schedule. Its
    state, parameter groups and options are those of the wrapped optimizer.

    Attributes:
        injection: the injection whose parameters are trained.
        inner: the wrapped torch optimizer.
        rules: the method's rules for gradients; for a hybrid, those of all its parts.
        total_steps: the total number of steps; None until it is known (the Trainer's callback sets it).
        steps: the number of steps so far.
    """

    def __init__(
        self, injection: AppliedMethod, inner: Optimizer, rules: list[GradientRule], total_steps: int | None
    ) -> None:
        super().__init__(inner.param_groups, inner.defaults)
        self.injection, self.inner, self.rules = injection, inner, rules
        self.total_steps, self.steps = total_steps, 0
        self._stand_ins: dict[nn.Parameter, nn.Parameter] = {}
        self._share()

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run one step of the wrapped optimizer, then advance the method's schedule.

        Raises:
            TrainingError: the method has a schedule, and `total_steps` is None.
        """
        if self.total_steps is None and any(True for _ in scheduled(self.injection)):
            raise TrainingError(
                f"{self.injection.method.name} has a schedule: pass total_steps=N to injection.optimizer(...), or "
                "callbacks=[peftcore.training.PeftcoreCallback()] to transformers' Trainer"
            )
        self._check_groups()
        loss = self._by_rules(closure) if self.rules else self.inner.step(closure)
        self.steps += 1
        if self.total_steps is not None:
            take_steps(scheduled(self.injection), self.steps, self.total_steps)
        return loss

    def _check_groups(self) -> None:
        """Check that the wrapped optimizer has the adapter's own parameters.

        Raises:
            TrainingError: it has other parameters, so that the method's changes would be lost at the next step.
        """
        held = {parameter for group in self.param_groups for parameter in group["params"]}
        if held.isdisjoint(self.injection.parameters()):
            raise TrainingError(
                f"the optimizer's parameters are not those of {self.injection.name!r} any more (DeepSpeed's ZeRO "
                f"replaces them), so what {self.injection.method.name} changes during training would be lost: "
                "train it with DDP or FSDP2, or use a method without a schedule or a rule for gradients, such as lora"
            )

    @torch.no_grad()
    def _by_rules(self, closure: Callable[[], Any] | None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        with self._whole(), gathered(self.injection.model, self.injection.parameters, self._stand_ins):
            self._step_by_rules()
        return loss

    def _step_by_rules(self) -> None:
        aside: list[_Aside] = []
        with _decay_kept(self.param_groups):
            try:
                for group in self.param_groups:
                    self._set_aside(group, aside)
                self.inner.step()
            finally:
                updates = [each.put_back() for each in aside]
        for each, update in zip(aside, updates, strict=True):
            if each.data is not None:
                each.param.add_(each.rule.restore(update, each.param).to(each.param.dtype))
                if decay := each.group.get("weight_decay"):
                    each.param.mul_(1 - each.group["lr"] * decay)

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Context manager in which whole parameters replace sharded ones in the parameter groups, since rules need
        whole gradients. Rules and the wrapped optimizer see the same whole parameters at each step, so their state is
        whole too."""
        if self.rules and not self._stand_ins:
            self._stand_ins = stand_ins_for(param for _, param in self._parameters())
            with standing(self.injection.model, self._stand_ins):
                self.rules = gradient_rules(self.injection) if self._stand_ins else self.rules
        self._exchange(self._stand_ins)
        try:
            yield
        finally:
            self._exchange({stand_in: piece for piece, stand_in in self._stand_ins.items()})

    def _exchange(self, others: dict[nn.Parameter, nn.Parameter]) -> None:
        for group in self.param_groups:
            group["params"] = [others.get(param, param) for param in group["params"]]

    def _set_aside(self, group: dict[str, Any], aside: list[_Aside]) -> None:
        """Replace the gradients in a group by projected gradients. If a rule restores updates, the parameter's values
        are also replaced by zeros in the projected shape."""
        in_place = 0
        for param in group["params"]:
            grad = param.grad
            if grad is None:
                continue
            rule, projected = self._projected(param, grad)
            if rule is None:
                in_place += 1
                continue
            restores = type(rule).restore is not GradientRule.restore
            in_place += not restores
            aside.append(_Aside(param, rule, param.data if restores else None, grad, group))
            param.grad = None
            if restores:
                whole, param.data = param.shape, torch.zeros_like(projected, dtype=param.dtype)
                self._shrink_state(param, whole)
            param.grad = projected.to(param.dtype)
        if not in_place and "weight_decay" in group:
            group["weight_decay"] = 0.0  # an optimizer that decays last would shrink the update

    def _projected(self, param: nn.Parameter, grad: Tensor) -> tuple[GradientRule | None, Tensor]:
        """Returns the first rule that changes a parameter's gradient, and the projected gradient; None and the same
        gradient if no rule changes it."""
        for rule in self.rules:
            projected = rule.project(grad, param)
            if projected is not grad:
                return rule, projected
        return None, grad

    def _shrink_state(self, param: nn.Parameter, whole: torch.Size) -> None:
        """Change the optimizer's state of a parameter to the projected shape, if the optimizer created the state when
        it was built. Such state has the same value in all entries."""
        for key, value in self.inner.state.get(param, {}).items():
            if isinstance(value, Tensor) and value.shape == whole != param.shape:
                self.inner.state[param][key] = value.flatten()[:1].expand(param.shape).clone()

    def _parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        return enumerate(param for group in self.param_groups for param in group["params"])

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the wrapped optimizer, with one more key for the number of steps, the state of the
        rules, and the non-persistent buffers of methods."""
        with self._whole():
            rules = [{i: dict(rule.state[p]) for i, p in self._parameters() if p in rule.state} for rule in self.rules]
            ours = {"steps": self.steps, "rules": rules, "buffers": dict(transient(self.injection))}
            return {**self.inner.state_dict(), KEY: ours}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a saved state. Training then continues exactly.

        Raises:
            TrainingError: the state was not saved by a `MethodOptimizer`, or belongs to another injection.
        """
        ours = state_dict.get(KEY)
        buffers = dict(transient(self.injection))
        if ours is None or ours["buffers"].keys() != buffers.keys():
            raise TrainingError(
                "this optimizer state belongs to another injection or optimizer; create both as they were when it was "
                "saved"
            )
        with self._whole():
            self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != KEY})
            self._share()
            for rule, kept in zip(self.rules, ours["rules"], strict=True):
                rule.state.clear()
                for index, param in self._parameters():
                    if index in kept:
                        rule.state[param] = {k: _copied(v, param.device) for k, v in kept[index].items()}
        self.steps = ours["steps"]
        for name, buffer in buffers.items():
            buffer.copy_(ours["buffers"][name])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()


@dataclass(frozen=True)
class _Aside:
    """A parameter for which the wrapped optimizer temporarily gets another gradient, and possibly another tensor."""

    param: nn.Parameter
    rule: GradientRule
    data: Tensor | None
    """The parameter's own tensor, if another one replaces it; otherwise None."""
    grad: Tensor
    group: dict[str, Any]

    def put_back(self) -> Tensor:
        """Restore the parameter's tensor and gradient. Returns the tensor that replaced the former."""
        stood, self.param.grad = self.param.data, None
        if self.data is not None:
            self.param.data = self.data
        self.param.grad = self.grad
        return stood


@contextmanager
def _decay_kept(groups: list[dict[str, Any]]) -> Iterator[None]:
    """Context manager that restores the weight decay of each parameter group at the end."""
    kept = [(group, group["weight_decay"]) for group in groups if "weight_decay" in group]
    try:
        yield
    finally:
        for group, decay in kept:
            group["weight_decay"] = decay


def _copied(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def transient(injection: AppliedMethod) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the tensor of each non-persistent buffer of an injection. These buffers are a method's state
    between training steps, and are not saved in adapter files."""
    for path, module in injection.modules():
        for prefix, inner in module.named_modules():
            for name in sorted(inner._non_persistent_buffers_set):
                yield ".".join(filter(None, (path, prefix, name))), inner.get_buffer(name)


def method_optimizer(
    injection: AppliedMethod, cls: Callable[..., Optimizer], lr: float, total_steps: int | None, options: dict[str, Any]
) -> Optimizer:
    """Returns the optimizer for `Injection.optimizer`."""
    if total_steps is not None:
        check_steps(injection, total_steps)
    method = injection.method
    groups = [group for group in method.parameter_groups(injection, lr=lr, **options) if group["params"]]
    held = {parameter for group in groups for parameter in group["params"]}
    others = [p for p in injection.parameters() if p.requires_grad and p not in held]
    groups += [{"params": others, "lr": lr, **options}] if others else []
    if not groups:
        raise TrainingError(f"{injection.name!r} is frozen; call trainable() before making its optimizer")
    inner = cls(groups, lr=lr, **options)
    rules = gradient_rules(injection)
    if not rules and not any(True for _ in scheduled(injection)):
        return inner
    return MethodOptimizer(injection, inner, rules, total_steps)


def gradient_rules(injection: AppliedMethod) -> list[GradientRule]:
    """Returns the method's rule for gradients, if it has one; for a hybrid, the rules of its parts."""
    rules = [each.method.gradient_rule(each) for each in injection.family()]
    return [rule for rule in rules if rule is not None]


@torch.no_grad()
def take_steps(family: Iterable[AppliedMethod], step: int, total: int) -> None:
    """Call `on_step` of each method after one step of the optimizer."""
    for each in family:
        with gathered(each.model, each.parameters):
            each.method.on_step(each, step, total)
        each.steps_taken = step


def scheduled(injection: AppliedMethod) -> Iterator[AppliedMethod]:
    """Returns an iterator over those methods that have a schedule: the injection itself, or parts of a hybrid."""
    return (each for each in injection.family() if each.method.follows_steps(each.config))


def check_steps(injection: AppliedMethod, total: int) -> None:
    """Check that the schedules of methods fit into this number of steps.

    Raises:
        TrainingError: the schedule of a method needs more steps.
    """
    for each in scheduled(injection):
        each.method.check_steps(each.config, total)


@contextmanager
def whole_step(injection: AppliedMethod, optimizer: Optimizer, schedule: LRScheduler | None) -> Iterator[None]:
    """Context manager for one step of an adapter's optimizer, method and learning rate scheduler. If the step raises an
    error, the adapter's values and the state of all three are restored."""
    rules = optimizer.rules if isinstance(optimizer, MethodOptimizer) else []
    states = [optimizer.state, *(rule.state for rule in rules)]
    remembered = [{key: dict(held) for key, held in each.items()} for each in states]
    tensors = _changing(injection, optimizer)
    tensors += [each for state in remembered for held in state.values() for each in held.values() if _is_tensor(each)]
    values = [each.detach().clone() for each in tensors]
    groups = [dict(group) for group in optimizer.param_groups]
    rates = None if schedule is None else tree_map(_kept, schedule.state_dict())
    taken = [(each, each.steps_taken) for each in injection.family()]
    steps = optimizer.steps if isinstance(optimizer, MethodOptimizer) else 0
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for state, before in zip(states, remembered, strict=True):
            state.clear()
            state.update(before)
        if schedule is not None and rates is not None:
            schedule.load_state_dict(rates)
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            group.clear()
            group.update(options)
        for applied, count in taken:
            applied.steps_taken = count
        if isinstance(optimizer, MethodOptimizer):
            optimizer.steps = steps
        raise


def _changing(injection: AppliedMethod, optimizer: Optimizer) -> list[Tensor]:
    """Returns the tensors of an adapter that a step may write to, each once."""
    found: list[Tensor] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    found += [*injection.parameters(), *(each for _, module in injection.modules() for each in module.buffers())]
    return [*{id(each): each for each in found if not each.is_meta}.values()]


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _kept(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


@contextmanager
def whole_state(optimizer: Optimizer) -> Iterator[None]:
    """Context manager that gathers an optimizer's state of sharded parameters into full tensors.

    All processes have to enter it."""
    pieces = [(held, key, each) for held, key, each in _state_tensors(optimizer) if is_cut(each)]
    try:
        for held, key, each in pieces:
            held[key] = whole(each)
        yield
    finally:
        for held, key, each in pieces:
            held[key] = each


def cut_state(optimizer: Optimizer) -> None:
    """Shard an optimizer's state of sharded parameters in the same way as the parameters."""
    for parameter, held in optimizer.state.items():
        for key, each in held.items():
            if is_cut(parameter) and isinstance(each, Tensor) and each.shape == parameter.shape:
                held[key] = cut_like(each, parameter)


def _state_tensors(optimizer: Optimizer) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for held in optimizer.state.values():
        yield from ((held, key, each) for key, each in held.items() if isinstance(each, Tensor))
