"""What can be applied where and under which name; a refusal changes nothing."""

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import (
    Doubling,
    irregular,
    perceptron,
    snapshot,
    transformer,
)
from torch import nn

import peftcore
from peftcore.errors import (
    ConfigError,
    DuplicateInjection,
    TargetError,
    UnknownMethod,
    UnsupportedHost,
    UnsupportedSite,
)


def test_apply_returns_what_injections_lists() -> None:
    model = transformer()
    assert peftcore.injections(model) == {}
    first, second = peftcore.apply(model, "lora"), peftcore.apply(model, "lora", name="again")
    assert peftcore.injections(model) == {"lora": first, "again": second}
    assert first.model is model and first.name == "lora" and first.active and second.active


@pytest.mark.parametrize("name", ["with.dot", "", "."])
def test_names_that_cannot_be_used(name: str) -> None:
    model = perceptron()
    before = snapshot(model)
    with pytest.raises(DuplicateInjection, match="no dots"):
        peftcore.apply(model, "lora", target="first", name=name)
    assert snapshot(model) == before


@pytest.mark.parametrize("name", ["train", "forward", "half", "weight", "state_dict"])
def test_names_that_modules_use_themselves_are_refused_or_harmless(name: str) -> None:
    model = perceptron()
    before = snapshot(model)
    try:
        peftcore.apply(model, "lora", target="first", name=name)
    except DuplicateInjection as error:
        assert repr(name) in str(error)
        assert snapshot(model) == before
    else:
        assert isinstance(model.get_submodule(f"peft.first.{name}"), nn.Module)


def test_name_that_is_taken() -> None:
    model = perceptron()
    peftcore.apply(model, "lora", target="first")
    before = snapshot(model)
    with pytest.raises(DuplicateInjection, match="already has"):
        peftcore.apply(model, "lora", target="second")
    assert snapshot(model) == before


def test_name_is_free_again_after_remove() -> None:
    model = perceptron()
    for _ in range(3):
        peftcore.apply(model, "lora", target="first").remove()
    assert peftcore.apply(model, "lora", target="first").name == "lora"


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (UnknownMethod, {"method": "lorra"}),
        (ConfigError, {"method": "lora", "rank": 0}),
        (ConfigError, {"method": "lora", "dtype": "int8"}),
        (TargetError, {"method": "lora", "target": "nothing"}),
        (TargetError, {"method": "lora", "train": ["nothing"]}),
        (UnsupportedSite, {"method": "lora", "target": "norm"}),
        (UnsupportedSite, {"method": Doubling, "target": "norm.bias"}),
        (UnsupportedSite, {"method": "lora", "target": "mlp"}),
        (DuplicateInjection, {"method": "lora", "name": "a.b"}),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value),
)
def test_typed_errors_change_nothing(error: type[Exception], arguments: dict[str, Any]) -> None:
    model = irregular()
    before = snapshot(model)
    for call in (peftcore.apply, peftcore.plan):
        given = {k: v for k, v in arguments.items() if call is peftcore.apply or k != "name"}
        if call is peftcore.plan and "name" in arguments:
            continue
        with pytest.raises(error):
            call(model, **given)
        assert snapshot(model) == before


def test_instance_level_forward_is_refused() -> None:
    model = perceptron()
    model.first.forward = functools.partial(nn.Linear.forward, model.first)
    before = snapshot(model)
    with pytest.raises(UnsupportedSite, match="set on the instance"):
        peftcore.apply(model, "lora", target="first")
    assert snapshot(model) == before
    peftcore.apply(model, "lora", target="second")


def test_data_parallel_and_torchscript_are_refused() -> None:
    with pytest.raises(UnsupportedHost, match="DistributedDataParallel"):
        peftcore.apply(nn.DataParallel(perceptron()), "lora", target="first")
    scripted = torch.jit.trace(perceptron(), torch.randn(1, 4))
    with pytest.raises(UnsupportedHost, match="TorchScript"):
        peftcore.apply(scripted, "lora", target="first")


def test_host_with_a_scripted_part_can_be_adapted_elsewhere() -> None:
    model = perceptron()
    model.second = torch.jit.script(model.second)
    before = snapshot(model)
    with pytest.raises((TargetError, UnsupportedHost, UnsupportedSite)):
        peftcore.apply(model, "lora", target="second")
    assert snapshot(model) == before
    injection = peftcore.apply(model, "lora", target="first")
    model(torch.randn(2, 4)).sum().backward()
    injection.remove()
    assert snapshot(model)["modules"] == before["modules"]


def test_tensor_parallel_weights_are_refused(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
        before = [type(module) for module in model.modules()]
        with pytest.raises(UnsupportedHost, match="tensor-parallel"):
            peftcore.apply(model, "lora", target=["1"])
        assert [type(module) for module in model.modules()] == before
    finally:
        distributed.destroy_process_group()


def config(name: str, **options: Any) -> Any:
    return peftcore.method(name).Config(**options)


def test_apply_takes_a_name_a_config_and_a_class() -> None:
    cls = peftcore.method("lora")
    ways = [
        peftcore.apply(perceptron(), "lora", target="first", seed=1, rank=3),
        peftcore.apply(perceptron(), config("lora", rank=3), target="first", seed=1),
        peftcore.apply(perceptron(), cls, target="first", seed=1, rank=3),
        peftcore.apply(perceptron(), "reparameterized/lora", target="first", seed=1, rank=3),
        peftcore.apply(perceptron(), config("lora"), target="first", seed=1, rank=3),
    ]
    for injection in ways:
        assert injection.config == config("lora", rank=3)
        assert torch.equal(injection.operators["first"].A, ways[0].operators["first"].A)


def test_the_users_objects_are_not_mutated() -> None:
    overrides = {"first": {"rank": 2}}
    made = config("lora", rank=3, overrides=overrides)
    kept, kept_overrides = made.model_dump(), copy.deepcopy(overrides)
    target, train = ["first"], ["second"]
    injection = peftcore.apply(perceptron(), made, target=target, train=train)
    injection.config.replace(rank=5)
    assert made.model_dump() == kept
    assert overrides == kept_overrides
    assert (target, train) == (["first"], ["second"])


def test_what_the_user_changes_later_does_not_reach_the_injection() -> None:
    overrides = {"first": {"rank": 2}}
    injection = peftcore.apply(perceptron(), "lora", target="first", rank=3, overrides=overrides)
    overrides["first"]["rank"] = 7
    assert injection.config.overrides == {"first": {"rank": 2}}


def test_weights_that_are_cut_apart_as_they_are_made_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.empty(0))
    with pytest.raises(UnsupportedHost, match="some weights are empty"):
        peftcore.apply(model, "lora", target="0")
