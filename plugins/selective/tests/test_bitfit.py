"""BitFit: which biases train, and biases that a host does not have. That training them equals training in place is
shown by the repository's side-by-side tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "bitfit.json"
CODE: Any = {"repository": "benzakenelad/BitFit", "commit": "7ead19a", "script": "glue_evaluator.py"}
HEADS = {"bert": {"classifier"}, "gpt2": set(), "encoder": {"head"}, "convnet": {"head"}, "mlp": {"head"}}
"""The weights of heads over classes; the other hosts give tokens."""


@conformance("bitfit", options={"*": {"add_missing_bias": True}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """In evaluation, and frozen: torch picks other kernels for what needs gradients."""
    model, inputs = HOSTS[name].build()
    return model.eval().requires_grad_(False), inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


@pytest.mark.parametrize("name", ["bert", "gpt2", "encoder", "convnet", "mlp"])
def test_every_bias_and_the_head_train_and_nothing_else(name: str) -> None:
    """Those of norms, and the packed one of torch's attention; of the head over classes the weight too."""
    model, inputs = host(name)
    biases = {key: p for key, p in model.named_parameters() if key.endswith("bias")}
    weights = {path: model.get_submodule(path).weight for path in HEADS[name]}
    assert any("norm" in key.lower() or "ln_" in key for key in biases)
    injection = peftcore.apply(model, "bitfit")
    assert injection.operators.keys() == biases.keys() | weights.keys()
    expected = sum(p.numel() for p in {**biases, **weights}.values())
    assert sum(p.numel() for p in injection.parameters()) == expected
    output(model, inputs).square().sum().backward()
    assert all(operator.value.grad is not None for operator in injection.operators.values())
    assert all(p.grad is None for p in {**biases, **weights}.values())
    assert peftcore.plan(host(name)[0], "bitfit", head=False).trainable == sum(p.numel() for p in biases.values())


@against("authors", "bitfit", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    sites = peftcore.apply(host("bert")[0], "bitfit").sites
    assert {f"{site.module_path}.{site.tensor}" for site in sites} == set(frozen(NUMBERS, "trains"))


def test_start_is_the_tensors_themselves() -> None:
    model, inputs = host("bert")
    before = output(model, inputs)
    injection = peftcore.apply(model, "bitfit")
    assert torch.equal(output(model, inputs), before)
    for path, operator in injection.operators.items():
        own = model.classifier.weight if path == "classifier" else model.get_parameter(path)
        assert torch.equal(operator.value, own)
        assert operator.value is not own


def test_a_host_without_biases_has_nothing_to_train() -> None:
    model, _ = host("llama")
    with pytest.raises(TargetError, match="has no biases"):
        peftcore.apply(model, "bitfit")


@pytest.mark.parametrize("name", ["llama", "t5", "moe"])
def test_missing_biases_start_at_the_identity(name: str) -> None:
    model, inputs = host(name)
    before = output(model, inputs)
    injection = peftcore.apply(model, "bitfit", add_missing_bias=True)
    assert torch.equal(output(model, inputs), before)
    sites = peftcore.plan(host(name)[0], "lora", target="all-linear").sites
    linear = {f"{site.path}.bias" for site in sites if site.tensor == "weight"}  # stacked experts have no place for one
    assert injection.operators.keys() == linear
    assert all(not operator.value.any() for operator in injection.operators.values())
    output(model, inputs).square().sum().backward()
    assert all(operator.value.grad is not None for operator in injection.operators.values())


def test_missing_biases_are_added_to_what_the_layer_computes() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "bitfit", add_missing_bias=True)
    value = injection.operators["model.layers.0.mlp.down_proj.bias"].value
    nn.init.normal_(value)
    x = torch.randn(3, 24)
    linear = model.model.layers[0].mlp.down_proj
    torch.testing.assert_close(linear(x), x @ linear.weight.T + value)


def test_missing_biases_come_with_merging_and_leave_with_unmerging() -> None:
    model, inputs = host("llama")
    keys = list(model.state_dict())
    injection = peftcore.apply(model, "bitfit", add_missing_bias=True)
    for operator in injection.operators.values():
        nn.init.normal_(operator.value)
    expected = output(model, inputs)
    linear = model.model.layers[1].self_attn.v_proj
    injection.merge()
    assert torch.equal(linear.bias, injection.operators["model.layers.1.self_attn.v_proj.bias"].value)
    torch.testing.assert_close(output(model, inputs), expected)
    injection.remove()
    assert linear.bias is None
    assert list(model.state_dict()) == keys


def test_missing_biases_keep_to_the_targets() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "bitfit", target=["q_proj", "norm"], add_missing_bias=True)
    assert injection.operators.keys() == {f"model.layers.{layer}.self_attn.q_proj.bias" for layer in (0, 1)}


def test_present_biases_stay_what_they_are_when_missing_ones_are_added() -> None:
    model, _ = host("mlp")
    injection = peftcore.apply(model, "bitfit", add_missing_bias=True)
    assert torch.equal(injection.operators["first.bias"].value, model.first.bias)
    assert len(injection.operators) == len(peftcore.plan(host("mlp")[0], "bitfit", add_missing_bias=True).sites)


def test_targets_choose_among_the_biases() -> None:
    """The paper also trains a subset: queries (and the feed-forward's inner biases)."""
    model, _ = host("bert")
    injection = peftcore.apply(model, "bitfit", target="*.query")
    assert injection.operators.keys() == {f"bert.encoder.layer.{layer}.attention.self.query.bias" for layer in (0, 1)}


def test_queries_of_a_fused_projection_have_biases_of_their_own() -> None:
    model, _ = host("gpt2")
    injection = peftcore.apply(model, "bitfit", target="attn.q")
    operator = injection.operators["transformer.h.0.attn.c_attn.bias:attn.q"]
    before = model.transformer.h[0].attn.c_attn.bias.detach().clone()
    nn.init.normal_(operator.value)
    injection.merge()
    merged = model.transformer.h[0].attn.c_attn.bias
    assert torch.equal(merged[:16], operator.value)
    assert torch.equal(merged[16:], before[16:])
