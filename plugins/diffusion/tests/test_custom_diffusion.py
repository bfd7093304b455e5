"""Custom diffusion beside the processors of diffusers that compute it, with the same matrices in both."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from words_and_unet import WordsAndUNet

import peftcore
from peftcore.errors import TargetError
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS


@conformance("custom_diffusion", telling=["unet", "dit"])
def test_conformance(check: Callable[[], None]) -> None:
    check()


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    return model.double().eval(), inputs


def theirs(model: Any, operators: Any) -> tuple[Any, dict[str, nn.Parameter]]:
    """A copy of the host with a processor of diffusers at each cross-attention, whose matrices are the host's own and
    our change; by the names of our operators."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    copy, matrices = deepcopy(model).requires_grad_(False), {}
    for path in {path.rpartition(".")[0] for path in operators}:
        attention = copy.get_submodule(path)
        sizes = attention.to_k.out_features, attention.to_k.in_features
        processor = CustomDiffusionAttnProcessor(train_q_out=False, hidden_size=sizes[0], cross_attention_dim=sizes[1])
        attention.set_processor(processor.double())
        for part in ("to_k", "to_v"):
            weight = processor.get_parameter(f"{part}_custom_diffusion.weight")
            weight.data.copy_(attention.get_submodule(part).weight + operators[f"{path}.{part}"].delta)
            matrices[f"{path}.{part}"] = weight
    return copy, matrices


@against("diffusers 0.42", "custom_diffusion")
def test_outputs_gradients_and_merged_weights_are_those_of_diffusers() -> None:
    model, inputs = unet()
    base = deepcopy(model)
    injection = peftcore.apply(model, "custom_diffusion", dtype="float64")
    operators: Any = injection.operators
    for operator in operators.values():
        nn.init.normal_(operator.delta, std=0.1)
    copy, matrices = theirs(base, operators)
    assert len(matrices) == len(operators) == 2 * sum(name.endswith("attn2") for name, _ in base.named_modules())
    before, ours, expected = (each(**inputs).sample for each in (base, model, copy))
    assert (ours - before).abs().max() > 0.01
    torch.testing.assert_close(ours, expected)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, operator in operators.items():
        assert operator.delta.grad.any()
        torch.testing.assert_close(operator.delta.grad, matrices[path].grad)
    injection.bake()
    for path, matrix in matrices.items():
        torch.testing.assert_close(model.get_submodule(path).weight, matrix)


def test_the_first_token_gives_no_gradient_unless_told_to() -> None:
    """With a text of one token, nothing trains; self-attention, where the user wants it, has no start to hold."""
    model, inputs = unet()
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :1]
    for options, learns in (({}, False), ({"hold_first": False}, True), ({"target": "attn.v"}, True)):
        injection = peftcore.apply(model, "custom_diffusion", dtype="float64", **options)
        model(**inputs).sample.square().sum().backward()
        assert any(parameter.grad.any() for parameter in injection.parameters()) == learns
        injection.remove()


def test_words_train_along_where_the_host_has_them() -> None:
    pytest.importorskip("diffusers")
    model, inputs = WordsAndUNet().eval(), HOSTS["unet"].build()[1]
    del inputs["encoder_hidden_states"]
    ids = torch.tensor([[1, 19, 4], [1, 2, 18]])
    injection = peftcore.apply(model, "custom_diffusion", modifier_tokens=[18, 19], initializer=3, target="cross.k")
    words = injection.operators["words/words"]
    assert torch.equal(words.vectors, model.words.weight[3].expand(2, -1))
    model(ids, **inputs).square().sum().backward()
    assert all(words.vectors.grad.abs().amax(1) > 0)
    assert model.words.weight.grad is None
    with pytest.raises(TargetError, match="embed"):
        peftcore.apply(unet()[0], "custom_diffusion", modifier_tokens=[1])
