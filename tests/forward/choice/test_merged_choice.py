"""A merged injection acts whatever is chosen: what is chosen says so, or is refused before anything changes."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from core_toys import Doubling, Perceptron, Shift, Swap, perceptron, snapshot, stir
from torch import nn

import peftcore
from peftcore import Average, Stack, Sum, activate, route
from peftcore.errors import CompositionError, MergeError, RouteError
from peftcore.forward.choice.merged_choice import places
from peftcore.forward.state.host_state import state_of

X = torch.linspace(-1, 1, 12).view(3, 4)


def adapted(*names: str, method: Any = "lora", target: Any = "first") -> tuple[Perceptron, list[peftcore.Injection]]:
    """A host with injections of these names, all active."""
    model, made = perceptron(), []
    for seed, name in enumerate(names):
        made.append(peftcore.apply(model, method, name=name, target=target))
        stir(made[-1], seed=seed)
    return model, made


def acting(model: nn.Module) -> list[str]:
    return [name for name, each in peftcore.injections(model).items() if each.active]


CHOICES: dict[str, Callable[[nn.Module], AbstractContextManager[Any]]] = {
    "nothing": activate,
    "another": lambda model: activate(model, "b"),
    "a route": lambda model: route(model, ["a", "b", None]),
    "a route without it": lambda model: route(model, ["b", None, "b"]),
    "a sum": lambda model: activate(model, Sum("a", "b")),
    "an average without it": lambda model: activate(model, Average("b")),
    "a stack": lambda model: activate(model, Stack("b", "a")),
    "disabled": lambda model: peftcore.injections(model)["a"].disabled(),
}


@pytest.mark.parametrize("keep", ["cpu", "record", None])
@pytest.mark.parametrize("choice", [each for each in CHOICES if each != "disabled"])
def test_no_choice_leaves_out_what_is_merged_nor_tells_rows_apart(choice: str, keep: Any) -> None:
    model, (a, _) = adapted("a", "b")
    expected = model(X)
    a.merge(keep)
    before = snapshot(model)
    for _ in range(2):
        with pytest.raises(MergeError, match=r"'a' is merged.*unmerge"):
            CHOICES[choice](model)
    assert snapshot(model) == before and acting(model) == ["a", "b"]
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_not_merged_any_more_is_chosen_as_ever(choice: str) -> None:
    model, (a, _) = adapted("a", "b")
    with CHOICES[choice](model):
        expected = model(X)
    a.merge(), a.unmerge()
    with CHOICES[choice](model):
        assert torch.equal(model(X), expected)


@pytest.mark.parametrize("choice", CHOICES)
def test_no_merge_under_a_choice_that_it_would_break(choice: str) -> None:
    model, (a, b) = adapted("a", "b")
    with CHOICES[choice](model):
        expected, before = model(X), snapshot(model)
        for act in (a.merge, lambda: a.merge(None, weight=0.5)):
            with pytest.raises(MergeError, match=r"'a' cannot be merged now.*(leave|exit|activate)"):
                act()
        with pytest.raises((MergeError, RouteError, CompositionError), match=r"leave|exit|activate"):
            a.bake()
        assert snapshot(model) == before and not a.merged and torch.equal(model(X), expected)
    a.merge()
    assert a.merged and not b.merged


@pytest.mark.parametrize("choice", [each for each in CHOICES if each != "disabled"])
def test_no_merge_under_a_choice_of_another_thread(choice: str) -> None:
    model, (a, _) = adapted("a", "b")
    seen: dict[str, Any] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with CHOICES[choice](model), torch.no_grad():
            seen["before"] = model(X)
            inside.set()
            leave.wait(30)
            seen["after"] = model(X)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(30)
    before = snapshot(model)
    with pytest.raises(MergeError, match="in another thread"):
        a.merge()
    assert snapshot(model) == before
    leave.set()
    thread.join(30)
    assert torch.equal(seen["before"], seen["after"])
    a.merge()


def test_a_thread_that_is_gone_chooses_nothing() -> None:
    model, (a, _) = adapted("a", "b")
    thread = threading.Thread(target=activate, args=(model, "b"))
    thread.start(), thread.join(30)
    a.merge()
    assert a.merged


def test_a_choice_in_another_thread_is_refused_there() -> None:
    model, (a, _) = adapted("a", "b")
    a.merge()
    caught: list[BaseException] = []

    def other() -> None:
        for choice in ("nothing", "another", "a route"):
            try:
                CHOICES[choice](model)
            except MergeError as error:
                caught.append(error)

    thread = threading.Thread(target=other)
    thread.start(), thread.join(30)
    assert len(caught) == 3
    a.unmerge()


def test_one_that_was_applied_earlier_acts_before_a_merged_one_or_not_at_all() -> None:
    model, (early, late) = adapted("early", "late", method=Shift)
    activate(model, "late")
    alone = model(X)
    late.merge()  # the other does not act
    torch.testing.assert_close(model(X), alone)
    for choose in (lambda: activate(model, "early", "late"), early.enabled):
        before = snapshot(model)
        with pytest.raises(MergeError, match=r"'early' was applied before it and acts on the same weights.*unmerge"):
            choose()
        assert snapshot(model) == before and acting(model) == ["late"]
    with pytest.raises(MergeError, match="activate it first"):
        early.merge()
    late.unmerge()
    activate(model, "early", "late")
    with pytest.raises(MergeError, match="merge 'early' first"):
        late.merge()
    early.merge(), late.merge()


def test_one_that_acts_elsewhere_may_have_come_before() -> None:
    model = perceptron()
    peftcore.apply(model, Shift, name="early", target="second")
    late = peftcore.apply(model, Shift, name="late", target="first")
    expected = model(X)
    late.merge()
    torch.testing.assert_close(model(X), expected)
    with pytest.raises(MergeError, match="'late' is merged"):
        activate(model, "early")
    activate(model, "early", "late")


def test_places_are_tensors_however_they_are_reached() -> None:
    model = perceptron()
    gain = peftcore.apply(model, "ia3", name="gain", target="first")
    bias = peftcore.apply(model, Swap, name="bias", target="re:^first$")
    assert places(gain) == {"first.weight", "first.bias"} and places(bias) == {"first.weight"}


def test_a_bias_that_an_earlier_one_scales_is_not_replaced_under_it() -> None:
    model = perceptron()
    gain = peftcore.apply(model, "ia3", name="gain", target="first")
    bias = peftcore.apply(model, "bitfit", name="bias")
    stir(gain), stir(bias)
    expected = model(X)
    with pytest.raises(MergeError, match="merge 'gain' first"):
        bias.merge()
    gain.merge(), bias.merge()
    torch.testing.assert_close(model(X), expected)


def test_one_that_is_applied_later_acts_on_top() -> None:
    model, (a,) = adapted("a")
    a.merge()
    with pytest.raises(MergeError, match="'a' is merged"):
        activate(model)
    later = peftcore.apply(model, "lora", name="later", target="first")
    stir(later)
    both = model(X)
    with later.disabled():
        assert acting(model) == ["a"]
    a.unmerge()
    torch.testing.assert_close(model(X), both)
    a.merge()
    later.remove()
    assert acting(model) == ["a"]


def test_disabling_the_merged_one_itself_unmerges_it_meanwhile() -> None:
    model, (a, b) = adapted("a", "b", method=Shift)
    with activate(model, "b"):
        b_alone = model(X)
    b.remove()
    a.merge()
    merged = model(X)
    base = perceptron()(X)
    with a.disabled():
        assert torch.equal(model(X), base) and not a.merged
    assert a.merged and torch.equal(model(X), merged) and not torch.equal(base, b_alone)


def test_a_block_that_a_merge_outlives_stays_and_says_so() -> None:
    model, (a, _) = adapted("a", "b")
    activate(model, "b")
    with activate(model, "b"):
        expected = model(X)
    with activate(model, "a"):
        a.merge()
        model(X)
    for _ in range(2):
        with pytest.raises(MergeError, match="'a' is merged"):
            model(X)
    a.unmerge()
    assert torch.equal(model(X), expected)


@contextmanager
def plain_choice(model: nn.Module, name: str) -> Iterator[None]:
    """A choice that is put into force behind the state's back, as a copy of a thread's would be."""
    state = state_of(model)
    before = state.choices.choice
    state.choices.choice = type(before)((name,))
    yield
    state.choices.choice = before


def test_a_choice_that_nobody_was_asked_about_is_refused_where_it_would_run() -> None:
    model, (a, _) = adapted("a", "b")
    a.merge()
    with plain_choice(model, "b"), pytest.raises(MergeError, match="'a' is merged"):
        model(X)
    a.unmerge()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_merged_too(copied: Callable[[nn.Module], nn.Module]) -> None:
    model, (a, _) = adapted("a", "b")
    expected, base = model(X), perceptron()(X)
    a.merge()
    other = copied(model)
    theirs = peftcore.injections(other)
    assert theirs["a"].merged and not theirs["b"].merged
    with pytest.raises(MergeError, match="'a' is merged"):
        activate(other, "b")
    a.unmerge()
    torch.testing.assert_close(other(X), expected)
    theirs["a"].unmerge()
    assert a.merged is theirs["a"].merged is False
    activate(other)
    assert torch.equal(other(X), base)


def test_what_is_baked_or_removed_binds_nobody() -> None:
    model, (a, b) = adapted("a", "b")
    a.merge()
    a.bake()
    activate(model), activate(model, "b"), route(model, ["b", None, None])
    activate(model, "b")
    b.merge()
    b.remove()
    assert not peftcore.injections(model) and not a.merged and not b.merged


def test_what_has_no_merged_form_may_act_beside() -> None:
    model = perceptron()
    a = peftcore.apply(model, Shift, name="a", target="first")
    peftcore.apply(model, Doubling, name="twice", target="first")
    expected = model(X)
    a.merge()
    torch.testing.assert_close(model(X), expected)
