"""Which injections act, in this thread and in others, and where rows cannot be told apart."""

import threading

import pytest
import torch
from call_toys import WholeBatch, adapted
from core_toys import Doubling, Shift, perceptron, stir, token_ids, transformer
from torch import Tensor

import peftcore
from peftcore import route
from peftcore.errors import MergeError, RouteError, UnknownInjection
from peftcore.forward.state.host_state import state_of


def test_a_route_is_refused_where_rows_cannot_be_told_apart() -> None:
    model, (lora, _) = adapted("lora", "dora")
    with pytest.raises(UnknownInjection, match="nowhere"):
        route(model, ["nowhere"])
    with pytest.raises(RouteError, match="list is empty"):
        route(model, [])
    with pytest.raises(RouteError, match=r"3 rows .* the batch has 2"), route(model, [lora.name, None, None]):
        model(token_ids(2))
    lora.merge()
    with pytest.raises(MergeError, match="merged"):
        route(model, [lora.name])
    lora.unmerge()
    whole = peftcore.apply(model, WholeBatch)
    with pytest.raises(RouteError, match="whole batch"):
        route(model, [whole.name])
    assert state_of(model).now().route is None


def test_position_tables_are_not_routed() -> None:
    from peftcore.testing.hosts import HOSTS

    model, inputs = HOSTS["bert"].build()
    injection = peftcore.apply(model, "lora", target="embed.pos")
    with pytest.raises(RouteError, match="cannot be distinguished"):
        route(model, [injection.name] * len(inputs["input_ids"]))


def test_enabled_and_disabled_nest() -> None:
    model, x = perceptron(), torch.ones(1, 4)
    base = model(x)
    one = peftcore.apply(model, Shift, name="one", target="first")
    only_one = model(x)
    two = peftcore.apply(model, Doubling, name="two", target="second")
    both = model(x)
    with one.disabled():
        assert not one.active and two.active
        with two.disabled():
            assert torch.equal(model(x), base)
            with one.enabled():
                assert torch.equal(model(x), only_one)
                with two.enabled():
                    assert torch.equal(model(x), both)
            assert torch.equal(model(x), base)
        assert two.active and not one.active
    assert torch.equal(model(x), both)


def test_blocks_restore_when_an_error_leaves_them() -> None:
    model, x = perceptron(), torch.ones(1, 4)
    injection = peftcore.apply(model, Shift, target="first")
    both = model(x)
    for block in (injection.disabled, lambda: peftcore.activate(model)):
        with pytest.raises(ZeroDivisionError), block():
            raise ZeroDivisionError
        assert torch.equal(model(x), both)


def test_activate_applies_at_once_and_restores_as_a_block() -> None:
    model = perceptron()
    for name in ("a", "b", "c"):
        peftcore.apply(model, Shift, name=name, target="first")
    peftcore.activate(model, "b")
    assert [name for name, each in peftcore.injections(model).items() if each.active] == ["b"]
    with peftcore.activate(model, "c", "a"):
        assert [name for name, each in peftcore.injections(model).items() if each.active] == ["a", "c"]
    assert [name for name, each in peftcore.injections(model).items() if each.active] == ["b"]
    peftcore.activate(model)
    assert not any(each.active for each in peftcore.injections(model).values())


def test_activate_refuses_unknown_names() -> None:
    model = perceptron()
    with pytest.raises(UnknownInjection, match="none"):
        peftcore.activate(model, "lora")
    peftcore.apply(model, "lora", target="first")
    with pytest.raises(UnknownInjection, match=r"'lroa'.*lora"):
        peftcore.activate(model, "lroa")
    assert peftcore.injections(model)["lora"].active


def test_a_to_b_to_a_reproduces_a() -> None:
    model, ids = transformer(), token_ids()
    for seed, name in enumerate("ab"):
        stir(peftcore.apply(model, "lora", name=name), seed=seed)
    outputs = []
    for name in "aba":
        peftcore.activate(model, name)
        outputs.append(model(ids))
    assert torch.equal(outputs[0], outputs[2]) and not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def test_activation_leaves_what_trains_alone() -> None:
    model = perceptron()
    one, two = (peftcore.apply(model, "lora", name=name, target="first") for name in ("one", "two"))
    one.trainable(False)
    peftcore.activate(model, "one")
    assert not any(p.requires_grad for p in one.parameters()) and all(p.requires_grad for p in two.parameters())


def test_other_thread_chooses_for_itself_alone() -> None:
    model, x = perceptron(), torch.ones(1, 4)
    base = model(x)
    peftcore.apply(model, Shift, target="first")
    moved = model(x)
    seen: dict[str, Tensor] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        seen["as the owner chose"] = model(x)
        with peftcore.activate(model):
            seen["own choice"] = model(x)
            inside.set()
            leave.wait(30)
            seen["own choice, later"] = model(x)
        seen["after"] = model(x)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    assert torch.equal(model(x), moved)
    leave.set()
    thread.join(30)
    assert torch.equal(seen["as the owner chose"], moved) and torch.equal(seen["after"], moved)
    assert torch.equal(seen["own choice"], base) and torch.equal(seen["own choice, later"], base)
