"""One operator at one site: what it does to a tensor, to a missing one, to some rows, and in which order."""

from typing import Any, Literal

import pytest
import torch
from core_toys import perceptron, snapshot, stir
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Site, Surgeon, Tags, WeightOperator
from peftcore.errors import TrainingError


def test_effective_bias_of_a_missing_slot() -> None:
    model = perceptron()
    model.first = nn.Linear(4, 6, bias=False)
    before, x = snapshot(model), torch.randn(3, 4)
    injection = peftcore.apply(model, "bitfit", target="first", add_missing_bias=True)
    (site,) = injection.sites
    assert site.path == "first.bias" and model.first.bias is None
    base = nn.functional.linear(x, model.first.weight)
    assert torch.equal(model.first(x), base)
    stir(injection, 1.0)
    moved = base + injection.operators["first.bias"].value
    assert torch.allclose(model.first(x), moved, atol=1e-6)
    injection.merge()
    assert model.first.bias is not None and torch.allclose(model.first(x), moved, atol=1e-6)
    injection.unmerge()
    assert model.first.bias is None and list(model.first.state_dict()) == ["weight"]
    injection.remove()
    assert snapshot(model) == before


class HalfOperator(WeightOperator):
    """Adds to half of the outputs in training, and a merge adds to all."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.change = nn.Parameter(torch.ones(site.out_features, 1))

    def forward(self, weight: Tensor) -> Tensor:
        kept = torch.arange(len(weight)) % 2 if self.training else torch.ones(len(weight))
        return weight + kept[:, None] * self.change

    def merged(self, weight: Tensor) -> Tensor:
        return weight + self.change


class HalfConfig(MethodConfig):
    method: Literal["alternating"] = "alternating"


class Half(Method):
    """A method that drops parts of its change in training."""

    name = "alternating"
    Config = HalfConfig
    tags = Tags(category="reparameterized", paper="2106.09685", mergeable=True)
    target = "first"

    def inject(self, model: nn.Module, config: MethodConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, HalfOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return site.out_features


def test_what_training_drops_is_in_what_is_read_and_merged() -> None:
    model = perceptron().train()
    injection = peftcore.apply(model, Half)
    weight, bias, x = model.first.weight.detach().clone(), model.first.bias, torch.randn(3, 4)
    kept = torch.arange(6)[:, None] % 2
    torch.testing.assert_close(model.first(x), nn.functional.linear(x, weight + kept, bias))
    (site,) = injection.sites
    torch.testing.assert_close(site.weight(), weight + 1)
    injection.merge()
    torch.testing.assert_close(model.first.weight, weight + 1)
    injection.unmerge()
    torch.testing.assert_close(model.eval().first(x), nn.functional.linear(x, weight + 1, bias))


def test_an_input_changed_for_some_rows_of_a_fused_projection_leaves_the_others() -> None:
    """Queries, keys and values in one matrix: what scales the inputs of queries does nothing to keys and values."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=1, num_classes=3)
    qkv = model.eval().double().blocks[0].attn.qkv
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    before = qkv(x)
    injection = peftcore.apply(model, "ia3", target="attn.q", scale_inputs=["attn.q"], dtype=torch.float64)
    gain = next(injection.parameters())
    with torch.no_grad():
        gain.normal_(1, 0.1)
        after = qkv(x)
        torch.testing.assert_close(after[..., 24:], before[..., 24:], rtol=0, atol=1e-12)
        torch.testing.assert_close(
            after[..., :24], torch.nn.functional.linear(x * gain, qkv.weight, qkv.bias)[..., :24]
        )
        injection.merge()
        torch.testing.assert_close(qkv(x), after, rtol=0, atol=1e-12)


def test_effects_on_one_bias_compose_in_order() -> None:
    """Gains that scale a bias, then a replacement of it: the later one has the last word, merged or not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    gains = peftcore.apply(model, "ia3", target=["0"])
    biases = peftcore.apply(model, "bitfit", target=["0"])
    with torch.no_grad():
        for parameter in (*gains.parameters(), *biases.parameters()):
            parameter.add_(torch.randn_like(parameter))
    gain, bias = (next(each.parameters()).detach() for each in (gains, biases))
    expected = model[1](gain * (x @ model[0].weight.T) + bias)
    torch.testing.assert_close(model(x), expected)
    gains.merge()
    biases.merge()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("above", ["dora", "oft"])
def test_dropped_inputs_below_an_effective_weight_are_refused_in_training(above: str) -> None:
    """They were not dropped, without a word."""
    model, x = perceptron(), torch.randn(3, 4)
    below = peftcore.apply(model, "lora", name="below", target="first", dropout=0.5)
    peftcore.apply(model, above, name="above", target="first", **({"block_size": 2} if above == "oft" else {}))
    stir(below)
    model.eval()(x)
    with pytest.raises(TrainingError, match="'below' uses dropout"):
        model.train()(x)
    with peftcore.activate(model, "below"):
        model(x)
    peftcore.activate(model, "above")
    model(x)
