"""The modules in which operators live: one level above the site, and never in a container."""

import copy
import pickle
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from core_toys import (
    Shift,
    perceptron,
    transformer,
)
from torch import Tensor, nn

import peftcore


def test_operators_live_one_level_up() -> None:
    model = transformer()
    peftcore.apply(model, "lora")
    assert model.get_submodule("layers.0.self_attn.peft.q_proj.lora").A.shape == (8, 8)
    assert [name for name, _ in model.layers[0].self_attn.named_children()][-1] == "peft"


def test_operators_of_the_hosts_own_children_live_on_the_host() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    assert "peft.first.lora.A" in model.state_dict()


class Nested(nn.Module):
    """Containers between a site and the module that owns it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4))])
        self.named = nn.ModuleDict({"a": nn.Linear(4, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for part in self.stack:
            x = part(x)
        return self.named["a"](x)


def test_operators_never_live_in_containers() -> None:
    model = Nested()
    injection = peftcore.apply(model, Shift, target=nn.Linear)
    assert [name for name, _ in model.named_children()] == ["stack", "named", "peft"]
    assert set(model.peft._modules) == {"stack__0__0", "stack__1__0", "named__a"}
    for container in (model.stack, model.stack[0], model.stack[1], model.named):
        assert "peft" not in container._modules
    x = torch.randn(3, 4)
    moved = model(x)
    injection.remove()
    assert not torch.allclose(moved, model(x), atol=1e-3)


def adapted(**options: Any) -> nn.Module:
    model = transformer()
    injection = peftcore.apply(model, "lora", target=["q_proj", "v_proj"], **options)
    for parameter in injection.parameters():
        nn.init.normal_(parameter)
    return model


def without(state: Mapping[str, Tensor], *parts: str) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def keys_of(state: Mapping[str, Tensor], part: str) -> set[str]:
    found = {key for key in state if part in key}
    assert found
    return found


SITE, BLOCK, HEAD = "layers.0.self_attn.peft.q_proj.", "layers.1.self_attn.peft.", "peft.classifier."


@pytest.mark.parametrize("part", [SITE, BLOCK, HEAD])
def test_a_state_dict_that_lacks_an_adapter_is_none_of_the_whole_model(part: str) -> None:
    model = adapted(train=["classifier"])
    state = model.state_dict()
    lacking = keys_of(state, part)
    before = {key: value.clone() for key, value in state.items()}
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(without(state, part))
    found = adapted(train=["classifier"])
    told = found.load_state_dict(without(state, part), strict=False)
    assert set(told.missing_keys) == lacking
    assert len(told.missing_keys) == len(lacking)
    assert not told.unexpected_keys
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_base_alone_loads_and_operators_keep_their_values() -> None:
    model, other = adapted(train=["classifier"]), transformer()
    nn.init.normal_(other.norm.weight)
    before = {key: value.clone() for key, value in model.state_dict().items() if "peft." in key}
    told = model.load_state_dict(other.state_dict())
    assert not told.missing_keys
    assert torch.equal(model.norm.weight, other.norm.weight)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    base = without(other.state_dict(), "norm.weight")
    with pytest.raises(RuntimeError, match=r'Missing key.*"norm.weight"'):
        model.load_state_dict(base)


def test_weights_of_the_base_load_into_a_part_of_the_model() -> None:
    model, other = adapted(), transformer()
    nn.init.normal_(other.layers[0].self_attn.o_proj.weight)
    model.layers[0].load_state_dict(other.layers[0].state_dict())
    assert torch.equal(model.layers[0].self_attn.o_proj.weight, other.layers[0].self_attn.o_proj.weight)
    model.layers[0].self_attn.load_state_dict(other.layers[0].self_attn.state_dict())
    model.layers[0].self_attn.q_proj.load_state_dict(other.layers[0].self_attn.q_proj.state_dict())


def test_of_two_adapters_both_are_wanted() -> None:
    model = adapted()
    state = model.state_dict()
    peftcore.apply(model, "lora", target="o_proj", name="second")
    told = model.load_state_dict(state, strict=False)
    assert set(told.missing_keys) == keys_of(model.state_dict(), "o_proj.second")
    peftcore.injections(model)["second"].remove()
    assert not model.load_state_dict(state).missing_keys


def test_an_adapted_model_inside_of_another_is_seen_too() -> None:
    outer = nn.ModuleDict({"actor": adapted(), "critic": nn.Linear(2, 2)})
    state = outer.state_dict()
    assert not outer.load_state_dict(state).missing_keys
    told = outer.load_state_dict(without(state, SITE), strict=False)
    assert set(told.missing_keys) == keys_of(state, SITE)
    bare = {key: value for key, value in state.items() if ".peft." not in key}
    assert not outer.load_state_dict(bare).missing_keys
    peftcore.apply(outer, "lora", target="critic", name="other")
    told = outer.load_state_dict(without(outer.state_dict(), SITE), strict=False)
    assert sorted(told.missing_keys) == sorted(keys_of(state, SITE))  # both models have looked, and each is named once


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_look_as_well_and_the_hook_goes_with_the_last_adapter(copied: Callable[[nn.Module], nn.Module]) -> None:
    model = copied(adapted())
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(without(state, SITE))
    for injection in peftcore.injections(model).values():
        injection.remove()
    assert not model._load_state_dict_pre_hooks
    assert not model.load_state_dict(without(state, "peft")).missing_keys


def test_values_are_assigned_as_well() -> None:
    model, other = adapted(), adapted()
    state = model.state_dict()
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(without(state, SITE), assign=True)
    other.load_state_dict(state, assign=True)
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
