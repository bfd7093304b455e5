"""The base trains no longer while an adapter is on it, and does again afterwards: what trained, and only that."""

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
