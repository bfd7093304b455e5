"""What the head predicts at rows of a soft prompt is what it predicts at tokens with these embeddings."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from plugin_toys import method_members
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Rows, SequenceOperator, Tags, row_logits
from peftcore.errors import UnsupportedSite
from peftcore.testing.hosts import HOSTS

LENGTH, ROWS = 3, [2, 0]


class Prompt(SequenceOperator):
    """Trained rows."""

    def __init__(self, site: Any, config: Any) -> None:
        super().__init__(site, LENGTH)
        self.prompt = nn.Parameter(torch.randn(LENGTH, self.width))

    def rows(self, embeds: Tensor) -> Tensor:
        return self.prompt


class Config(MethodConfig):
    """No options."""

    method: str = "toy_scored"


class Scored(Method):
    """A prompt whose logits it keeps, and the logits of the tokens."""

    locals().update(method_members())
    name, Config, target = "toy_scored", Config, "stack"
    tags = Tags(category="additive", paper="none", identity_at_init=False, per_row=False)

    def inject(self, model: nn.Module, config: Any, surgeon: peftcore.author.Surgeon) -> None:
        (site,) = surgeon.sites()
        stack = surgeon.sequence_site(site)
        self.left = row_logits(surgeon, stack, surgeon.sequence(site, Prompt, config), ROWS)
        self.found: list[tuple[Rows | None, Tensor]] = []

    def output_loss(self, injection: Any, output: Any, call: Any) -> None:
        self.found.append((self.left.get(), output["logits"]))


def adapted(name: str = "llama") -> tuple[Any, Any, Any, dict[str, Tensor]]:
    base, inputs = HOSTS[name].build()
    base, model = base.double().eval(), deepcopy(base).double().train()
    injection = peftcore.apply(model, Scored, dtype="float64")
    return base, model, injection, inputs


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("left", [False, True])
def test_they_are_those_of_the_model_at_tokens(name: str, left: bool) -> None:
    base, model, injection, inputs = adapted(name)
    prompt = next(each.prompt for each in injection.operators.values() if isinstance(each, Prompt))
    padding = inputs["attention_mask"].shape[1] - inputs["attention_mask"].sum(1)
    if left:
        inputs = {key: torch.stack([*map(torch.roll, each, padding.tolist())]) for key, each in inputs.items()}
    output = model(**inputs)
    [(found, logits)] = injection.method.found
    assert logits is output.logits
    embeds = torch.cat([prompt.expand(2, -1, -1), base.get_input_embeddings()(inputs["input_ids"])], 1)
    assert torch.equal(found.behind, padding if left else torch.zeros_like(padding))
    expected = base(inputs_embeds=embeds[:, :LENGTH]).logits  # nobody sees what comes later
    torch.testing.assert_close(found.states, expected[:, ROWS], rtol=1e-5, atol=1e-6)  # rotations are float32
    found.states.square().sum().backward()
    assert prompt.grad[ROWS].abs().amax(-1).min() > 0


def test_nothing_is_left_where_nothing_trains_or_the_rows_are_in_a_cache() -> None:
    _, model, injection, inputs = adapted()
    ids = inputs["input_ids"]
    cache = model(ids, use_cache=True).past_key_values
    assert injection.method.found.pop()[0] is not None
    model(ids[:, :1], past_key_values=cache, use_cache=True)
    assert injection.method.found.pop()[0] is None
    for operator in injection.operators.values():
        operator.eval()
    model(ids)
    assert injection.method.found.pop()[0] is None


def test_a_copy_leaves_its_own() -> None:
    _, model, injection, inputs = adapted()
    twin = deepcopy(model)
    (own,) = peftcore.injections(twin).values()
    model(**inputs)
    twin(**inputs)
    twin(**inputs)
    assert (len(injection.method.found), len(own.method.found)) == (1, 2)
    assert own.method.found[0][0] is not None


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_stacks_whose_head_predicts_no_next_token_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedSite, match="does not predict tokens"):
        peftcore.apply(HOSTS[name].build()[0], Scored)
    base = HOSTS["llama"].build()[0]
    with pytest.raises(UnsupportedSite, match="does not predict tokens"):
        peftcore.apply(base.model, Scored)
