"""What changes inside of a route or a composition leaves the rest of the choice as it is."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from call_toys import TaskMethod, adapted, fill, separately
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import Average, Fuse, Injection, Split, Stack, Sum, activate, call, route
from peftcore.errors import CompositionError, RouteError

IDS = token_ids(3)


@pytest.fixture
def served() -> tuple[nn.Module, list[Injection]]:
    model, injections = adapted("lora", "dora", "lora")
    return model.eval(), injections


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS)["logits"]
    return found


def alone(model: nn.Module, names: list[str | None]) -> Tensor:
    with torch.no_grad():
        return separately(model, IDS, names)


def under(model: nn.Module, *names: Any) -> Tensor:
    with activate(model, *names):
        return logits(model)


# ------------------------------------------------------------------------------------------------------------- routes


def test_disabling_in_a_route_makes_rows_bare_and_leaves_the_others(served: Any) -> None:
    model, (one, two, three) = served
    names = [one.name, two.name, None]
    rows, without_two = alone(model, names), alone(model, [one.name, None, None])
    bare = alone(model, [None] * 3)
    with route(model, names):
        torch.testing.assert_close(logits(model), rows)
        with two.disabled():
            torch.testing.assert_close(logits(model), without_two)
            assert one.active and not two.active
            with one.disabled():
                torch.testing.assert_close(logits(model), bare)
            with three.disabled():
                torch.testing.assert_close(logits(model), without_two)
            torch.testing.assert_close(logits(model), without_two)
        torch.testing.assert_close(logits(model), rows)
    assert not torch.allclose(rows, without_two, atol=1e-3)


@contextmanager
def changed(model: nn.Module, injections: list[Injection], how: str, folder: Path) -> Iterator[None]:
    """Something comes to the model or goes from it, that no row and no part names."""
    one, _, three = injections
    if how == "apply":
        fill(peftcore.apply(model, "lora", name="new"), 7)
    elif how in ("load", "load to wait"):
        three.save(folder / "three")
        peftcore.load(model, folder / "three", name="new", active=how == "load")
    elif how == "combine":
        peftcore.combine(model, {three.name: 2.0}, name="new")
    elif how == "to_lora":
        peftcore.to_lora(three, 4, name="new")
    elif how == "remove":
        three.remove()
    elif how == "enable":
        one.enabled()
    elif how == "fails":
        with pytest.raises(peftcore.errors.PeftcoreError):
            peftcore.apply(model, "lora", name="new", target="nowhere")
        with pytest.raises(ZeroDivisionError):
            peftcore.apply(model, Fails, name="new")
    yield


def _fails(*_: Any) -> None:
    raise ZeroDivisionError


Fails = type("Fails", (peftcore.author.Method,), {**vars(TaskMethod), "name": "toy_fails", "trainable": _fails})
"""Its operators are installed, and then it fails."""

HOW = ["apply", "load", "load to wait", "combine", "to_lora", "remove", "enable", "fails"]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("how", HOW)
def test_what_comes_and_goes_in_a_route_leaves_its_rows(served: Any, how: str, own: bool, tmp_path: Path) -> None:
    model, injections = served
    one, two, three = injections
    names = [one.name, two.name, None]
    rows = alone(model, names)
    activate(model, one.name, three.name)
    joins = how in ("apply", "load", "combine", "to_lora")

    def work() -> tuple[str, ...]:
        with route(model, names), changed(model, injections, how, tmp_path):
            torch.testing.assert_close(logits(model), rows)
            assert [each.active for each in (one, two)] == [True, True]
            if joins:
                assert not peftcore.injections(model)["new"].active
        return tuple(name for name, each in peftcore.injections(model).items() if each.active)

    if own:
        with ThreadPoolExecutor(1) as pool:
            after = pool.submit(work).result()
            everybody = (one.name,) if how == "remove" else (one.name, three.name)
            assert tuple(name for name, each in peftcore.injections(model).items() if each.active) == everybody
    else:
        after = work()
    left = [one.name] if how in ("remove", "combine", "to_lora") else [one.name, three.name]
    assert after == (*left, *(["new"] if joins else []))  # it joins the stack in force outside of the route


def test_two_streams_and_an_unload_in_another_thread_leave_the_rows_of_others(served: Any) -> None:
    model, (one, two, three) = served
    names = [one.name, None, two.name]
    rows = alone(model, names)
    inside, removed = threading.Event(), threading.Event()

    def customer() -> Tensor:
        with route(model, names):
            inside.set()
            removed.wait(30)
            return logits(model)

    with ThreadPoolExecutor(1) as pool:
        served_rows = pool.submit(customer)
        inside.wait(30)
        three.remove()
        removed.set()
        torch.testing.assert_close(served_rows.result(), rows)


def test_what_a_route_stands_on_cannot_go_and_cannot_be_replaced(served: Any) -> None:
    model, (one, two, _) = served
    names = [one.name, two.name, None]
    rows = alone(model, names)
    here: list[Callable[[], Any]] = [
        two.remove,
        two.bake,
        lambda: peftcore.combine(model, {one.name: 1.0}),
        lambda: peftcore.to_lora(two, 2),
    ]
    with route(model, names):
        for refused in here:
            with pytest.raises(RouteError, match="route that is in force"):
                refused()
        with activate(model, one.name), pytest.raises(RouteError):
            two.remove()  # the route comes back
        with two.disabled(), pytest.raises(RouteError):
            two.remove()
        assert len(peftcore.injections(model)) == 3 and not two.merged
        torch.testing.assert_close(logits(model), rows)
    two.remove()


def test_a_route_has_no_row_for_what_is_enabled_in_it(served: Any) -> None:
    model, (one, two, three) = served
    with route(model, [one.name, None, two.name]):
        with pytest.raises(RouteError, match="name it in the route"):
            three.enabled()
        rows = logits(model)
        with one.enabled():
            assert torch.equal(logits(model), rows)


# ------------------------------------------------------------------------------------------------------- compositions


@pytest.mark.parametrize("how", [each for each in HOW if each != "enable"])
@pytest.mark.parametrize("kind", [Sum, Average, Stack])
def test_what_comes_and_goes_in_a_composition_leaves_its_parts(
    served: Any, kind: Any, how: str, tmp_path: Path
) -> None:
    model, injections = served
    one, two, _ = injections
    composition = kind(two.name, one.name)
    together = under(model, composition)
    activate(model, one.name)
    with activate(model, composition), changed(model, injections, how, tmp_path):
        assert torch.equal(logits(model), together)
    joined = {"new"} if how in ("apply", "load", "combine", "to_lora") else set()
    active = {name for name, each in peftcore.injections(model).items() if each.active}
    assert active == {one.name} | joined


def test_disabling_in_a_composition_makes_parts_bare_and_leaves_the_others() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    x = torch.randn(2, 3, 4)
    base = model(x).detach()
    a, b = (peftcore.apply(model, "lora", name=name, target="0") for name in "ab")
    fill(a, 1), fill(b, 2)

    def output(*names: Any) -> Tensor:
        with torch.no_grad(), activate(model, *names):
            return model(x)

    only_b, half = output("b"), output(Sum("b", weights=[0.5]))
    expected = {
        Sum("a", "b", weights=[2.0, 0.5]): half,
        Average("a", "b"): (base + only_b) / 2,
        Split("a", "b", lengths=[1, None]): torch.cat([base[:, :1], only_b[:, 1:]], 1),
        Stack("b", "a"): only_b,
        Stack(Sum("a"), "b"): only_b,
    }
    for composition, wanted in expected.items():
        whole = output(composition)
        with torch.no_grad(), activate(model, composition):
            with a.disabled():
                torch.testing.assert_close(model(x), wanted)
                assert not a.active and b.active
                with a.enabled():
                    assert torch.equal(model(x), whole)
                with b.disabled():
                    assert torch.equal(model(x), base)
            assert torch.equal(model(x), whole) and not torch.allclose(whole, wanted, atol=1e-4)


def test_enabling_upon_a_composition_stacks(served: Any) -> None:
    model, (one, two, three) = served
    wanted = under(model, Stack(Sum(one.name, two.name, weights=[2.0, 1.0]), three.name))
    with activate(model, Sum(one.name, two.name, weights=[2.0, 1.0])):
        before = logits(model)
        with three.enabled():
            assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), before)


def test_what_a_composition_stands_on_cannot_go(served: Any) -> None:
    model, (one, two, _) = served
    with activate(model, Sum(one.name, two.name)):
        for refused in (two.remove, two.bake, lambda: peftcore.combine(model, {one.name: 1.0})):
            with pytest.raises(CompositionError, match="composition that is in force"):
                refused()
        with two.disabled(), pytest.raises(CompositionError):
            two.remove()


def test_nothing_combines_outputs_in_the_place_of_what_is_disabled() -> None:
    model, injections = adapted("lora", "lora")
    names = [each.name for each in injections]
    fusion = peftcore.apply(model, "adapter_fusion", name="fusion")
    with activate(model, Fuse(*names, by="fusion")):
        fused = logits(model)
        with pytest.raises(CompositionError, match="combines"), fusion.disabled():
            pass
        assert torch.equal(logits(model), fused)


# ------------------------------------------------------------------------------------------------------------- values


def test_values_for_methods_stay_when_what_acts_changes(served: Any) -> None:
    model, (one, _, _) = served
    peftcore.apply(model, TaskMethod, name="task")
    found = []
    with call(model, strength=2.0), torch.no_grad():
        for block in (activate(model, "task"), route(model, ["task"] * 3), activate(model, Stack("task"))):
            with block, one.disabled():
                found.append(logits(model))
        with activate(model, "task"), call(model, strength=0.0):
            other = logits(model)
    for each in found:
        torch.testing.assert_close(each, found[0])
    assert not torch.allclose(other, found[0], atol=1e-3)
