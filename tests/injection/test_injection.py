"""What an injection tells of itself, and what a plan tells before there is one."""

import functools
from typing import Any

import pytest
import torch
from core_toys import (
    ALL,
    Doubling,
    SharedBases,
    Shift,
    Swap,
    Transformer,
    irregular,
    perceptron,
    snapshot,
    stir,
    token_ids,
    transformer,
)
from torch import nn

import peftcore
from peftcore.errors import (
    InactiveSite,
    MergeError,
    UnknownInjection,
)
from peftcore.injection import merging


@pytest.mark.parametrize("what", ["replaced", "patched", "ungrafted"])
def test_check_finds_what_is_no_longer_in_place(what: str) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    injection.check()
    if what == "replaced":
        model.first = nn.Linear(4, 6)
    if what == "patched":
        model.first.forward = functools.partial(nn.Linear.forward, model.first)
    if what == "ungrafted":
        model.first.__class__ = nn.Linear
    with pytest.raises(InactiveSite, match="first") as caught:
        injection.check()
    assert "second" not in str(caught.value)
    assert injection.summary().irregular


def test_handle_of_a_removed_injection_refuses() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    injection.remove()
    peftcore.apply(model, "lora", target="first")  # the name is in use again, by another
    for act in (
        injection.remove,
        injection.merge,
        injection.unmerge,
        injection.enabled,
        injection.trainable,
        injection.bake,
    ):
        with pytest.raises(UnknownInjection):
            act()
    with pytest.raises(UnknownInjection), injection.disabled():
        pass
    with pytest.raises(UnknownInjection):
        injection.low_memory = True
    assert list(peftcore.injections(model)) == ["lora"]


def test_base_state_dict_loads_into_an_adapted_host() -> None:
    fresh = transformer()
    model = Transformer()
    injection = peftcore.apply(model, "lora", train=["classifier"])
    stir(injection)
    kept = {key: value.clone() for key, value in injection.state_dict().items()}
    model.load_state_dict(fresh.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in injection.state_dict().items())
    with injection.disabled():
        assert torch.equal(model.eval()(token_ids()), fresh(token_ids()))


def test_adapted_state_dict_round_trips_and_is_strict() -> None:
    models = [transformer() for _ in range(2)]
    injections = [peftcore.apply(model, "lora", train=["classifier"]) for model in models]
    stir(injections[0])
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](token_ids()), models[1](token_ids()))
    broken = {key: value for key, value in models[0].state_dict().items() if not key.endswith("q_proj.lora.A")}
    with pytest.raises(RuntimeError, match=r"q_proj\.lora\.A"):
        models[1].load_state_dict(broken)


TOYS = [Doubling, Shift, Swap, SharedBases]


@pytest.mark.parametrize("method", [*ALL, *TOYS], ids=lambda m: m if isinstance(m, str) else m.name)
@pytest.mark.parametrize("run", ["unused", "trained"])
def test_remove_restores_everything(method: Any, run: str) -> None:
    model = irregular()
    before = snapshot(model)
    injection = peftcore.apply(model, method, train=["classifier"])
    assert snapshot(model) != before
    if run == "trained":
        optimizer = torch.optim.AdamW(injection.parameters(), lr=0.1)
        for _ in range(2):
            model(token_ids()).square().sum().backward()
            optimizer.step()
    injection.remove()
    assert snapshot(model) == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert peftcore.injections(model) == {}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)], ids=str)
def test_several_leave_in_any_order(order: tuple[int, ...]) -> None:
    model = irregular()
    before = snapshot(model)
    injections = [peftcore.apply(model, name) for name in ("lora", "bitfit", "ln_tuning")]
    for index in order:
        injections[index].remove()
    assert snapshot(model) == before


@pytest.mark.parametrize("method", ALL)
def test_base_is_frozen_and_operators_train(method: str) -> None:
    model = transformer()
    own = dict(model.named_parameters())
    injection = peftcore.apply(model, method)
    assert not any(parameter.requires_grad for parameter in own.values())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert trained == {id(p) for p in injection.parameters()} and trained
    model(token_ids()).square().sum().backward()
    assert all(parameter.grad is None for parameter in own.values())


def test_second_injection_leaves_the_first_as_it_was() -> None:
    model = transformer()
    first = peftcore.apply(model, "lora")
    first.trainable(False)
    second = peftcore.apply(model, "ia3")
    assert not any(parameter.requires_grad for parameter in first.parameters())
    second.remove()
    assert not any(parameter.requires_grad for parameter in first.parameters())
    first.trainable(True)
    assert all(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("trains", [False, True])
def test_a_method_that_fails_to_choose_what_trains_changes_nothing(
    trains: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(method: object, model: nn.Module, config: object, injection: peftcore.Injection) -> None:
        next(iter(injection.parameters())).requires_grad_(not trains)
        raise error

    injection = peftcore.apply(perceptron(), "lora", target="first")
    injection.trainable(trains)
    before = [parameter.requires_grad for parameter in injection.parameters()]
    with monkeypatch.context() as patch, pytest.raises(error):
        patch.setattr(type(injection.method), "trainable", failing)
        injection.trainable()
    assert [parameter.requires_grad for parameter in injection.parameters()] == before
    assert not injection.summary().irregular


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("within", [None, KeyError])
def test_what_cannot_be_merged_again_stays_unmerged_and_says_so(
    within: type[Exception] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a block of `disabled`, whatever ended it: weights are those of the base, and it acts by its operators."""
    model = perceptron()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    injection = peftcore.apply(model, "dora", name="mine", target=["first", "second"])
    stir(injection)
    expected = model(torch.ones(2, 4))
    injection.merge()
    with pytest.raises(torch.OutOfMemoryError) as caught, injection.disabled():
        monkeypatch.setattr(merging, "merge", full)
        if within is not None:
            raise within
    monkeypatch.undo()
    (note,) = caught.value.__notes__
    assert "'mine'" in note and "stays unmerged" in note and "merge()" in note
    assert not injection.merged and injection.active
    assert all(torch.equal(model.state_dict()[name], value) for name, value in bare.items())
    assert torch.equal(model(torch.ones(2, 4)), expected)
    injection.merge()
    assert injection.merged


def test_an_injection_that_is_removed_within_disabled_is_not_merged_again() -> None:
    model = perceptron()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    stir(injection)
    injection.merge()
    with injection.disabled():
        injection.remove()
    assert not peftcore.injections(model)
    assert all(torch.equal(value, bare[name]) for name, value in model.state_dict().items())


def test_a_merge_of_another_kind_within_disabled_is_kept_and_the_end_says_so() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    injection.merge()
    with pytest.raises(MergeError, match="merged already") as caught, injection.disabled():
        injection.enabled()
        injection.merge("device")
    assert injection.merged and not hasattr(caught.value, "__notes__")
