"""Methods replaced on an instance go with the last host that has it, and none of the model's own is replaced."""

from torch import nn

from peftcore.forward.state.generate import GeneratesFromCache
from peftcore.libraries.instance_methods import give_methods_back, replace_methods
from peftcore.utils.journal import Journal


class Generating(nn.Module):
    def generate(self, steps: int = 1) -> int:
        """Count."""
        return steps


def test_it_goes_with_the_last_owner() -> None:
    outer = nn.Sequential(Generating(), nn.Linear(2, 2))
    first, second = object(), object()
    for owner in (first, second):
        replace_methods(Journal(), outer.modules(), GeneratesFromCache, owner)
    assert "generate" in vars(outer[0]) and "generate" not in vars(outer[1])
    assert outer[0].generate(steps=4) == 4
    give_methods_back(Journal(), outer, first)
    assert "generate" in vars(outer[0])
    give_methods_back(Journal(), outer, second)
    assert "generate" not in vars(outer[0])


def test_a_method_that_the_instance_has_already_stays() -> None:
    model = Generating()
    model.generate = lambda: 7  # type: ignore[method-assign, assignment]
    replace_methods(Journal(), [model], GeneratesFromCache, object())
    assert model.generate() == 7
    give_methods_back(Journal(), model, object())
    assert model.generate() == 7
