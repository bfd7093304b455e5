"""Adapter+, a preset of the Pfeiffer adapter: numbers of the adapters package, in training with stochastic depth; how
it starts; which rows go without it."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from adapters_package import assert_same_adapters
from torch import Tensor

import peftcore
from peftcore.testing import against, check_method, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "adapters_package.json"


@pytest.mark.parametrize("name", ["bert", "llama"])
@against(
    "adapters 1.3",
    "pfeiffer_adapter",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(name: str) -> None:
    """With draws of the same seed, in which one of two rows of a layer goes without the adapter now and then."""
    assert_same_adapters("adapter_plus", frozen(NUMBERS)["adapter_plus"], name, stochastic_depth=0.5)


def test_start_is_a_normal_cut_at_two_deviations_and_scales_of_one() -> None:
    """std = 0.01 and torch.ones(embed_dim) in adapter_plus/vit_adapter.py of visinf/adapter_plus at 191c4ab."""
    model, _ = HOSTS["vit"].build()
    operators = peftcore.apply(model, "adapter_plus", bottleneck=512).operators.values()
    for part in ("down", "up"):
        weights = torch.cat([getattr(operator, part).weight.flatten() for operator in operators]).detach()
        assert 0.0199 < weights.abs().max() <= 0.02
        assert abs(weights.std().item() / 0.8796e-2 - 1) < 0.02
        assert not any(getattr(operator, part).bias.any() for operator in operators)
    assert all(torch.equal(operator.scale, torch.ones(16)) for operator in operators)


def test_the_number_of_the_paper() -> None:
    """L (2 d r + r + 2 d): 0.17 million in a ViT-B/16, whose adapters are 8 wide."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        model = transformers.ViTModel(transformers.ViTConfig())
    assert peftcore.plan(model, "adapter_plus").trainable == 12 * (2 * 768 * 8 + 8 + 2 * 768)


@pytest.mark.parametrize(("method", "target"), [("houlsby_adapter", "mlp.output"), ("pfeiffer_adapter", "mlp.output")])
def test_rows_go_without_in_training_alone(method: str, target: str) -> None:
    """A row has all that an adapter adds, twice, or nothing of it; in evaluation each has it once."""
    bare, inputs = HOSTS["llama"].build()
    bare = bare.double().eval().requires_grad_(False)
    options = {"target": "re:.*layers\\.1\\.mlp\\.down_proj", "dtype": "float64", "scale": "channel"}
    if method == "houlsby_adapter":
        options["train_layer_norm"] = False
    model, plain = deepcopy(bare), deepcopy(bare)
    ours = peftcore.apply(model, method, stochastic_depth=0.5, **options)
    always = peftcore.apply(plain, method, **options)
    fill(ours)
    with torch.no_grad():
        for path, operator in always.operators.items():
            operator.load_state_dict(ours.operators[path].state_dict())
    ids = inputs["input_ids"][:1].repeat(64, 1)

    def last(model: torch.nn.Module) -> Tensor:
        return model.model(input_ids=ids).last_hidden_state

    torch.testing.assert_close(last(model), last(plain))
    with torch.no_grad():
        for tensor in ("up.weight", "up.bias"):
            always.operators[next(iter(always.operators))].get_parameter(tensor).mul_(2)
    torch.manual_seed(0)
    rows, without, twice = last(model.train()), last(bare), last(plain)
    is_without = [torch.allclose(row, other, atol=1e-12) for row, other in zip(rows, without, strict=True)]
    is_twice = [torch.allclose(row, other, atol=1e-12) for row, other in zip(rows, twice, strict=True)]
    assert all(one != other for one, other in zip(is_without, is_twice, strict=True))
    assert 16 < sum(is_twice) < 48


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_block_that_runs_again_drops_the_same_rows(reentrant: bool) -> None:
    model, inputs = HOSTS["llama"].build()
    ours = peftcore.apply(model, "adapter_plus", stochastic_depth=0.5)
    fill(ours)
    model.train()
    ids = inputs["input_ids"].repeat(8, 1)  # so that no layer drops all rows

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in ours.parameters() if p.grad is not None]

    plain = gradients()
    assert len(plain) == len(list(ours.parameters())) and all(each.abs().max() > 0 for each in plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain)


@pytest.mark.slow
def test_conformance() -> None:
    """Without stochastic depth: what the kit compares in training must not draw."""
    expected = {"draws_are_declared-llama": "nothing is drawn here"}
    options = {"*": {"stochastic_depth": 0.0}}
    results = check_method("adapter_plus", hosts=["llama"], options=options, expected_failures=expected)
    assert not [str(each) for each in results if each.status == "failed"]
