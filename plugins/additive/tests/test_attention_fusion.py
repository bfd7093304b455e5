"""AttentionFusion: the kit; its equation token by token, layer by layer and head by head; how it starts; what is
refused."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import peftcore
from peftcore.errors import ConfigError
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

BLOCKS = {"bert": "bert.encoder.layer.{}", "llama": "model.layers.{}", "t5": "decoder.block.{}", "vit": "vit.layers.{}"}


@conformance("attention_fusion", options={"*": {"key_width": 8, "heads": 2}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, on nested tensors. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


def fused(t: dict[str, Tensor], states: list[Tensor], heads: int) -> Tensor:
    """out ``[d]`` of one token, whose states are ``[d]``."""
    parts = []
    width = len(states[0]) // heads
    for head in range(heads):
        scores, values = [], []
        for h in states:
            key = t["key.weight"] @ h if "key.weight" in t else h
            value = t["value.weight"] @ h if "value.weight" in t else h
            size = len(key) // heads
            q = t["query"][head * size : (head + 1) * size]
            scores.append((q * key[head * size : (head + 1) * size]).sum() / math.sqrt(size))
            values.append(value[head * width : (head + 1) * width])
        weights = torch.stack(scores).exp()
        parts.append(sum(weight * value for weight, value in zip(weights, values, strict=True)) / weights.sum())
    return torch.cat(parts)


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_equation(name: str, project: bool) -> None:
    """In a copy of the host by hooks, with gradients."""
    model, inputs = HOSTS[name].build()
    base, _ = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    base.double().eval().requires_grad_(False).load_state_dict(model.double().eval().requires_grad_(False).state_dict())
    options: dict[str, Any] = {"key_width": 6, "heads": 2, "project": project, "dtype": "float64"}
    injection = peftcore.apply(model, "attention_fusion", **options)
    fill(injection)
    t, states = dict(injection.shared["fusion"].named_parameters()), []
    assert {key: tuple(each.shape) for key, each in t.items()} == (
        {"query": (6,), "key.weight": (6, 16), "value.weight": (16, 16)} if project else {"query": (16,)}
    )
    path, count = BLOCKS[name], len(injection.operators)

    def before(module: Any, args: Any, kwargs: Any) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])

    def after(module: Any, args: Any, output: Any) -> Any:
        h = output if isinstance(output, Tensor) else output[0]
        states.append(h)
        if len(states) <= count:
            return None
        tokens = zip(*(each.reshape(-1, each.shape[-1]) for each in states), strict=True)
        new = torch.stack([fused(t, list(token), 2) for token in tokens]).view_as(h)
        return new if isinstance(output, Tensor) else (new, *output[1:])

    base.get_submodule(path.format(0)).register_forward_pre_hook(before, with_kwargs=True)
    for number in range(count):
        base.get_submodule(path.format(number)).register_forward_hook(after)
    ours, expected = (HOSTS[name].output(each(**inputs)) for each in (model, base))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    direction, parameters = torch.randn_like(ours), list(injection.parameters())
    found = [torch.autograd.grad((each * direction).sum(), parameters) for each in (ours, expected)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)
    assert all(each.abs().max() > 0 for each in found[0])


def test_a_fresh_one_is_the_mean_of_all_layers() -> None:
    model, inputs = HOSTS["bert"].build()
    model.eval()
    seen: list[Tensor] = []
    for number in range(2):
        block = model.get_submodule(BLOCKS["bert"].format(number))
        block.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    last: list[Tensor] = []
    hook = model.bert.encoder.layer[1].register_forward_hook(lambda *call: last.append(call[-1]))
    model(**inputs)
    hook.remove()
    expected = torch.stack([*seen, last[0] if isinstance(last[0], Tensor) else last[0][0]]).mean(0)
    peftcore.apply(model, "attention_fusion")
    found: list[Tensor] = []
    model.bert.encoder.register_forward_hook(lambda *call: found.append(call[-1][0]))
    model(**inputs)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-6)


def test_no_gradient_enters_the_backbone() -> None:
    """Embeddings that train get none, and no block keeps what its backward would need."""
    model, inputs = HOSTS["bert"].build()
    injection = peftcore.apply(model, "attention_fusion")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model.bert(**inputs)
    plain, _ = HOSTS["bert"].build()
    of_base: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: of_base.append(t) or t, lambda t: t):
        plain.requires_grad_(True).bert(**inputs)
    assert len(kept) < len(of_base) / 4
    assert len(list(injection.parameters())) == 3


def test_heads_have_to_divide() -> None:
    with pytest.raises(ConfigError, match="key_width=8 is not divisible by heads=3"):
        peftcore.apply(HOSTS["bert"].build()[0], "attention_fusion", key_width=8, heads=3)
    with pytest.raises(
        ConfigError, match="the width 16 of the blocks of BertForSequenceClassification is not divisible by heads=3"
    ):
        peftcore.apply(HOSTS["bert"].build()[0], "attention_fusion", key_width=9, heads=3)
