"""Values of idle adapters: they are elsewhere to the last byte, and the operators stand as they did."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from core_toys import Shift, token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import IdleAdapter, UnsupportedHost
from peftcore.forward.choice.residency import Residency
from peftcore.forward.state.host_state import state_of
from peftcore.injection.idle_adapters import IdleTensor, IdleValues, MemoryStore

IDS = token_ids()


def idle(injection: peftcore.Injection) -> tuple[IdleValues, MemoryStore]:
    """The values of an injection, taken from the model into memory."""
    store = MemoryStore()
    values = IdleValues(injection, store, 0)
    values.take_out()
    return values, store


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("method", ["lora", "vera", "houlsby_adapter", "bitfit", Shift])
def test_storages_are_freed_and_values_come_back(method: str) -> None:
    model = transformer()
    injection = peftcore.apply(model, method, name="one")
    before = outputs(model)
    tensors = [each for _, module in injection.modules() for each in (*module.parameters(), *module.buffers())]
    storages = [weakref.ref(each.untyped_storage()) for each in tensors]
    bytes_before = sum(each.untyped_storage().nbytes() for each in tensors)
    values, store = idle(injection)
    assert values.bytes() == bytes_before
    assert all(each.untyped_storage().nbytes() == 0 for each in tensors)
    now = [each for _, module in injection.modules() for each in (*module.parameters(), *module.buffers())]
    assert all(isinstance(each, IdleTensor) for each in now)
    assert [each.shape for each in now] == [store.values(0, [name])[name].shape for name in store._kept[0]]
    gc.collect()
    assert not any(each() is not None and each().nbytes() for each in storages)  # type: ignore[union-attr]
    values.put_back(values.fetch())
    assert torch.equal(outputs(model), before)
    assert not store._kept
    assert not [key for _, module in injection.modules() for key in vars(module) if key in ("state_dict", "_apply")]


def test_a_tensor_at_two_places_stays_one() -> None:
    model = transformer()
    injection = peftcore.apply(model, "houlsby_adapter", name="one")
    first, second = list(injection.operators.values())[:2]
    second.down.weight = first.down.weight
    values, _ = idle(injection)
    assert first.down.weight is second.down.weight
    values.put_back(values.fetch())
    assert first.down.weight is second.down.weight
    assert type(first.down.weight) is nn.Parameter


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "houlsby_adapter", "bitfit", "vera"])
def test_an_operator_that_is_called_while_idle_fails(method: str) -> None:
    model = transformer()
    injection = peftcore.apply(model, method, name="one")
    idle(injection)
    with pytest.raises(IdleAdapter, match="'one' is idle"):
        outputs(model)


def test_nothing_is_computed_with_what_stands_for_a_tensor() -> None:
    injection = peftcore.apply(transformer(), "lora", name="one")
    before = [(each.shape, each.dtype, each.device) for each in injection.parameters()]
    idle(injection)
    first = next(injection.parameters())
    assert [(each.shape, each.dtype, each.device) for each in injection.parameters()] == before
    assert isinstance(first, nn.Parameter)
    assert first.untyped_storage().nbytes() == 0
    assert "StandIn" in repr(first)
    for use in (
        lambda: first + 1,
        lambda: torch.zeros(3, 8).addmm_(torch.zeros(3, 8), first),
        lambda: first.copy_(torch.zeros(8, 8)),
        lambda: first.clone(),
        lambda: torch.nn.utils.parameters_to_vector(injection.parameters()),
    ):
        with pytest.raises(IdleAdapter, match="'one' is idle"):
            use()


def test_parts_of_an_idle_operator_answer_too() -> None:
    model = transformer()
    injection = peftcore.apply(model, "houlsby_adapter", name="one")
    operator = next(iter(injection.operators.values()))
    weight = operator.down.weight.detach().clone()
    idle(injection)
    for module, prefix in ((operator, "down."), (operator.down, "")):
        assert torch.equal(module.state_dict()[f"{prefix}weight"], weight)
        with pytest.raises(IdleAdapter, match="'one' is idle"):
            module.load_state_dict(module.state_dict())


def test_what_was_made_in_inference_mode_goes_and_comes() -> None:
    model = transformer()
    with torch.inference_mode():
        injection = peftcore.apply(model, "lora")
        injection.trainable(False)
    before = outputs(model)
    values, _ = idle(injection)
    values.put_back(values.fetch())
    assert torch.equal(outputs(model), before)


def test_a_model_that_quantizes_asks_for_values_where_they_decide(tmp_path: Path) -> None:
    model = transformer()
    peftcore.apply(model, "loftq").trainable(False)
    pool = peftcore.keep_within(model, "1MB", idle=tmp_path)
    peftcore.activate(model)
    pool.rest("loftq")
    with pytest.raises(IdleAdapter, match="packed"):
        peftcore.quantize(model, "nf4")
    pool.wake("loftq")
    peftcore.quantize(model, "nf4")


class Strange(nn.Parameter):
    """A parameter that is another class's."""


def test_tensors_of_other_classes_are_refused() -> None:
    model = transformer()
    injection = peftcore.apply(model, "lora", name="one")
    operator = next(iter(injection.operators.values()))
    operator.A = Strange(operator.A.data)
    with pytest.raises(UnsupportedHost, match="Strange"):
        IdleValues(injection, MemoryStore(), 0).check_plain()


def test_in_memory_a_limit_holds_as_well() -> None:
    """As `keep_within(model, limit)` does for a model on an accelerator."""
    model, store = transformer(), MemoryStore()
    for name in "abc":
        peftcore.apply(model, "lora", name=name).trainable(False)
    peftcore.activate(model)
    expected = {name: peftcore.using(model, name)(outputs, model) for name in "abc"}
    state = state_of(model)
    assert state is not None
    numbers = iter(range(10))
    state.residency = Residency(state, 5000, lambda injection: IdleValues(injection, store, next(numbers)))
    for injection in peftcore.injections(model).values():
        state.residency.add(injection)
    state.residency.make_room()
    for name in "abcacb":
        assert torch.equal(peftcore.using(model, name)(outputs, model), expected[name])
        assert state.residency.bytes() == 4096
        assert len(store._kept) == 1
