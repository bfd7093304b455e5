"""The record of one forward: inputs, context, taps, losses, extra passes; and nothing of it afterwards."""

from typing import Any

import pytest
import torch
from call_toys import TaskMethod, TwiceMethod, adapted, fill, gradients, host
from core_toys import token_ids
from torch import Tensor

import peftcore
from peftcore import activate, call
from peftcore.errors import MissingContext
from peftcore.forward.state.host_state import state_of


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
    model.norm.register_forward_hook(lambda *_: seen.update(peftcore.author.forward_context().inputs))
    ids = token_ids(2)
    model(ids, labels=ids)
    assert seen["ids"] is ids and seen["labels"] is ids
    assert not peftcore.author.forward_context().inputs


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
    assert not peftcore.author.forward_context().inputs
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
