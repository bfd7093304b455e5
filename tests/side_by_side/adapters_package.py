"""Hosts and inputs with the numbers that the frozen runs of AdapterHub's `adapters` had, and their comparison."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftcore

SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16}
IDS = torch.tensor([[1, 5, 3, 9, 2], [4, 4, 10, 0, 7]])


def wave(like: Tensor, k: float) -> Tensor:
    return torch.sin(torch.arange(like.numel(), dtype=torch.float64) * k + k).view_as(like)


@torch.no_grad()
def waves(tensors: Iterable[Tensor], start: float, step: float = 0.37) -> None:
    for index, tensor in enumerate(tensors):
        tensor.copy_(0.5 * wave(tensor, start + step * index))


def host(name: str) -> nn.Module:
    """A small model in float64, in training, without dropout."""
    if name == "bert":
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = transformers.BertModel(transformers.BertConfig(**SIZES, **without), add_pooling_layer=False)
    else:
        model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES))
    model = model.double().train()
    waves(model.parameters(), 0.1)
    return model


def assert_same(
    model: nn.Module, bare: nn.Module, tensors: list[nn.Parameter], numbers: dict[str, Any], abs: float = 1e-8
) -> None:
    """The output, and the gradients of tensors that stand in the order of the package's; a bare host has another."""
    torch.manual_seed(5)  # for stochastic depth
    y = model(input_ids=IDS).last_hidden_state
    assert (y - bare(input_ids=IDS).last_hidden_state).abs().max() > 0.01
    (y.square() * wave(y, 0.3)).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=abs)
    assert len(tensors) == len(numbers["gradients"])
    for tensor, (name, gradient) in zip(tensors, numbers["gradients"].items(), strict=True):
        assert tensor.grad is not None and tensor.grad.any()
        assert tensor.grad.flatten().tolist() == pytest.approx(gradient, abs=10 * abs), name


def assert_same_adapters(method: str, numbers: dict[str, dict[str, Any]], name: str, **options: Any) -> None:
    """A bottleneck adapter on a host, with waves in its tensors."""
    model = host(name)
    injection = peftcore.apply(model, method, bottleneck=4, dtype="float64", **options)
    tensors = [p for each in injection.operators.values() for p in norm_first(each)]
    waves(tensors, 0.2)
    assert_same(model, host(name), tensors, numbers[name])


def norm_first(operator: nn.Module) -> list[nn.Parameter]:
    """The parameters in the package's order, where an adapter's own norm stands in front of its matrices."""
    named = list(operator.named_parameters())
    return [p for _, p in sorted(named, key=lambda entry: not entry[0].startswith("norm."))]
