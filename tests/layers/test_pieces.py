"""Parameters in pieces, whoever cut them; DeepSpeed is played by a stand-in, which frees and gathers as ZeRO-3 does."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from core_toys import perceptron, stir
from torch import nn

import peftcore
from peftcore.errors import ExportError, HostMismatch, MergeError, SwapError, TrainingError, UnsupportedHost
from peftcore.layers.fsdp import gathered, is_sharded
from peftcore.layers.pieces import at_hand, is_cut, is_empty, is_in_engine, is_partitioned, outline, whole

X = torch.linspace(-1, 1, 12).view(3, 4)


class Gathered:
    """Parameters that are whole in the block, and empty behind it."""

    def __init__(self, parameters: list[Any]) -> None:
        self.parameters = parameters
        assert all(each.shape == (0,) for each in parameters), "those that others gathered are left alone"

    def __enter__(self) -> None:
        for each in self.parameters:
            each.data = each.ds_tensor.clone()

    def __exit__(self, *_: Any) -> None:
        for each in self.parameters:
            each.data = torch.empty(0)


class EngineParameters(dict[str, Any]):
    """What the engine puts in the place of a module's parameters."""


def partition(model: nn.Module) -> None:
    """Cut a model's parameters apart, as `zero.Init` and `deepspeed.initialize` do."""
    parameters: list[Any] = [*model.parameters()]
    for each in parameters:
        if not hasattr(each, "ds_tensor"):
            each.ds_tensor, each.ds_shape = each.detach().clone(), each.shape
            each.data = torch.empty(0)


def hand_over(model: nn.Module) -> None:
    """Let the engine have a model."""
    partition(model)
    for module in model.modules():
        module.__dict__["_parameters"] = EngineParameters(module._parameters)


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """DeepSpeed, in a group of one process."""
    cutting, offload = ModuleType("partition_parameters"), ModuleType("parameter_offload")
    vars(cutting).update(is_zero_param=lambda each: hasattr(each, "ds_tensor"), GatheredParameters=Gathered)
    vars(offload).update(ZeROOrderedDict=EngineParameters)
    for module in (cutting, offload):
        monkeypatch.setitem(sys.modules, f"deepspeed.runtime.zero.{module.__name__}", module)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_plain_tensor_is_whole_and_stays_itself() -> None:
    weight = perceptron().first.weight
    assert not (is_cut(weight) or is_partitioned(weight) or is_empty(weight))
    assert whole(weight) is weight and outline(weight) is weight
    assert not is_in_engine(perceptron())


@pytest.mark.usefixtures("deepspeed")
def test_values_and_shapes_of_what_is_cut_apart() -> None:
    model = perceptron()
    weight = model.first.weight
    expected = weight.detach().clone()
    partition(model)
    assert weight.shape == (0,) and is_partitioned(weight) and is_empty(weight) and is_sharded(model)
    assert outline(weight).shape == expected.shape and outline(weight).is_meta
    assert torch.equal(whole(weight), expected) and is_empty(weight)
    with at_hand(model.parameters()), at_hand(model.parameters()):
        assert torch.equal(weight, expected) and is_partitioned(weight) and not is_empty(weight)
    assert is_empty(weight)


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("method", ["lora", "dora", "bitfit", "pissa"])
def test_a_model_that_was_made_in_pieces_is_adapted_as_a_whole_one(method: str, tmp_path: Path) -> None:
    alike = perceptron()
    options: dict[str, Any] = {"target": ["first", "second"], "seed": 0, "train": []}
    one = peftcore.apply(alike, method, **options)
    model = perceptron()
    model.load_state_dict(alike.state_dict(), strict=False)
    partition(model)
    other = peftcore.apply(model, method, **options)
    assert all(each.shape == (0,) for name, each in model.named_parameters() if "peft" not in name)
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and mine
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    stir(other)
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    assert peftcore.plan(model, method, **options).trainable == peftcore.plan(alike, method, **options).trainable
    loaded = peftcore.load(model, tmp_path / "other", name="loaded")
    assert all(torch.equal(each, theirs[name]) for name, each in loaded.state_dict().items())


@pytest.mark.usefixtures("deepspeed")
def test_an_adapter_that_is_cut_apart_is_saved_whole_and_nothing_else_is_done_with_it(tmp_path: Path) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"], rank=2)
    stir(injection)
    injection.save(tmp_path / "before")
    other = peftcore.load(perceptron(), tmp_path / "before")
    hand_over(model)
    injection.save(tmp_path / "after")
    for name in ("adapter.safetensors", "adapter.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    assert all(map(is_empty, injection.parameters()))
    refused: list[tuple[Any, type[Exception], str]] = [
        (injection.state_dict, ExportError, "call save"),
        (injection.merge, MergeError, "outside of DeepSpeed"),
        (lambda: injection.swap(other), SwapError, "before deepspeed.initialize"),
        (lambda: peftcore.apply(model, "lora", name="late"), UnsupportedHost, "before deepspeed.initialize"),
        (lambda: peftcore.load(model, tmp_path / "before", name="late"), HostMismatch, "before deepspeed.initialize"),
    ]
    for call, error, words in refused:
        with pytest.raises(error, match=words):
            call()
    with pytest.raises(TrainingError, match="stage 2"), gathered(model, injection.parameters):
        pytest.fail("what is written would be lost")


def test_a_schedule_on_parameters_that_somebody_exchanged() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "adalora", target=["first", "second"])
    optimizer = injection.optimizer(torch.optim.AdamW, lr=1e-2, total_steps=4)
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]  # as ZeRO does
    del optimizer.param_groups[1:]
    with pytest.raises(TrainingError, match="DeepSpeed"):
        optimizer.step()
