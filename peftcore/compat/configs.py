"""Entries of ``peft_config``: for an adapter peft's own configuration where it was made of one, otherwise an
`AdapterConfig`. Of both another adapter can be made, as trainers do for a reference model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn

from peftcore.contract.config import MethodConfig
from peftcore.contract.method import Method
from peftcore.contract.operators import _Base, turn_off_dropout
from peftcore.contract.surgeon_protocol import Wishes
from peftcore.errors import CalibrationError, ConfigError, TrainingError
from peftcore.injection.applying import apply, apply_request
from peftcore.injection.injection import Injection, injections
from peftcore.injection.request import Request
from peftcore.injection.switching import activate

TASK = "PEFTCORE"
"""A task for peft's table of classes by tasks, which leads to ours."""


@dataclass
class AdapterConfig(PeftConfig):  # type: ignore[misc]
    """An adapter of any method, as a configuration of peft.

    Attributes:
        kind: the class of its method.
        options: its options.
        wishes: the other arguments with which it was applied; where it was loaded, the places of the file.
        method: of `method_config`, the method; the three above are None then.
        arguments: other arguments of `peftcore.apply`.
    """

    kind: type[Method] | None = None
    options: MethodConfig | None = None
    wishes: Wishes | None = None
    method: Any = None
    arguments: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Take a task that peft does not know: by it peft's functions come to ours."""
        self.task_type = TASK


def method_config(method: Any, **arguments: Any) -> AdapterConfig:
    """Returns a configuration for ``peft_config=`` of trainers that make the model of peft themselves:

        trl.SFTTrainer(model, peft_config=method_config("dora", rank=8), ...)

    Args:
        method: as `peftcore.apply` takes it.
        arguments: other arguments of `peftcore.apply`, options of the method among them.
    """
    return AdapterConfig(peft_type="PEFTCORE", method=method, arguments=arguments)


def config_of(injection: Injection) -> AdapterConfig:
    """Returns the configuration of an adapter that was made of none of peft's."""
    kind = type(injection.method)
    return AdapterConfig(peft_type=kind.name, kind=kind, options=injection.config, wishes=injection.wishes)


def apply_beside(model: nn.Module, name: str, method: Any, options: Mapping[str, Any]) -> Injection:
    """Apply one more adapter, which is trainable but not active yet; active adapters stay active.

    Args:
        model: the host; changed in place.
        name: the adapter's name.
        method: what `peftcore.apply` takes, configurations of peft among it; or an `AdapterConfig`, of which a fresh
            adapter is made, drawn from the same seed.
        options: other arguments of `peftcore.apply`.

    Raises:
        PeftcoreError: as `peftcore.apply`; the host was not changed.
        ConfigError: an `AdapterConfig` is given with options, or describes an adapter that cannot be made again from a
            method and its options.
        CalibrationError: the method of an `AdapterConfig` looks at data first.
    """
    if isinstance(method, AdapterConfig) and method.method is not None:
        method, options = method.method, {**(method.arguments or {}), **options}
    if not isinstance(method, AdapterConfig):
        with _nothing_active(model):
            return apply(model, method, name=name, **options)
    if options:
        raise ConfigError(
            f"this configuration already has all options; to change {sorted(options)}, pass the name of the method"
        )
    if method.kind is None or method.options is None or method.wishes is None:
        raise ConfigError(
            'this AdapterConfig describes no adapter: pass one of model.peft_config, or a method such as "lora"'
        )
    request = Request(model, method.kind(), method.options, method.wishes, name=name, active=False)
    try:
        with _nothing_active(model):
            return apply_request(request)
    except CalibrationError:
        raise CalibrationError(
            f"{method.kind.name} looks at data before training, so its configuration alone makes no adapter: "
            "peftcore.apply(model.get_base_model(), ..., name=..., data=batches)"
        ) from None


def check_same_state(one: Injection, other: Injection) -> None:
    """Check that two adapters of one configuration compute the same once their parameters are the same.

    Raises:
        ConfigError: one has tensors that the other lacks, or state that is not a parameter.
    """
    shapes = [{key: value.shape for key, value in each.state_dict().items()} for each in (one, other)]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"{other.name!r} has other tensors than a new adapter with its configuration, as files of peft allow: load "
            "it under another name instead, model.load_adapter(folder, name), or pass a ref_model to the trainer"
        )
    for (path, mine), (_, theirs) in zip(_buffers(one), _buffers(other), strict=True):
        if mine.shape != theirs.shape or not torch.equal(mine, theirs):
            raise ConfigError(
                f"{other.name!r} has state at {path} that its configuration does not describe: a new adapter with this "
                "configuration would differ, even with the same parameters. Load it under another name instead, "
                "model.load_adapter(folder, name), or pass a ref_model to the trainer"
            )


def drop_nothing(injection: Injection) -> None:
    """Let an adapter drop nothing in training any more; its options stay what they were.

    Raises:
        TrainingError: it has options by which it drops something, and nothing that could be turned off.
    """
    if not (options := _dropouts_of(injection)):
        return
    found = [
        module.drop_nothing() if isinstance(module, _Base) else turn_off_dropout(module)
        for _, module in injection.modules()
    ]
    if not any(found):
        raise TrainingError(
            f"dropout was turned off in the modules of the model, but that of {injection.name!r} stays on: apply it "
            f"with {options[0]}=0, or leave dropout on (disable_dropout=False in TRL)"
        )


def _dropouts_of(injection: Injection) -> list[str]:
    """Returns the options by which an adapter drops something in training."""
    options = [option for each in injection.family() for option in each.config.model_dump().items()]
    return sorted({name for name, value in options if "dropout" in name and value})


def _buffers(injection: Injection) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in injection.modules():
        for name, buffer in module.named_buffers():
            yield f"{path}.{name}", buffer


@contextmanager
def _nothing_active(model: nn.Module) -> Iterator[None]:
    """Context manager in which no adapter acts, so that a new one is made of the base alone and need not act with those
    that do; these act after it, and none else."""
    found = injections(model)
    active = [name for name, injection in found.items() if injection.active]
    try:
        if found:
            activate(model)
        yield
    finally:
        if found:
            activate(model, *active)
