"""Changes of a model while other threads run it or choose, each at the moment that matters."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import Shift, perceptron, run_without_gradients, stir
from torch import Tensor, nn

import peftcore
from peftcore.errors import AdapterInUse, MergeError, UnknownInjection
from peftcore.forward.context.context import HERE
from peftcore.forward.state.host_state import state_of
from peftcore.forward.state.slot import Slot, slot_of
from peftcore.injection import merging

X = torch.ones(2, 4)


def adapted(*names: str) -> nn.Module:
    model = perceptron()
    for index, name in enumerate(names):
        stir(peftcore.apply(model, Shift, name=name, target=["first", "second"]), seed=index + 1)
    return model


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as pool:
        yield pool


@contextmanager
def running(model: nn.Module, pool: ThreadPoolExecutor, *names: str) -> Iterator[Future[Tensor]]:
    """A forward of another thread that stands between two layers."""
    inside, on = threading.Event(), threading.Event()

    def stop(*_: Any) -> None:
        inside.set()
        assert on.wait(10)

    handle = model.first.register_forward_hook(stop)
    chosen = (peftcore.using(model, *names),) if names else ()
    found = pool.submit(*chosen, run_without_gradients, model, X)
    try:
        assert inside.wait(10)
        handle.remove()
        yield found
    finally:
        on.set()


@contextmanager
def paused(
    monkeypatch: pytest.MonkeyPatch, holder: Any, name: str
) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Let the next call of a function wait, after it has run: yields the events that it has, and that it goes on."""
    there, on = threading.Event(), threading.Event()
    function = getattr(holder, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        found = function(*args, **kwargs)
        if not there.is_set():
            there.set()
            assert on.wait(10)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(holder, name, run)
        try:
            yield there, on
        finally:
            on.set()


CHANGES: dict[str, Callable[[peftcore.Injection], object]] = {
    "merge": peftcore.Injection.merge,
    "unmerge": peftcore.Injection.unmerge,
    "bake": peftcore.Injection.bake,
    "remove": peftcore.Injection.remove,
}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_a_running_forward_computes_is_refused(
    change: str, merged: bool, pool: ThreadPoolExecutor
) -> None:
    model = adapted("a")
    injection = peftcore.injections(model)["a"]
    if merged:
        injection.merge()
    expected, weight = run_without_gradients(model, X), model.second.weight
    nothing = (change, merged) in (("merge", True), ("unmerge", False))
    with running(model, pool, "a") as forward:
        if nothing:
            CHANGES[change](injection)
        else:
            with pytest.raises(AdapterInUse, match="Wait until the forward has ended"):
                CHANGES[change](injection)
        assert model.second.weight is weight and injection.merged is merged
    assert torch.equal(forward.result(), expected)
    CHANGES[change](injection)  # the next try succeeds
    if change != "remove":
        torch.testing.assert_close(run_without_gradients(model, X), expected)


def test_an_adapter_that_no_forward_uses_goes_while_others_run(pool: ThreadPoolExecutor) -> None:
    model = adapted("a", "b")
    expected = peftcore.using(model, "a")(run_without_gradients, model, X)
    with running(model, pool, "a") as forward:
        peftcore.injections(model)["b"].remove()
    assert torch.equal(forward.result(), expected)


def test_the_last_adapter_goes_while_a_forward_without_it_runs() -> None:
    model = adapted("a")
    bare = perceptron()
    bare.load_state_dict(model.state_dict(), strict=False)
    peftcore.activate(model)
    with ThreadPoolExecutor(1) as one:
        with running(model, one) as forward:
            peftcore.injections(model)["a"].remove()
        assert torch.equal(forward.result(), run_without_gradients(bare, X))
        assert one.submit(lambda: HERE.calls).result() == []  # nothing stays open in its thread
    run_without_gradients(model, X)
    assert state_of(model) is None and not model._forward_hooks


def test_a_forward_that_begins_during_a_merge_waits(pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("a")
    expected = run_without_gradients(model, X)
    with paused(monkeypatch, merging, "merge") as (there, on):  # tensors are written, plans are still the old ones
        merge = pool.submit(peftcore.injections(model)["a"].merge)
        assert there.wait(10)
        forward = pool.submit(run_without_gradients, model, X)
        with pytest.raises(TimeoutError):
            forward.result(0.2)
        on.set()
        merge.result()
    torch.testing.assert_close(forward.result(), expected)


def test_a_choice_that_is_made_during_a_merge_refuses_one_of_the_two(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("a")
    weight = model.first.weight
    with paused(monkeypatch, merging, "_merge") as (there, on):
        merge = pool.submit(peftcore.injections(model)["a"].merge)
        assert there.wait(10)
        peftcore.activate(model)
        on.set()
        with pytest.raises(MergeError, match="do not include it"):
            merge.result()
    assert model.first.weight is weight and not peftcore.injections(model)["a"].merged
    peftcore.activate(model, "a")
    peftcore.injections(model)["a"].merge()
    with pytest.raises(MergeError, match="is merged"):
        peftcore.activate(model)


def test_an_adapter_that_is_loaded_acts_when_it_has_its_values(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = adapted("a")
    stir(peftcore.apply(model, "lora", name="b", target=["first", "second"]))
    peftcore.injections(model)["b"].save(tmp_path)
    both = run_without_gradients(model, X)
    peftcore.injections(model)["b"].remove()
    alone = run_without_gradients(model, X)
    found: list[Tensor] = []
    trainable = peftcore.Injection.trainable

    def look(injection: peftcore.Injection, mode: bool = True) -> None:
        found.append(pool.submit(run_without_gradients, model, X).result(10))
        trainable(injection, mode)

    monkeypatch.setattr(peftcore.Injection, "trainable", look)
    peftcore.load(model, tmp_path, name="b")
    assert len(found) == 2 and all(torch.equal(each, alone) for each in found)  # before and after its values come
    assert torch.equal(run_without_gradients(model, X), both)


def test_a_plan_that_was_begun_before_a_merge_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("a")
    expected, slot = run_without_gradients(model, X), slot_of(model.first)
    assert slot is not None
    make = Slot._make_plan

    def merges(slot: Slot, choice: Any) -> Any:
        plan = make(slot, choice)
        if not peftcore.injections(model)["a"].merged:
            monkeypatch.setattr(Slot, "_make_plan", make)
            peftcore.injections(model)["a"].merge()  # as in another thread
        return plan

    for plan in (lambda: slot.plan(state_of(model).choice), lambda: slot.plan_for(state_of(model).choice)):  # type: ignore[union-attr]
        monkeypatch.setattr(Slot, "_make_plan", merges)
        slot.changed()
        plan()
        assert peftcore.injections(model)["a"].merged
        torch.testing.assert_close(run_without_gradients(model, X), expected)
        peftcore.injections(model)["a"].unmerge()


def test_a_choice_that_fails_does_not_bring_back_what_another_thread_removed(
    pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted("a", "b", "c")
    state = state_of(model)
    assert state is not None
    check = state.check_merged

    def removes(choice: Any) -> None:
        check(choice)
        if "b" in peftcore.injections(model):
            pool.submit(peftcore.injections(model)["b"].remove).result()

    with monkeypatch.context() as patch:
        patch.setattr(state, "check_merged", removes)
        saved = state.choices.saved()
        with pytest.raises(UnknownInjection), state.choices._whole():
            peftcore.injections(model)["b"].remove()
            raise UnknownInjection
    assert saved[1] and "b" not in state.choice.active
    assert run_without_gradients(model, X) is not None


def test_a_merge_is_judged_while_another_thread_names_what_is_gone(pool: ThreadPoolExecutor) -> None:
    model = adapted("a", "b")
    pool.submit(peftcore.activate, model, "a", "b").result()
    peftcore.injections(model)["a"].remove()
    peftcore.injections(model)["b"].merge()
    with pytest.raises(UnknownInjection):
        pool.submit(run_without_gradients, model, X).result()
