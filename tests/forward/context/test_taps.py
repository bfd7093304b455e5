"""Taps: what one operator leaves for another, until when, and with its gradient."""

import copy
import weakref
from typing import Any

import pytest
import torch
from call_toys import TapMethod, fill, host
from core_toys import token_ids
from torch import Tensor

import peftcore
from peftcore.errors import TrainingError


@pytest.mark.parametrize("compiled", [False, True])
def test_taps_and_losses(compiled: bool) -> None:
    """One operator sees what another left; what operators add stands in the output's loss, in training only."""
    torch.compiler.reset()
    model = host()
    injection = peftcore.apply(model, TapMethod)
    fill(injection, 3)
    ids = token_ids(2)
    twin = copy.deepcopy(model)
    inputs: list[Tensor] = []
    for layer in twin.layers:
        layer.mlp.up_proj.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    twin(ids)
    readers = [injection.operators[f"layers.{index}.mlp.down_proj"] for index in (0, 1)]
    extra = sum((reader.gain * x).square().mean() for reader, x in zip(readers, inputs, strict=True))
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    trained = run(ids, labels=ids)
    model.eval()
    plain = model(ids, labels=ids)
    torch.testing.assert_close(trained["logits"], plain["logits"])
    torch.testing.assert_close(trained["loss"] - plain["loss"], extra)
    assert extra > 1e-3
    assert model(ids).keys() == {"logits"}
    assert not peftcore.author.forward_context().taps
    torch.compiler.reset()


def test_kept_taps_last_until_backward_is_done() -> None:
    """What one block leaves for another must be there when that one alone runs again; other taps must be gone."""
    model = host()
    kept, passing = peftcore.author.Tap(until_backward=True), peftcore.author.Tap()
    states: list[Any] = []

    def write(module: Any, args: Any, output: Tensor) -> None:
        for tap in (kept, passing):
            tap.put(output.detach())
        states.append(weakref.ref(kept.get()))

    def read(gradient: Tensor) -> None:
        assert kept.get() is states[0]()
        assert passing.get() is None

    peftcore.apply(model, "lora")
    model.layers[0].register_forward_hook(write)
    model.layers[1].register_forward_hook(lambda module, args, output: output.register_hook(read) and None)
    logits = model(token_ids(2))["logits"]
    logits.sum().backward()
    del logits
    assert states[0]() is None


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_learns_reaches_a_block_that_runs_again_with_its_gradient_or_not_at_all(reentrant: bool | None) -> None:
    """A reentrant checkpoint would lose the gradient; what does not learn, or is only looked at, may pass."""
    model, ids = host(reentrant), token_ids(2)
    peftcore.apply(model, "lora")
    gain = torch.ones(8, requires_grad=True)
    tap, learns = peftcore.author.Tap(until_backward=True), True
    model.embed_tokens.register_forward_hook(lambda *_: tap.put([gain * 2 if learns else gain.detach()]))
    model.layers[1].register_forward_hook(lambda module, args, output: output * tap.get()[0])
    if reentrant:
        with pytest.raises(TrainingError, match="'use_reentrant': False"):
            model(ids)
        with torch.no_grad():
            model(ids)
        learns = False
        model(ids)["logits"].sum().backward()
    else:
        model(ids)["logits"].square().sum().backward()
        assert gain.grad is not None and gain.grad.abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_what_a_block_makes_is_read_behind_it_with_its_gradient_or_not_at_all(reentrant: bool | None) -> None:
    model, ids = host(reentrant), token_ids(2)
    peftcore.apply(model, "lora")
    gain = torch.ones(8, requires_grad=True)
    tap = peftcore.author.Tap(until_backward=True, learns=True)
    model.layers[0].register_forward_hook(lambda *_: tap.put(gain * 2))
    model.layers[1].register_forward_hook(lambda module, args, output: output * tap.get())
    if reentrant:
        with pytest.raises(TrainingError, match="'use_reentrant': False"):
            model(ids)
    else:
        model(ids)["logits"].square().sum().backward()
        assert gain.grad is not None and gain.grad.abs().max() > 1e-3
