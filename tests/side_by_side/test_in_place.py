"""Methods that train tensors of the host itself (bitfit, linear_probe, ln_tuning) against training the same tensors in
place, with plain torch on a copy: after ten steps of the same data, the same values and the same outputs.

Weight decay and Adafactor tell values from differences: they act on what a parameter is, not on how far it moved.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.testing.hosts import HOSTS, stir

STEPS = 10
EXACT = 1e-6
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.3),
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
    # Steps as large as the root mean square of the tensor itself.
    "adafactor": lambda parameters: transformers.optimization.Adafactor(
        parameters, lr=0.05, scale_parameter=True, relative_step=False, weight_decay=0.1
    ),
}


def biases(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.endswith("bias")]


def biases_and(head: str) -> Callable[[nn.Module], list[str]]:
    """Of the head over classes, the weight too."""
    return lambda model: [*biases(model), f"{head}.weight"]


def norms(model: nn.Module) -> list[str]:
    kinds = (nn.LayerNorm, nn.BatchNorm2d)
    inside = [path for path, m in model.named_modules() if isinstance(m, kinds) or "RMSNorm" in type(m).__name__]
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in inside]


def named(*names: str) -> Callable[[nn.Module], list[str]]:
    return lambda model: list(names)


def masked_bert() -> tuple[nn.Module, dict[str, Any]]:
    """Its output matrix is the input table, and the output's bias has two names."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = stir(transformers.BertForMaskedLM(transformers.BertConfig(**sizes, initializer_range=0.3)))
    return model, {"input_ids": torch.randint(3, 40, (2, 5))}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    model, inputs = masked_bert() if name == "masked-bert" else HOSTS[name].build()
    return model.requires_grad_(True), inputs


def output(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.logits


def train(model: nn.Module, parameters: list[nn.Parameter], optimizer: Optimizer, inputs: dict[str, Any]) -> None:
    """Ten steps towards some fixed outputs, dropout and all."""
    updates = optimizer(parameters)
    generator = torch.Generator().manual_seed(3)
    for step in range(STEPS):
        torch.manual_seed(step)
        result = output(model(**inputs))
        goal = torch.randn(result.shape, generator=generator)
        (result - goal).square().mean().backward()
        updates.step()
        updates.zero_grad()


# method, host, what trains by hand
CASES = [
    ("bitfit", "bert", biases_and("classifier")),
    ("bitfit", "masked-bert", biases),
    ("bitfit", "gpt2", biases),
    ("bitfit", "encoder", biases_and("head")),
    ("bitfit", "convnet", biases_and("head")),
    ("ln_tuning", "bert", norms),
    ("ln_tuning", "llama", norms),
    ("ln_tuning", "convnet", norms),
    ("linear_probe", "bert", named("classifier.weight", "classifier.bias")),
    ("linear_probe", "llama", named("lm_head.weight")),
    ("linear_probe", "gpt2", named("transformer.wte.weight")),
    ("linear_probe", "t5", named("shared.weight")),
    ("linear_probe", "masked-bert", named("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")),
    ("linear_probe", "convnet", named("head.weight", "head.bias")),
]


@pytest.mark.share(3)
@pytest.mark.parametrize("optimizer", [pytest.param(each, id=name) for name, each in OPTIMIZERS.items()])
@pytest.mark.parametrize(("method", "host", "trained"), [pytest.param(*case, id="-".join(case[:2])) for case in CASES])
def test_ten_steps_end_where_training_in_place_ends(
    method: str, host: str, trained: Callable[[nn.Module], list[str]], optimizer: Optimizer
) -> None:
    by_hand, inputs = build(host)
    names = trained(by_hand)
    ours = deepcopy(by_hand)
    before = {name: p.detach().clone() for name, p in by_hand.named_parameters()}

    by_hand.requires_grad_(False)
    parameters = [by_hand.get_parameter(name).requires_grad_(True) for name in names]
    injection = peftcore.apply(ours, method)
    for model, tensors in ((by_hand, parameters), (ours, list(injection.parameters()))):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # statistics are another question
        train(model, tensors, optimizer, inputs)
        model.eval()

    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters() if name in before)
    with torch.no_grad():
        ours_output, expected = output(ours(**inputs)), output(by_hand(**inputs))
        assert difference(ours_output, expected) <= EXACT
        with injection.disabled():
            assert difference(output(ours(**inputs)), expected) > 0.01
    injection.bake()
    for name, p in by_hand.named_parameters():
        assert difference(ours.get_parameter(name), p) <= EXACT
    assert all(difference(by_hand.get_parameter(name), before[name]) > 1e-3 for name in names)


def test_missing_biases_train_like_biases_of_zero() -> None:
    """A Llama with biases that are zero, against one that gets them from the method."""
    model, inputs = build("llama")
    with_biases = deepcopy(model)
    inside = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for name in inside:
        linear = with_biases.get_submodule(name)
        linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    base = output(model(**inputs)).detach()
    injection = peftcore.apply(model, "bitfit", add_missing_bias=True)
    assert torch.equal(output(model(**inputs)), base)
    assert len(injection.operators) == len(inside) == 14
    with_biases.requires_grad_(False)
    parameters = [with_biases.get_submodule(name).bias.requires_grad_(True) for name in inside]
    for each, tensors in ((with_biases, parameters), (model, list(injection.parameters()))):
        train(each.train(), tensors, OPTIMIZERS["adamw"], inputs)
        each.eval()
    assert difference(output(model(**inputs)), output(with_biases(**inputs))) <= EXACT
    assert difference(output(model(**inputs)), base) > 0.01
    for name, tensor in zip(inside, parameters, strict=True):
        assert difference(injection.operators[f"{name}.bias"].value, tensor) <= EXACT
