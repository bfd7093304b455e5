"""Modules that are replaced or taken out after an adapter was applied are missed in the next forward; modules that are
wrapped or moved go on to act."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from process_groups import process_group
from torch import nn

import peftcore
from peftcore.errors import InactiveSite, MergeError
from peftcore.testing.kit import fill

X = torch.linspace(-1, 1, 12).view(3, 4)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.inner(x)
        return output


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh())


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(block(), block(), nn.Linear(4, 4)).eval()


def adapted(model: nn.Module, method: str = "lora") -> peftcore.Injection:
    injection = peftcore.apply(model, method, target=nn.Linear)
    fill(injection, 0)
    return injection


def other_layer(model: nn.Module) -> None:
    model[0][0] = nn.Linear(4, 4)


def other_block(model: nn.Module) -> None:
    model[0] = block()


def one_less(model: nn.Module) -> None:
    del model[1]


@pytest.mark.parametrize("ran", [True, False], ids=["after a forward", "before any"])
@pytest.mark.parametrize("method", ["lora", "dora", "bitfit"])
@pytest.mark.parametrize("change", [other_layer, other_block, one_less])
def test_what_is_there_no_longer_is_missed(
    model: nn.Module, change: Callable[[nn.Module], None], method: str, ran: bool
) -> None:
    injection = adapted(model, method)
    if ran:
        model(X)
    change(model)
    for _ in range(2):
        with pytest.raises(InactiveSite, match=r"(0\.0|1\.0).*: replaced or taken out of the model since"):
            model(X)
    peftcore.activate(model)
    model(X)  # the bare model is what it is now
    injection.remove()
    again = peftcore.apply(model, method, target=nn.Linear)
    model(X)
    again.check()


def test_a_part_that_runs_alone_misses_them_too(model: nn.Module) -> None:
    adapted(model)
    other_layer(model)
    with pytest.raises(InactiveSite, match="replaced"):
        model[1](X)


def test_another_adapter_whose_modules_are_there_acts(model: nn.Module) -> None:
    adapted(model)
    last = peftcore.apply(model, "lora", target="2", name="last")
    fill(last, 1)
    peftcore.activate(model, "last")
    other_layer(model)
    model(X)
    with pytest.raises(InactiveSite), peftcore.activate(model, "lora"):
        model(X)


def test_what_is_wrapped_or_moved_acts(model: nn.Module) -> None:
    injection = adapted(model)
    before = model(X)
    model[0] = Wrapper(model[0])
    model[1][0] = Wrapper(model[1][0])
    assert torch.equal(model(X), before)
    model[1] = torch.compile(model[1], backend="eager")
    torch.testing.assert_close(model(X), before)
    with injection.disabled():
        assert not torch.allclose(model(X), before)


def test_layers_in_another_order(model: nn.Module) -> None:
    adapted(model)
    by_hand = model[2](model[0](model[1](X)))
    first, second = model[0], model[1]
    model[0], model[1] = second, first
    torch.testing.assert_close(model(X), by_hand)


@pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_watched_by_themselves(model: nn.Module, through: Callable[[nn.Module], nn.Module]) -> None:
    adapted(model)
    before = model(X)
    copied = through(model)
    other_layer(copied)
    with pytest.raises(InactiveSite):
        copied(X)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("method", ["lora", "svdiff", "dora", "ln_tuning"])
def test_a_table_that_is_resized_in_place_is_missed(method: str) -> None:
    """As transformers does it: the module stays, with more rows."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4))
    options = {"train": ["0"]} if method == "ln_tuning" else {"target": "0"}
    fill(peftcore.apply(model, method, **options), 0)
    ids = torch.arange(6).view(2, 3)
    model(ids)
    model[0].weight.data = torch.cat([model[0].weight.data, torch.zeros(2, 4)])
    for _ in range(2):
        with pytest.raises(InactiveSite, match=r"0.*resized from \[(4, 10|10, 4)\] to \[(4, 12|12, 4)\]"):
            model(ids)
    with pytest.raises(MergeError, match="resized from"):
        peftcore.injections(model)[method].merge()
    with peftcore.activate(model):
        model(ids)


@pytest.mark.parametrize("method", ["lora", "bitfit"])
def test_what_was_cut_over_processes_is_missed(method: str, model: nn.Module) -> None:
    """Tensor parallelism of a model that has an adapter; sharding by FSDP2 gathers what the forward uses."""
    tensors = pytest.importorskip("torch.distributed.tensor")
    with process_group(store=dist.HashStore(), rank=0, world_size=1):
        adapted(model, method)
        mesh = tensors.init_device_mesh("cpu", (1,))
        for name, value in dict(model[2].named_parameters(recurse=False)).items():
            cut = tensors.distribute_tensor(value.detach(), mesh, [tensors.Shard(0)])
            model[2].register_parameter(name, nn.Parameter(cut))
        with torch.no_grad(), pytest.raises(InactiveSite, match=r"^2.*: sharded over processes after .* load it again"):
            model(X)
