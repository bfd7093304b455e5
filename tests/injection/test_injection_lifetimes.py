"""Who drops a host has its memory back: nothing of ours holds one that is not adapted any more, not even until Python
looks for garbage."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.errors import MergeError

METHODS = ["lora", "dora", "houlsby_adapter", "prefix_tuning", "prompt_tuning", "lst", "linear_probe", "adalora"]
HYBRIDS = [["lora", "ia3"], ["prefix_tuning", "houlsby_adapter"]]
IDS = torch.arange(8).view(2, 4)


@pytest.fixture(scope="module")
def base() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))


@pytest.fixture
def no_garbage() -> Iterator[None]:
    """Nobody looks for garbage."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left(base: nn.Module, use: Callable[[nn.Module], None]) -> int:
    """How many of a copy and its parameters are alive after it was used and dropped."""
    host = copy.deepcopy(base)
    alive = [weakref.ref(host), *map(weakref.ref, host.parameters())]
    use(host)
    del host
    return sum(each() is not None for each in alive)


def step(host: nn.Module) -> None:
    host.train()
    host(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        host.eval()(IDS)


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("method", [*METHODS, *HYBRIDS], ids=str)
def test_nothing_holds_a_host_whose_injection_was_removed(base: nn.Module, method: str | list[str]) -> None:
    def use(host: nn.Module) -> None:
        injection = peftcore.apply(host, method)
        step(host)
        host.model(IDS)  # a part by itself
        try:
            injection.merge()
            injection.unmerge()
        except MergeError:
            assert not injection.merged
        injection.remove()

    assert left(base, use) == 0


@pytest.mark.usefixtures("no_garbage")
def test_nothing_holds_a_host_that_was_looked_at(base: nn.Module) -> None:
    def use(host: nn.Module) -> None:
        assert str(peftcore.plan(host, "lora"))

    assert left(base, use) == 0


@pytest.mark.parametrize("part", [False, True])
def test_an_adapted_host_goes_with_the_garbage(base: nn.Module, part: bool) -> None:
    """It and its injections know each other."""
    host = copy.deepcopy(base)
    peftcore.apply(host, "lora")
    step(host)
    if part:
        host.model(IDS)
    alive = [weakref.ref(host), *map(weakref.ref, host.parameters())]
    del host
    gc.collect()
    assert not any(each() is not None for each in alive)
