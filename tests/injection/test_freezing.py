"""The base trains no longer while an adapter is on it, and does again afterwards: what trained, and only that."""

import pytest
import torch
from torch import nn

import peftcore
from peftcore.injection.freezing import freeze, thaw
from peftcore.utils.journal import Journal


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    made[1].weight = made[0].weight  # tied
    made[2].bias.requires_grad = False  # frozen by its owner
    return made


def test_each_parameter_that_trains_is_named_once() -> None:
    host, journal = model(), Journal()
    found = freeze(journal, [parameter for module in host for parameter in module.parameters()])
    assert [id(each) for each in found] == [id(p) for p in (*host[0].parameters(), host[1].bias, host[2].weight)]
    assert not any(parameter.requires_grad for parameter in host.parameters())
    thaw(journal, found)
    assert not host[2].bias.requires_grad and all(each.requires_grad for each in found)


def test_the_last_adapter_gives_back_what_trained() -> None:
    host = model()
    before = [parameter.requires_grad for parameter in host.parameters()]
    one = peftcore.apply(host, "lora", target="0", name="one")
    two = peftcore.apply(host, "lora", target="2", name="two")
    names = ("0.weight", "2.weight")
    assert not any(dict(host.named_parameters())[name].requires_grad for name in names)
    one.remove()
    assert not any(dict(host.named_parameters())[name].requires_grad for name in names)
    two.remove()
    assert [parameter.requires_grad for parameter in host.parameters()] == before


def trained(host: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in host.parameters()]


def test_a_model_made_in_inference_mode_is_as_before_when_the_last_adapter_is_removed() -> None:
    with torch.inference_mode():
        host = model()
    before = trained(host)
    injection = peftcore.apply(host, "lora", target="0")
    assert trained(host) != before
    injection.remove()
    assert trained(host) == before and not peftcore.injections(host)


def test_an_apply_that_fails_lets_a_model_made_in_inference_mode_train_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        host = model()
    before = trained(host)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(peftcore.Injection, "trainable", interrupted)
        peftcore.apply(host, "lora", target="0")
    assert trained(host) == before and not peftcore.injections(host)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_parameter_that_holds_integers_since_does_not_stand_in_the_way() -> None:
    host = model()
    injection = peftcore.apply(host, "lora", target="0")
    host[2].weight.data = host[2].weight.data.to(torch.int8)  # as code does that quantizes in place
    injection.remove()
    assert not peftcore.injections(host) and not host[2].weight.requires_grad and host[0].weight.requires_grad
