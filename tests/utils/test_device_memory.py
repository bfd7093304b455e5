"""What certainly does not fit into the memory of a device is refused before anything is allocated; what fits is not."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from core_toys import perceptron
from torch import nn

import peftcore
from peftcore.errors import MemoryLimit
from peftcore.injection.merging import merge_bytes
from peftcore.models.resource_counters import StorageCounter
from peftcore.testing.snapshots import Scene, snapshot
from peftcore.utils import device_memory
from peftcore.utils.device_memory import check_room, free_bytes, totals

CPU = torch.device("cpu")


def adapted() -> nn.Module:
    """A perceptron with a LoRA at both layers."""
    model = perceptron()
    torch.manual_seed(0)
    injection = peftcore.apply(model, "lora", name="a", target=["first", "second"], rank=2)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1)
    return model


def weights(model: nn.Module) -> int:
    return sum(model.get_submodule(path).weight.nbytes for path in ("first", "second"))


def merge(model: nn.Module) -> None:
    peftcore.injections(model)["a"].merge()


def quantized() -> nn.Module:
    return peftcore.quantize(perceptron(), "int8", target=["first", "second"])


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Path], object], Callable[[nn.Module], int]]] = {
    "merge": (adapted, lambda model, _: merge(model), weights),
    "dequantize": (
        quantized,
        lambda model, _: peftcore.dequantize(model),
        lambda model: weights(peftcore.dequantize(model)),
    ),
    "load": (
        perceptron,
        lambda model, folder: peftcore.load(model, folder),
        lambda model: sum(each.nbytes for each in peftcore.injections(adapted())["a"].parameters()),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_byte_too_few_is_refused_and_enough_is_not(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, operation, needs = CASES[name]
    peftcore.injections(adapted())["a"].save(tmp_path / "a")
    needed, model = needs(make()), make()
    before = snapshot(Scene(model))
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: needed - 1)
    with StorageCounter([*model.parameters(), *model.buffers()]) as counter, pytest.raises(MemoryLimit) as raised:
        begin = counter.alive
        operation(model, tmp_path / "a")
    assert f"at least {needed:,} bytes" in str(raised.value) and f"and {needed - 1:,} are free" in str(raised.value)
    assert before.differences(snapshot(Scene(model)), same_scene=True) == []
    assert name == "load" or counter.peak - begin < needed, "the refusal itself allocates nothing of that size"
    monkeypatch.setattr(device_memory, "free_bytes", lambda device: needed)
    operation(model, tmp_path / "a")


def test_the_memory_of_a_cpu_is_not_known_and_refuses_nothing() -> None:
    assert free_bytes(CPU) is None
    check_room({CPU: 10**18}, "it", "")


def test_bytes_are_summed_by_device_and_each_device_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = torch.device("cuda", 0), torch.device("cuda", 1)
    found = totals([(one, 3), (other, 4), (one, 5)])
    assert found == {one: 8, other: 4}
    monkeypatch.setattr(device_memory, "free_bytes", {one: 8, other: 3}.__getitem__)
    with pytest.raises(MemoryLimit, match=r"needs at least 4 bytes of cuda:1, and 3 are free; .* do this"):
        check_room(found, "it", "do this")


def test_blocks_that_torch_has_cached_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {"mem_get_info": (100, 1000), "memory_reserved": 50, "memory_allocated": 30}
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 120


def test_a_merge_of_weights_that_are_tied_counts_them_once() -> None:
    model = adapted()
    assert merge_bytes(peftcore.injections(model)["a"]) == {CPU: weights(model)}
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    tied = peftcore.apply(model, "lora", target=["0", "1"], rank=2)
    assert merge_bytes(tied) == {CPU: 4 * 4 * 4}
