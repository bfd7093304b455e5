"""The configurations in the attribute `peft_config` of a `PeftModel`. If an adapter was made from a configuration of
peft, the attribute contains this configuration, otherwise an `AdapterConfig`. `add_adapter` creates a further adapter
from either of them, as trainers do for a reference model."""

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
"""A task type that peft itself does not have. In peft's table of model classes, its entry is the `get_peft_model` of
`peftcore.compat`."""


@dataclass
class AdapterConfig(PeftConfig):  # type: ignore[misc]
    """A configuration of peft that describes an adapter of any method of peftcore.

    Attributes:
        kind: the class of the adapter's method.
        options: the options of the method.
        wishes: the other arguments of `peftcore.apply` for the adapter; for a loaded adapter, the sites in its file.
        method: the method that was passed to `method_config`; `kind`, `options` and `wishes` are then None.
        arguments: other arguments of `peftcore.apply`, for `method`.
    """

    kind: type[Method] | None = None
    options: MethodConfig | None = None
    wishes: Wishes | None = None
    method: Any = None
    arguments: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Set the task type to `TASK`, so that peft's `get_peft_model` calls the function of the same name in
        `peftcore.compat`."""
        self.task_type = TASK


def method_config(method: Any, **arguments: Any) -> AdapterConfig:
    """Returns a configuration for the argument ``peft_config`` of trainers that create the `PeftModel` themselves:

        trl.SFTTrainer(model, peft_config=method_config("dora", rank=8), ...)

    Args:
        method: a method, as for `peftcore.apply`.
        arguments: other arguments of `peftcore.apply`, such as options of the method.
    """
    return AdapterConfig(peft_type="PEFTCORE", method=method, arguments=arguments)


def config_of(injection: Injection) -> AdapterConfig:
    """Returns the configuration of an adapter that was not made from a configuration of peft."""
    kind = type(injection.method)
    return AdapterConfig(peft_type=kind.name, kind=kind, options=injection.config, wishes=injection.wishes)


def apply_beside(model: nn.Module, name: str, method: Any, options: Mapping[str, Any]) -> Injection:
    """Apply a further adapter to a model. The new adapter is trainable but not active, and the active adapters do not
    change.

    Args:
        model: the host; changed in place.
        name: the adapter's name.
        method: a method or a configuration of peft, as for `peftcore.apply`; or an `AdapterConfig`, from which a fresh
            adapter is created with the same seed.
        options: other arguments of `peftcore.apply`.

    Raises:
        PeftcoreError: as `peftcore.apply`; the host was not changed.
        ConfigError: an `AdapterConfig` is passed together with options, or does not describe an adapter.
        CalibrationError: the method of the `AdapterConfig` needs data before training.
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
    """Check that two adapters with the same configuration would compute the same if their parameters had equal values.

    Raises:
        ConfigError: one adapter has tensors that the other lacks, or their buffers have different values.
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
    """Switch off the dropout of an adapter; its options do not change.

    Raises:
        TrainingError: the adapter's options set a dropout, but its modules have none that can be switched off.
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
    """Returns the names of an adapter's dropout options that are switched on."""
    options = [option for each in injection.family() for option in each.config.model_dump().items()]
    return sorted({name for name, value in options if "dropout" in name and value})


def _buffers(injection: Injection) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in injection.modules():
        for name, buffer in module.named_buffers():
            yield f"{path}.{name}", buffer


@contextmanager
def _nothing_active(model: nn.Module) -> Iterator[None]:
    """Context manager in which no adapter is active, so that a new adapter is built from the base alone and cannot
    conflict with active adapters. At the end, the adapters that were active before are activated again."""
    found = injections(model)
    active = [name for name, injection in found.items() if injection.active]
    try:
        if found:
            activate(model)
        yield
    finally:
        if found:
            activate(model, *active)
