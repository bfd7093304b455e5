"""An extra pass of a forward, without one injection: in routes, compositions, checkpoints, and with what it leaves."""

import pytest
import torch
from call_toys import TapMethod, TwiceMethod, fill, gradients, host, separately
from core_toys import token_ids
from torch import Tensor, nn

import peftcore
from peftcore import Average, Sum, activate, call, forward_context, route
from peftcore.errors import UnknownInjection

IDS = token_ids(3)


def adapted(reentrant: bool | None = None) -> tuple[nn.Module, peftcore.Injection, peftcore.Injection]:
    model = host(reentrant)
    twice, lora = peftcore.apply(model, TwiceMethod, name="twice"), peftcore.apply(model, "lora", name="lora")
    fill(twice, 1), fill(lora, 2)
    return model, twice, lora


def test_in_a_route_each_row_is_as_alone() -> None:
    model, *_ = adapted()
    names = ["twice", "lora", None]
    with torch.no_grad(), call(model.eval(), strength=1.0):
        expected = separately(model, IDS, names)
        with route(model, names):
            torch.testing.assert_close(model(IDS)["logits"], expected)


@pytest.mark.parametrize("kind", [Sum, Average])
def test_in_a_composition_each_branch_is_as_alone(kind: type[Sum] | type[Average]) -> None:
    model, *_ = adapted()
    with torch.no_grad(), call(model.eval(), strength=1.0):
        with activate(model, "twice"):
            expected = model(IDS)["logits"]
        with activate(model, kind("twice")):
            torch.testing.assert_close(model(IDS)["logits"], expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_repeats_the_pass_as_it_was(reentrant: bool) -> None:
    found: list[list[Tensor]] = []
    for way in (None, reentrant):
        model, twice, lora = adapted(way)
        with call(model, strength=1.0):
            model(IDS, IDS)["loss"].backward()
        found.append(gradients(twice, lora))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_what_operators_leave_in_the_pass_ends_with_it() -> None:
    """A tap would be read by the forward itself, and a loss be added twice."""
    model = host()
    fill(peftcore.apply(model, TapMethod, name="taps"), 1)
    expected = model(IDS, IDS)
    twice = peftcore.apply(model, TwiceMethod, name="twice")
    with torch.no_grad():
        for parameter in twice.parameters():
            parameter.zero_()
    with call(model, strength=1.0):
        found = model(IDS, IDS)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


def test_an_operator_of_another_model_is_no_injection_of_this_one() -> None:
    model, twice, _ = adapted()
    refused: list[UnknownInjection] = []

    def once(*_: object) -> None:
        try:
            forward_context().without(nn.Linear(1, 1), lambda: None)
        except UnknownInjection as error:
            refused.append(error)
        assert forward_context().without("lora", lambda: twice.active and not peftcore.injections(model)["lora"].active)

    model.layers[0].register_forward_hook(once)
    with torch.no_grad(), call(model, strength=1.0):
        model(IDS)
    assert "belongs to no injection" in str(refused[0])
