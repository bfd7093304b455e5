"""P-tuning v2: peft's plain forward (its prefixes, which are for decoders); its equation, written a second time as
forward hooks on a copy of BERT in float64; and what the authors' code has otherwise than prefix tuning. (Their own
models are copies of BERT for a transformers of 2021.)"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS
from peftcore_additive._prefix import PrefixOperator

LENGTH, HIDDEN = 4, 12


@conformance("p_tuning_v2", options={"*": {"length": 5}})  # several at once leave positions of GPT-2 for tokens
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str = "bert", dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = HOSTS[name].build()
    return model.to(dtype).eval().requires_grad_(False), inputs


def prefixes(injection: peftcore.Injection) -> list[Any]:
    """Its operators inside of attentions, without the one that starts positions behind them."""
    return [each for each in injection.operators.values() if isinstance(each, PrefixOperator)]


@pytest.mark.parametrize("projection", [None, HIDDEN])
@against("peft 0.21", "p_tuning_v2")
def test_beside_peft(projection: int | None) -> None:
    """The same inputs on both sides: positions start behind the prefix."""
    peft = pytest.importorskip("peft")
    base, inputs = host("llama")
    network = {} if projection is None else {"prefix_projection": True, "encoder_hidden_size": projection}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, **network)
    theirs, ours = peft.get_peft_model(deepcopy(base), config).double().eval(), deepcopy(base)
    encoder = theirs.prompt_encoder["default"]
    nn.init.normal_(encoder.embedding.weight, 0, 0.5)
    injection = peftcore.apply(ours, "p_tuning_v2", length=LENGTH, projection=projection, dtype="float64")
    with torch.no_grad():
        for index, operator in enumerate(prefixes(injection)):
            if projection is None:
                operator.prefix.copy_(encoder.embedding.weight.chunk(2, 1)[index])
            else:
                operator.out.weight.copy_(encoder.transform[2].weight.chunk(2, 0)[index])
                operator.out.bias.copy_(encoder.transform[2].bias.chunk(2, 0)[index])
        for shared in injection.shared.values():
            shared.embedding.weight.copy_(encoder.embedding.weight)
            shared.hidden.load_state_dict(encoder.transform[0].state_dict())
    expected = theirs(**inputs).logits
    assert (expected - base(**inputs).logits).abs().max() > 1e-3
    output = ours(**inputs).logits
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(output)
    for each in (output, expected):
        (each * direction).sum().backward()
    operators = prefixes(injection)
    if projection is None:
        pairs = [(encoder.embedding.weight, [each.prefix for each in operators], 1)]
    else:
        (shared,) = injection.shared.values()
        hidden, _, out = encoder.transform
        pairs = [(encoder.embedding.weight, [shared.embedding.weight], 0), (hidden.weight, [shared.hidden.weight], 0)]
        pairs += [(out.weight, [each.out.weight for each in operators], 0)]
        pairs += [(out.bias, [each.out.bias for each in operators], 0)]
    for other, mine, dim in pairs:
        assert other.grad.abs().max() > 1e-6
        torch.testing.assert_close(torch.cat([p.grad for p in mine], dim), other.grad, rtol=1e-8, atol=1e-10)


def deep_prompt(prompt: Callable[[], Tensor], padding: Tensor) -> Callable[..., Any]:
    """The equation as a hook on a self-attention of 2 heads of 8: `prompt` [length, keys and values] is put in front;
    `padding` is 1 at words."""

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (2, 8)).transpose(-3, -2)  # [..., heads, length, 8]

    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        query, key, value = (heads(part(x)) for part in (module.query, module.key, module.value))
        front = [heads(part).expand(len(x), -1, -1, -1) for part in prompt().chunk(2, -1)]
        key, value = torch.cat([front[0], key], 2), torch.cat([front[1], value], 2)
        seen = torch.cat([torch.ones(len(x), front[0].shape[2]), padding], 1).bool()
        scores = (query @ key.mT / 8**0.5).masked_fill(~seen[:, None, None], float("-inf"))
        mixed = torch.softmax(scores, -1) @ value
        return (mixed.transpose(1, 2).flatten(2), *output[1:])

    return hook


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("projection", [None, HIDDEN])
def test_equation(projection: int | None, implementation: str) -> None:
    base, inputs = host()
    model = deepcopy(base)
    model.set_attn_implementation(implementation)
    injection = peftcore.apply(model, "p_tuning_v2", length=LENGTH, projection=projection, dtype="float64")
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.5)
    before = base(**inputs).logits
    copies = {
        path: {key: p.detach().clone().requires_grad_() for key, p in module.named_parameters()}
        for path, module in injection.modules()
    }
    shared = next((tensors for path, tensors in copies.items() if path.startswith("shared:")), {})

    def prompt(own: dict[str, Tensor]) -> Callable[[], Tensor]:
        def made() -> Tensor:
            if projection is None:
                return own["prefix"]
            inner = torch.tanh(shared["embedding.weight"] @ shared["hidden.weight"].T + shared["hidden.bias"])
            return inner @ own["out.weight"].T + own["out.bias"]

        return made

    for layer in (0, 1):
        place = f"bert.encoder.layer.{layer}.attention.self"
        hook = deep_prompt(prompt(copies[f"{place}:attention"]), inputs["attention_mask"].double())
        base.get_submodule(place).register_forward_hook(hook, with_kwargs=True)
    places = torch.arange(LENGTH, LENGTH + inputs["input_ids"].shape[1])[None]
    ours, expected = model(**inputs).logits, base(**inputs, position_ids=places).logits
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for path, module in injection.modules():
        for key, parameter in module.named_parameters():
            assert copies[path][key].grad.abs().max() > 0
            torch.testing.assert_close(parameter.grad, copies[path][key].grad, rtol=1e-8, atol=1e-9)


def test_defaults_are_those_of_the_authors() -> None:
    """Prompts that train themselves from N(0, 1), dropped at 0.1 in training, in self-attention only."""
    injection = peftcore.apply(host("t5")[0], "p_tuning_v2", length=4000)
    assert not injection.shared
    assert sorted(injection.operators) == [
        f"{stack}.block.{layer}.layer.0.SelfAttention:attention" for stack in ("decoder", "encoder") for layer in (0, 1)
    ]
    for operator in injection.operators.values():
        assert operator.dropout.p == 0.1 and operator.gate is None
        assert abs(operator.prefix.std() - 1) < 0.02


def test_parameters() -> None:
    """2 k d a layer; with the network (m + 1) 2 d a layer and k d + (d + 1) m more. d = 16."""
    model, _ = host()
    assert peftcore.plan(model, "p_tuning_v2", length=LENGTH).trainable == 2 * LENGTH * 2 * 16
    made = peftcore.plan(model, "p_tuning_v2", length=LENGTH, projection=HIDDEN)
    assert made.trainable == 2 * (HIDDEN + 1) * 2 * 16 + LENGTH * 16 + 17 * HIDDEN


def test_the_head_trains_along() -> None:
    """The linear head of the task, named by the user, is trained and saved with the prompts; the host keeps its own."""
    model, inputs = host(dtype=torch.float32)
    head = model.classifier.weight.clone()
    injection = peftcore.apply(model, "p_tuning_v2", length=LENGTH, train=["classifier"])
    optimizer = torch.optim.Adam(injection.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
    assert torch.equal(model.classifier.weight, head)
    assert not torch.equal(injection.operators["classifier"].value, head)
    assert "classifier.value" in injection.state_dict()
