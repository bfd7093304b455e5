"""What a module was given is found by what it returned."""

import pytest
import torch
from torch import Tensor

from peftcore.author import Calls
from peftcore.errors import CompositionError


def test_a_call_is_found_by_its_output_and_made_again_with_another_input() -> None:
    def module(x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * x.square()

    calls = Calls(module)
    one, other = torch.randn(2, 3), torch.randn(2, 3)
    first, second, named = calls(one), calls(other, scale=2.0), calls(x=one, scale=3.0)
    assert calls.given(first) is one
    assert calls.given(second) is other
    assert calls.given(named) is one
    again = calls.again(second, one)
    assert torch.equal(again, 2 * one.square())
    assert calls.given(again) is one
    assert torch.equal(calls.again(named, other), 3 * other.square())


def test_what_no_call_returned_is_refused() -> None:
    calls = Calls(torch.tanh)
    output = calls(torch.ones(2))
    for given in (lambda: calls.given(output + 0), lambda: calls.again(output + 0, output)):
        with pytest.raises(CompositionError, match="only_inputs"):
            given()
