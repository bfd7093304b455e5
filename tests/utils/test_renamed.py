"""Old names work, and say at the line that uses them what they are called now."""

from collections.abc import Callable

import pytest
from torch import nn

import peftcore


def frugal(injection: peftcore.Injection) -> object:
    injection.frugal = True
    return injection.low_memory and injection.frugal


OLD: dict[str, Callable[[peftcore.Injection], object]] = {
    "peftcore.ForwardContext": lambda injection: peftcore.Call is peftcore.ForwardContext,  # type: ignore[attr-defined]
    "peftcore.forward_context": lambda injection: peftcore.current_call is peftcore.forward_context,  # type: ignore[attr-defined]
    "slices": lambda injection: injection.sites[0].rows is None,
    "low_memory": frugal,
    "until_backward": lambda injection: peftcore.Tap(kept=True).until_backward,
}


@pytest.mark.parametrize("new", OLD)
def test_an_old_name_works_and_names_the_new_one(new: str) -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "lora", target="0")
    with pytest.warns(DeprecationWarning, match=f"is called {new} now") as found:
        assert OLD[new](injection)
    assert {warning.filename for warning in found} == {__file__}


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        peftcore.nothing  # type: ignore[attr-defined] # noqa: B018
    assert not {"Call", "current_call"} & set(dir(peftcore))
