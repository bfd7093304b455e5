"""The record of one forward: inputs, context, taps, losses, extra passes; and nothing of it afterwards."""

import copy
import weakref
from typing import Any

import pytest
import torch
from call_toys import TapMethod, TaskMethod, TwiceMethod, adapted, fill, gradients, host
from core_toys import token_ids
from torch import Tensor

import peftcore
from peftcore import activate, call
from peftcore.errors import MissingContext, TrainingError
from peftcore.forward.host_state import state_of


def test_context_reaches_operators_in_forward_and_generate() -> None:
    from peftcore.testing.hosts import HOSTS

    model, inputs = HOSTS["llama"].build()
    peftcore.apply(model, TaskMethod)
    with pytest.raises(MissingContext, match=r"peftcore\.call\(model, strength="):
        model(**inputs)
    with call(model, strength=0.0):
        plain = model(**inputs).logits
        with call(model, other=1, strength=3.0):
            strong = model(**inputs).logits
            words = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert torch.equal(model(**inputs).logits, plain)
    with activate(model):
        assert torch.equal(model(**inputs).logits, plain)
        assert not torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), words)
    assert not torch.equal(plain, strong)


def test_the_record_names_the_inputs_and_is_gone_afterwards() -> None:
    seen: dict[str, Any] = {}
    model, _ = adapted("lora")
    model.norm.register_forward_hook(lambda *_: seen.update(peftcore.forward_context().inputs))
    ids = token_ids(2)
    model(ids, labels=ids)
    assert seen["ids"] is ids and seen["labels"] is ids
    assert not peftcore.forward_context().inputs


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
    assert not peftcore.forward_context().taps
    torch.compiler.reset()


def test_kept_taps_last_until_backward_is_done() -> None:
    """What one block leaves for another must be there when that one alone runs again; other taps must be gone."""
    model = host()
    kept, passing = peftcore.Tap(until_backward=True), peftcore.Tap()
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
    tap, learns = peftcore.Tap(until_backward=True), True
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
    tap = peftcore.Tap(until_backward=True, learns=True)
    model.layers[0].register_forward_hook(lambda *_: tap.put(gain * 2))
    model.layers[1].register_forward_hook(lambda module, args, output: output * tap.get())
    if reentrant:
        with pytest.raises(TrainingError, match="'use_reentrant': False"):
            model(ids)
    else:
        model(ids)["logits"].square().sum().backward()
        assert gain.grad is not None and gain.grad.abs().max() > 1e-3


def test_an_extra_pass_leaves_out_the_injection_and_nothing_else() -> None:
    model = host().eval()
    lora = peftcore.apply(model, "lora", target="self_attn.q_proj")
    fill(lora, 1)
    x = torch.randn(2, 5, 8)
    plain = model.layers[0](x)
    peftcore.apply(model, TwiceMethod)
    with call(model, strength=1.0):
        twice = model.layers[0](x)
        with peftcore.injections(model)["toy_twice"].disabled():
            assert torch.equal(model.layers[0](x), plain)
    full = twice - plain  # gain is one
    with call(model, strength=0.0):
        torch.testing.assert_close(model.layers[0](x), 2 * plain)
    assert not torch.allclose(full, plain, atol=1e-3)
    assert not state_of(model).choices.own


def test_an_extra_pass_leaves_the_cache_alone() -> None:
    from peftcore.testing.hosts import HOSTS

    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model, TwiceMethod)
    with torch.no_grad():
        for operator in injection.operators.values():
            operator.gain.mul_(0.02)
    with call(model, strength=1.0), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        cached = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
        uncached = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, uncached)


def test_nothing_of_the_record_stays_when_forward_raises_or_the_injection_goes() -> None:
    model = host()
    hooks = dict(model._forward_hooks), dict(model._forward_pre_hooks)
    injection = peftcore.apply(model, TaskMethod)
    with pytest.raises(MissingContext):
        model(token_ids(2))
    assert not peftcore.forward_context().inputs
    injection.remove()
    notes = (model._forward_hooks_with_kwargs, model._forward_hooks_always_called, model._forward_pre_hooks_with_kwargs)
    assert (dict(model._forward_hooks), dict(model._forward_pre_hooks)) == hooks and not any(notes)


def test_backward_in_the_middle_of_another_forward_repeats_what_its_own_did() -> None:
    model = host(reentrant=False)
    one, two = (peftcore.apply(model, method, name=method) for method in ("lora", "dora"))
    ids, direction = token_ids(2), torch.randn(2, 5, 11)
    for seed, injection in enumerate((one, two)):
        fill(injection, seed)
        injection.trainable(True)

    def loss() -> Tensor:
        with activate(model, one.name):
            return (model(ids)["logits"] * direction).sum()

    loss().backward()
    wanted = gradients(one)
    with activate(model, two.name), torch.no_grad():
        other = model(ids)["logits"]
    late = loss()
    with activate(model, two.name):
        handle = model.embed_tokens.register_forward_hook(lambda *_: late.backward())
        torch.testing.assert_close(model(ids)["logits"], other)
        handle.remove()
    for actual, gradient in zip(gradients(one), wanted, strict=True):
        torch.testing.assert_close(actual, gradient)


def test_an_extra_pass_in_a_forward_of_the_host() -> None:
    """It leaves the injection out though its modules run by the owner's choice otherwise."""
    model = host().eval()
    ids = token_ids(2)
    bare = model.layers[0](model.embed_tokens(ids))
    peftcore.apply(model, TwiceMethod)
    seen: list[Tensor] = []
    model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad(), call(model, strength=1.0):
        model(ids)
        operator = peftcore.injections(model)["toy_twice"].operators["layers.0"]
        operator.gain.zero_()
        model(ids)
    torch.testing.assert_close(seen[0] - seen[1], bare)
