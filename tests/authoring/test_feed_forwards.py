"""Whole feed-forwards as target modules, found from one of their matrices."""

from typing import Any, Literal

import pytest
import torch
from torch import nn

import peftcore
from peftcore.author import FeedForwardSite, Method, MethodConfig, Operator, Tags, feed_forward_around
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS


class NoOptions(MethodConfig):
    method: Literal["twice"] = "twice"


class Twice(Operator):
    """Runs a feed-forward twice, the second time on the negated input."""

    changes_inputs = True

    def __init__(self, site: FeedForwardSite, config: Any) -> None:
        super().__init__(site)
        self.share = nn.Parameter(torch.ones(site.width))

    def forward(self, call: Any, x: Any) -> Any:
        return call(x) + call(-x * self.share)


class RunsTwice(Method):
    name = "twice"
    Config = NoOptions
    tags = Tags(category="additive", paper="none")
    target = ("mlp.down", "attn.q")

    def inject(self, model: Any, config: Any, surgeon: Any) -> None:
        whole = {each.path: each for site in surgeon.sites() if (each := feed_forward_around(surgeon, site))}
        for site in whole.values():
            surgeon.graft(site, Twice, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return int(site.width)


@pytest.mark.parametrize("name", ["llama", "t5", "gpt2"])
def test_it_stands_around_the_whole_and_knows_its_input(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    injection = peftcore.apply(model.eval(), RunsTwice)
    ends = [entry for entry in injection.sites if isinstance(entry, FeedForwardSite)]
    assert ends == [*injection.sites] and {each.width for each in ends} == {16}
    for site in ends:
        with peftcore.activate(model):
            module = model.get_submodule(site.path)
            x = torch.randn(2, 3, 16)
            expected = module(x) + module(-x)
        torch.testing.assert_close(module(x), expected)
    model(**inputs)


@pytest.mark.parametrize("name", ["bert", "encoder"])
def test_one_that_is_no_module_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedSite, match="not a separate module"):
        peftcore.apply(HOSTS[name].build()[0], RunsTwice)
