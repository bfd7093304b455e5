"""Adapters that exist already become the parts of one method, with their values, and act in its place no more."""

from pathlib import Path

import pytest
import torch
from core_toys import perceptron, stir
from torch import nn

import peftcore
from peftcore import gather
from peftcore.errors import UnknownInjection

X = torch.linspace(-1, 1, 12).view(3, 4)


def adapted() -> nn.Module:
    model = perceptron()
    for seed, name in enumerate(("one", "two")):
        stir(peftcore.apply(model, "lora", name=name, target=["first", "second"], rank=2 + seed), 0.3, seed)
    return model


def test_a_sum_of_one_is_what_it_was_and_acts_in_its_place() -> None:
    model = adapted()
    with peftcore.activate(model, "one"):
        expected = model(X)
    made = gather(model, "task_arithmetic", {"one": 1.0}, name="sum", scale=1.0)
    with peftcore.activate(model, "sum"):
        torch.testing.assert_close(model(X), expected)
    assert not peftcore.injections(model)["one"].active and made.active
    assert not any(parameter.requires_grad for parameter in made.parameters())


def test_changes_of_several_are_added_by_their_weights(tmp_path: Path) -> None:
    model = adapted()
    base = model.first.weight.detach().clone()
    changes = {}
    for name in ("one", "two"):
        injection = peftcore.injections(model)[name]
        changes[name] = injection.operators["first"].merged(base) - base
    peftcore.injections(model)["two"].save(tmp_path / "two")
    made = gather(model, "task_arithmetic", {"one": 0.5, tmp_path / "two": -2.0}, scale=1.0)
    expected = base + 0.5 * changes["one"] - 2.0 * changes["two"]
    assert made.name == "task_arithmetic" and list(made.parts) == ["0", "1"]
    peftcore.activate(model, made.name)
    torch.testing.assert_close(made.sites[0].weight(), expected)


@pytest.mark.parametrize("source", ["nowhere", Path("nowhere")])
def test_what_is_not_there_changes_nothing(source: str | Path) -> None:
    model = adapted()
    expected = model(X)
    with pytest.raises(UnknownInjection, match="neither a folder nor an injection"):
        gather(model, "task_arithmetic", {"one": 1.0, source: 1.0})
    assert torch.equal(model(X), expected) and list(peftcore.injections(model)) == ["one", "two"]


def test_a_method_is_told_when_its_parts_have_their_values(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, seen = adapted(), []
    expected = peftcore.injections(model)["one"].operators["first"].state_dict()

    def parts_gathered(self: peftcore.author.Method, injection: peftcore.Injection) -> None:
        part = injection.parts["0"].operators["first"]
        seen.extend(torch.equal(value, expected[key]) for key, value in part.state_dict().items())

    monkeypatch.setattr(peftcore.method("task_arithmetic"), "parts_gathered", parts_gathered)
    gather(model, "task_arithmetic", {"one": 1.0})
    assert len(seen) > 1 and all(seen)
