"""What is chosen in one thread, block or copy, and what of it others see."""

import copy
import pickle
import threading

import pytest
import torch
from call_toys import (
    TaskMethod,
    adapted,
    host,
    in_a_thread,
    in_the_middle,
    separately,
)
from core_toys import token_ids
from torch import Tensor

import peftcore
from peftcore import activate, call, route
from peftcore.forward.context.context import HERE
from peftcore.forward.state.host_state import state_of


def test_activating_inside_a_route_ends_it_until_the_end_of_the_block() -> None:
    model, (one, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with route(model, [one.name, two.name]):
        routed = model(ids)["logits"]
        with activate(model, one.name):
            assert torch.equal(model(ids)["logits"], separately(model, ids, [one.name] * 2))
        assert torch.equal(model(ids)["logits"], routed)


def test_a_route_in_one_thread_is_not_seen_by_another() -> None:
    model, (one, two) = adapted("lora", "dora")
    ids = token_ids(2)
    with torch.no_grad():
        expected = separately(model, ids, [one.name, two.name])
        both = model(ids)["logits"]
    results: dict[str, Tensor] = {}
    inside, done = threading.Event(), threading.Event()

    def routed() -> None:
        with torch.no_grad(), route(model, [one.name, two.name]):
            inside.set()
            done.wait(10)
            results["routed"] = model(ids)["logits"]

    thread = threading.Thread(target=routed)
    thread.start()
    inside.wait(10)
    with torch.no_grad():
        assert torch.equal(model(ids)["logits"], both)
    done.set()
    thread.join()
    torch.testing.assert_close(results["routed"], expected)


def test_a_copy_made_inside_a_route_is_outside_of_it() -> None:
    model, (one, two) = adapted("lora", "dora")
    with route(model, [one.name, two.name]):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for twin in copies:
        assert torch.equal(twin(token_ids(3))["logits"], model(token_ids(3))["logits"])


def test_another_threads_choice_in_the_middle_of_a_forward() -> None:
    model, (_, two) = adapted("lora", "dora")
    ids, found = token_ids(2), []

    def alone() -> None:
        with torch.no_grad(), activate(model, two.name):
            found.append(model(ids)["logits"])

    with torch.no_grad():
        both, (wanted, *_) = model(ids)["logits"], separately(model, ids, [two.name] * 2)
        in_the_middle(model, lambda: in_a_thread(alone))
        assert torch.equal(model(ids)["logits"], both)
    torch.testing.assert_close(found[0][0], wanted)


def test_a_part_that_another_thread_runs_in_the_middle_of_a_forward_has_a_record_of_its_own() -> None:
    model = host().eval()
    peftcore.apply(model, TaskMethod)
    x, found = torch.randn(2, 5, 8), []

    def part() -> None:
        found.append(model.layers[1](x))

    with torch.no_grad(), call(model, strength=0.5):
        wanted = model.layers[1](x)
        in_the_middle(model, lambda: in_a_thread(part))
        model(token_ids(2))
    assert torch.equal(found[0], wanted)


def test_a_forward_that_is_over_leaves_nothing_to_go_by() -> None:
    model, _ = adapted("lora")
    state = state_of(model)
    during: list[object] = []
    in_the_middle(model, lambda: during.append(HERE.calm.state))
    model(token_ids(2))
    assert during == [state] and HERE.calm is None
    in_the_middle(model, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(token_ids(2))
    assert HERE.calm is None and not HERE.calls
