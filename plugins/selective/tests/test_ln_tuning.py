"""Norm tuning: which norms train, and running statistics that stay. Its numbers beside peft's and beside training in
place are in the repository's side-by-side tests."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.errors import CompositionError
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths


@conformance("ln_tuning")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, with other roundings. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def host(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """In evaluation, and frozen: torch picks other kernels for what needs gradients."""
    model, inputs = HOSTS[name].build()
    return model.eval().requires_grad_(False), inputs


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    result = model(**inputs)
    return result if isinstance(result, Tensor) else result.logits


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama", 5 * 16),  # two a layer and the last, gains alone
        ("bert", 5 * 2 * 16),  # two a layer and that of the embeddings, with biases
        ("gpt2", 5 * 2 * 16),
        ("t5", (2 * 2 + 1 + 2 * 3 + 1) * 16),
        ("encoder", 4 * 2 * 16),
        ("convnet", 2 * 8),
    ],
)
def test_every_norm_trains_and_nothing_else(name: str, count: int) -> None:
    model, inputs = host(name)
    assert peftcore.plan(model, "ln_tuning").trainable == count
    before = output(model, inputs)
    injection = peftcore.apply(model, "ln_tuning")
    assert sum(p.numel() for p in injection.parameters() if p.requires_grad) == count
    assert torch.equal(output(model, inputs), before)
    output(model, inputs).square().sum().backward()
    assert all(operator.value.grad.abs().max() > 0 for operator in injection.operators.values())
    assert all("norm" in path.lower() or "ln_" in path for path in injection.operators)


def test_gains_and_biases_are_the_trained_values() -> None:
    model, _ = host("bert")
    injection = peftcore.apply(model, "ln_tuning")
    gain = injection.operators["bert.embeddings.LayerNorm"].value
    bias = injection.operators["bert.embeddings.LayerNorm.bias"].value
    nn.init.normal_(gain)
    nn.init.normal_(bias)
    x = torch.randn(2, 3, 16)
    normal = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-12).sqrt()
    torch.testing.assert_close(model.bert.embeddings.LayerNorm(x), gain * normal + bias)


def test_norms_that_add_one_train_the_tensor_itself() -> None:
    """Gemma's norms multiply by 1 + g: what trains is g, whatever the layer makes of it."""
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8}
    config = transformers.GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.GemmaForCausalLM(config).eval()
    injection = peftcore.apply(model, "ln_tuning")
    gain = injection.operators["model.norm"].value
    assert torch.equal(gain, model.model.norm.weight)
    nn.init.normal_(gain)
    x = torch.randn(2, 3, 16)
    normal = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(model.model.norm(x), (1 + gain) * normal)


def test_running_statistics_stay() -> None:
    """Training moves gain and bias of a BatchNorm, never its statistics: those of the base normalize every batch."""
    model, inputs = host("convnet")
    evaluated = output(model, inputs)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    injection = peftcore.apply(model, "ln_tuning")
    model.train()
    assert torch.equal(output(model, inputs), evaluated)
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    for _ in range(3):
        output(model, inputs).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert not torch.equal(injection.operators["norm"].value, model.norm.weight)
    injection.remove()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_two_take_turns() -> None:
    """Values, not differences: two that have values for one norm do not act together."""
    model, inputs = host("bert")
    first = peftcore.apply(model, "ln_tuning", name="first")
    second = peftcore.apply(model, "ln_tuning", name="second")
    for injection, seed in ((first, 1), (second, 2)):
        torch.manual_seed(seed)
        for operator in injection.operators.values():
            nn.init.normal_(operator.value)
    with peftcore.activate(model, "second"):
        alone = output(model, inputs)
    with pytest.raises(CompositionError, match="'first' and 'second'"):
        output(model, inputs)
    with peftcore.activate(model, "first"):
        assert not torch.equal(output(model, inputs), alone)
