"""Rows of a route at stacked experts: each adapter's experts get its own tokens alone."""

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import peftcore
from peftcore import activate, route
from peftcore.errors import RouteError
from peftcore.testing.kit import fill

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 64,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}


def mixture(kind: str) -> nn.Module:
    torch.manual_seed(0)
    makers = {
        "mixtral": lambda: transformers.MixtralForCausalLM(transformers.MixtralConfig(**SHAPE, num_local_experts=4)),
        "qwen3": lambda: transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**SHAPE, moe_intermediate_size=16, num_experts=4)
        ),
        "gpt_oss": lambda: transformers.GptOssForCausalLM(transformers.GptOssConfig(**SHAPE, num_local_experts=4)),
    }
    return makers[kind]()  # torch's grouped products have no float64


def adapters(model: nn.Module, *methods: str) -> list[peftcore.Injection]:
    found = [
        peftcore.apply(model, method, name=f"{method}{n}", target=["experts.*", "attn.v"])
        for n, method in enumerate(methods)
    ]
    for seed, each in enumerate(found):
        fill(each, seed)
        each.trainable(True)
    return found


def gradients(injections: list[peftcore.Injection]) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for each in injections for p in each.parameters()]
    for each in injections:
        for parameter in each.parameters():
            parameter.grad = None
    return found


@pytest.mark.parametrize("kind", ["mixtral", "qwen3", "gpt_oss"])
@pytest.mark.parametrize("methods", [("lora", "lora"), ("dora", "ia3"), ("vera", "lora")])
def test_rows_are_those_of_separate_passes_with_their_gradients(kind: str, methods: tuple[str, ...]) -> None:
    model = mixture(kind)
    injections = adapters(model, *methods)
    one, two = (each.name for each in injections)
    names = [two, None, one, two, one]
    ids = torch.randint(0, 64, (5, 6), generator=torch.Generator().manual_seed(1))
    expected = []
    for row, name in enumerate(names):
        with activate(model, *([name] if name else [])):
            expected.append(model(ids[row : row + 1]).logits[0])
    wanted_output = torch.stack(expected)
    wanted_output.square().sum().backward()
    wanted = gradients(injections)
    with route(model, names):
        routed = model(ids).logits
    routed.square().sum().backward()
    torch.testing.assert_close(routed, wanted_output, rtol=1e-5, atol=1e-5)
    assert all(gradient.abs().max() > 0 for gradient in wanted)
    for actual, gradient in zip(gradients(injections), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad(), route(model, names):
        torch.testing.assert_close(model(ids).logits, wanted_output.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_each_adapter_pays_for_its_own_tokens(kind: str, training: bool) -> None:
    model = mixture(kind).train(training)
    names = [each.name for each in adapters(model, "lora", "lora", "dora", "ia3")]
    ids = torch.randint(0, 64, (4, 8))

    def flops(rows: Tensor) -> int:
        with FlopCounterMode(display=False) as counted, torch.set_grad_enabled(training):
            loss = model(rows, labels=rows).loss
            if training:
                loss.backward()
        return int(counted.get_total_flops())

    apart = 0
    for row, name in enumerate(names):
        with activate(model, name):
            apart += flops(ids[row : row + 1])
    with route(model, names):
        assert flops(ids) <= 1.03 * apart


def test_experts_that_get_chosen_tokens_alone_are_refused() -> None:
    config = transformers.SwitchTransformersConfig(
        d_model=32,
        d_ff=48,
        d_kv=8,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        vocab_size=64,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
    )
    model = transformers.SwitchTransformersForConditionalGeneration(config)
    name = peftcore.apply(model, "lora", target="mlp.up").name
    with pytest.raises(RouteError, match="cannot be distinguished"):
        route(model, [name, None])
