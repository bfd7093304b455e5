"""Two adapters that act one after the other, of which the second has a value of its own for a tensor: the first one's
change would be lost there, so they do not act together, and each acts alone and in a sum."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import CompositionError
from peftcore.testing.kit import fill

X = torch.linspace(-1, 1, 8).view(2, 4)
HEAD: dict[str, Any] = {"target": ["0"], "train": ["1"]}


def host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval()


def add(model: nn.Module, name: str, method: str = "lora", **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, method, name=name, **(options or HEAD))
    fill(injection, len(name))
    return injection


def both(first: dict[str, Any], second: dict[str, Any]) -> nn.Module:
    model = host()
    add(model, "a", **first)
    add(model, "bb", **second)
    return model


LOST = [
    (HEAD, HEAD),
    ({"method": "bitfit", "target": ["1"]}, {"method": "bitfit", "target": ["1"]}),
    ({"target": ["1"]}, HEAD),
    ({"method": "dora", "target": ["1"]}, HEAD),
]


@pytest.mark.parametrize(("first", "second"), LOST)
def test_a_stack_in_which_one_is_lost_is_refused(first: dict[str, Any], second: dict[str, Any]) -> None:
    model = both(first, second)
    with pytest.raises(CompositionError, match=r"'a' and 'bb' both act on .*1"):
        model(X)  # `apply` lets each new one act
    alone = {}
    for name in ("a", "bb"):
        with peftcore.activate(model, name):
            alone[name] = model(X)
    ways: list[Callable[[], object]] = [
        lambda: peftcore.activate(model, "a", "bb"),
        lambda: peftcore.activate(model, peftcore.Stack("a", "bb")),
        lambda: peftcore.using(model, "a", "bb")(model, X),
    ]
    with peftcore.activate(model, "a"):
        for way in ways:
            with pytest.raises(CompositionError, match="would be lost"):
                way()
        assert torch.equal(model(X), alone["a"])  # nothing has changed
    assert not torch.equal(alone["a"], alone["bb"])
    with peftcore.route(model, ["a", "bb"]):
        assert torch.allclose(model(X), torch.stack([alone["a"][0], alone["bb"][1]]), atol=1e-6)


def test_a_sum_adds_up_what_each_changes() -> None:
    model, hidden = both(HEAD, HEAD), X + 1

    def at(*choice: str | peftcore.Sum) -> Tensor:
        with peftcore.activate(model, *choice):
            output: Tensor = model[1](hidden)
        return output

    assert torch.allclose(at(peftcore.Sum("a", "bb")), at("a") + at("bb") - at(), atol=1e-6)


@pytest.mark.parametrize("second", [{"target": ["1"]}, {"method": "bitfit", "target": ["1"]}])
def test_what_comes_after_such_a_value_acts_on_it(second: dict[str, Any]) -> None:
    """An update comes on top; a bias of its own leaves a weight of its own as it is."""
    model = both({"method": "linear_probe", "target": ["1"]} if "method" not in second else {"target": ["1"]}, second)
    assert not any(torch.equal(model(X), alone) for alone in _each(model))


def _each(model: nn.Module) -> list[Tensor]:
    found = []
    for name in ("a", "bb"):
        with peftcore.activate(model, name):
            found.append(model(X))
    return found


def test_a_merge_counts_as_acting() -> None:
    model = host()
    a = add(model, "a")
    a.merge()
    add(model, "bb")
    with pytest.raises(CompositionError, match="would be lost"):
        model(X)
    peftcore.injections(model)["bb"].remove()
    a.bake()
    add(model, "bb")
    model(X)


def test_loading_another_one_says_so_at_the_next_forward(tmp_path: Path) -> None:
    model = host()
    add(model, "a").save(tmp_path)
    peftcore.load(model, tmp_path, name="b", active=False)
    model(X)
    peftcore.load(model, tmp_path, name="c")
    with pytest.raises(CompositionError, match="'a' and 'c'"):
        model(X)
