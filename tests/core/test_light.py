"""A light module is what torch's own would be, after everything that may be done to its attributes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from peftcore.light import LightModule

PARAMETER, OTHER, CHILD, BUFFER = (
    nn.Parameter(torch.ones(2)),
    nn.Parameter(torch.zeros(3)),
    nn.ReLU(),
    nn.Buffer(torch.ones(1)),
)
VALUES: dict[str, Any] = {
    "number": 1.5,
    "none": None,
    "text": "text",
    "list": [1],
    "tensor": torch.ones(2),
    "parameter": PARAMETER,
    "other parameter": OTHER,
    "buffer": BUFFER,
    "module": CHILD,
    "derived tensor": nn.Parameter(torch.ones(2)).clone(),
    "derived parameter": nn.Parameter(torch.ones(2), requires_grad=False).add_(nn.Parameter(torch.ones(2))),
}


class Settings:
    """What a class may have under the names that the tests set."""

    fixed = 1
    empty: Any = None

    @property
    def doubled(self) -> Any:
        return self._doubled

    @doubled.setter
    def doubled(self, value: Any) -> None:
        self._doubled = (value, value)


class Light(Settings, LightModule):
    pass


class Torchs(Settings, nn.Module):
    pass


def outcome(module: nn.Module, act: Callable[[Any], object]) -> tuple[Any, ...]:
    """What an action does to a module: the error, or nothing; and all that it has afterwards."""
    error: Any = None
    try:
        act(module)
    except (TypeError, KeyError, ValueError, AttributeError) as raised:
        error = type(raised), str(raised).replace("Light", "Torchs")
    own = {key: list(value.items()) if isinstance(value, dict) else value for key, value in everything(module).items()}
    return error, _told(own)


def everything(module: nn.Module) -> dict[str, Any]:
    """What a module has, with the tables of hooks that nobody has asked for yet."""
    if "_non_persistent_buffers_set" in vars(module):  # else its constructor has not run
        for name in vars(nn.Module()):
            if "hooks" in name:
                getattr(module, name)
    return vars(module)


def _told(value: Any) -> Any:
    """In a form that can be compared: tensors and modules by identity."""
    if isinstance(value, dict):
        return {key: _told(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    return id(value) if isinstance(value, Tensor | nn.Module) else value


def alike(act: Callable[[Any], object]) -> None:
    light, torchs = outcome(Light(), act), outcome(Torchs(), act)
    assert light == torchs


def test_a_new_one_has_what_torchs_has_and_shares_nothing() -> None:
    light, second, torchs = LightModule(), LightModule(), nn.Module()
    assert everything(light) == vars(torchs)
    for name, value in vars(light).items():
        assert type(value) is type(vars(torchs)[name])
        if isinstance(value, dict | set | list):
            assert value is not everything(second)[name]


def test_tables_of_hooks_are_there_when_somebody_asks() -> None:
    light, second = LightModule(), LightModule()
    assert not any("hooks" in name for name in vars(light))
    handle = light.register_forward_hook(lambda module, args, output: 2 * output)
    light.forward = lambda x: x
    assert light(1) == 2
    assert copy.deepcopy(light)(1) == 2
    assert len(light._forward_hooks) == 1
    assert light._forward_hooks is light._forward_hooks
    assert not second._forward_hooks
    handle.remove()
    assert light(1) == 1


@pytest.mark.parametrize("name", ["x", "fixed", "empty", "doubled", "a.b", "", "training", "_parameters", "forward"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_first_value(name: str, value: Any) -> None:
    alike(lambda module: setattr(module, name, value))


@pytest.mark.parametrize("after", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("before", VALUES.values(), ids=VALUES)
def test_one_value_after_another(before: Any, after: Any) -> None:
    def act(module: Any) -> None:
        with contextlib.suppress(TypeError):
            module.x = before
        module.x = after

    alike(act)


def test_names_that_are_registered_empty() -> None:
    for value in VALUES.values():
        alike(lambda module, value=value: (module.register_parameter("x", None), setattr(module, "x", value)))
        alike(lambda module, value=value: (module.register_buffer("x", None), setattr(module, "x", value)))
        alike(lambda module, value=value: (module.register_module("x", None), setattr(module, "x", value)))


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_before_it_is_initialized(value: Any) -> None:
    def made(cls: type) -> Any:
        return cls.__new__(cls)

    light, torchs = (outcome(made(cls), lambda module: setattr(module, "x", value)) for cls in (Light, Torchs))
    assert light == torchs


def test_who_wants_to_know_of_parameters_is_told() -> None:
    told: list[str] = []
    handle = register_module_parameter_registration_hook(lambda module, name, parameter: told.append(name))
    try:
        LightModule().x = PARAMETER
    finally:
        handle.remove()
    assert told == ["x"]


def test_copies() -> None:
    light = LightModule()
    light.x, light.y, light.z = nn.Parameter(torch.ones(2)), 3, nn.ReLU()
    again = copy.deepcopy(light)
    assert again.x is not light.x
    assert again.x.equal(light.x)
    assert again.y == 3
    assert [*again.state_dict()] == [*light.state_dict()] == ["x"]


class Counting(LightModule):
    """One that changes attributes while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        self.last = 2.0 * self.calls
        self.seen = x + 1
        return x * self.weight * self.calls


def test_attributes_are_set_in_a_compiled_forward() -> None:
    module, x = Counting(), torch.randn(3)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for calls in (1, 2):
        torch.testing.assert_close(compiled(x), x * calls)
        assert (module.calls, module.last) == (calls, 2.0 * calls)
        torch.testing.assert_close(module.seen, x + 1)
