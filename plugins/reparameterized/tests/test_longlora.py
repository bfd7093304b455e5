"""LongLoRA: the authors' attentions in training, the equation in whole models with padding, and what is left of it in
evaluation, merged, and with caches."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from attention_hosts import FAMILIES, WORDS
from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peftcore
from peftcore.errors import SequenceError
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_reparameterized.lora import LoRAOperator

NUMBERS = Path(__file__).parent / "numbers" / "longlora.json"
CODE: Any = {"repository": "dvlab-research/LongLoRA", "commit": "d4eb344", "script": "llama_attn_replace.py"}
SIZES: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2}
IDS = torch.randint(3, WORDS, (2, 11), generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[1] * 11, [1] * 8 + [0] * 3])
HAND = "groups_by_hand"


TIED = {
    "a_host_without_memory_can_be_planned-t5": "torch's .to('meta') parts tied tables, so each is trained then",
    "an_injection_acts_only_where_it_lives-t5": "of tables that are tied, those that are not excluded train them all",
}


@conformance("longlora", expected_failures=TIED)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(shape: Sequence[int], key: str) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


@pytest.mark.parametrize("kind", ["flash", "noflash"])
@against("authors", "longlora", **CODE)
def test_the_authors_attention_with_the_same_numbers(kind: str) -> None:
    """Where tokens are rolled around, the first half group sees the last one; all others see the same."""
    config = transformers.LlamaConfig(**SIZES, vocab_size=8, intermediate_size=8, num_hidden_layers=1)
    model = transformers.LlamaModel(config).double().train()
    attention = model.layers[0].self_attn
    for part in ("q", "k", "v", "o"):
        weight = attention.get_submodule(f"{part}_proj").weight
        weight.data.copy_(4 * wave(weight.shape, f"{part}_proj"))
    peftcore.apply(model, "longlora", dtype="float64")
    states = wave((1, 16, 8), "states").requires_grad_()
    output = attention(states, model.rotary_emb(states, torch.arange(16)[None]), None)[0]
    expected = {key: torch.tensor(value, dtype=torch.float64) for key, value in frozen(NUMBERS)[kind].items()}
    first = 0 if kind == "flash" else 2
    close = 1e-10 if kind == "flash" else 1e-5  # their other version computes its softmax in float32
    torch.testing.assert_close(output[:, first:], expected["output"][:, first:], rtol=close, atol=close)
    if kind == "flash":
        (slope,) = torch.autograd.grad((output * wave((1, 16, 8), "direction")).sum(), [states])
        torch.testing.assert_close(slope, expected["slope"], rtol=1e-10, atol=1e-10)
    else:
        assert not torch.allclose(output[:, :first], expected["output"][:, :first], atol=1e-3)


def tiny(width: int) -> nn.Module:
    sizes: Any = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 9}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(hidden_size=width, **sizes))


@against("authors", "longlora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    operators = peftcore.apply(tiny(1600), "longlora").operators.values()
    factors = [each for each in operators if isinstance(each, LoRAOperator)]
    assert len(factors) == 4
    for key, told in frozen(NUMBERS, "start").items():
        same_start(torch.cat([each.get_parameter(key).flatten() for each in factors]), told)


@against("authors", "longlora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    ours = {}
    for path, operator in peftcore.apply(tiny(8), "longlora").operators.items():
        for name, value in operator.named_parameters():
            ours[f"{path}.weight" if name == "value" else f"{path}.lora_{name}.default.weight"] = value.numel()
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "longlora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(tiny(8), "longlora").config, frozen(NUMBERS, "defaults"))


def host(name: str) -> nn.Module:
    config, model, sizes = FAMILIES[name]
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if name == "bert" else {}
    made = getattr(transformers, model)(getattr(transformers, config)(vocab_size=WORDS, **sizes, **still))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made.double().eval()


@contextmanager
def groups_by_hand(model: Any, size: int) -> Iterator[None]:
    """Let attention be its equation, in which tokens of other groups are never seen."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        heads, tokens = query.shape[1:3]
        key, value = (each.repeat_interleave(heads // each.shape[1], 1) for each in (key, value))
        places = torch.arange(tokens)
        groups = torch.stack([places.div(size).floor(), (places.div(size) + 0.5).floor()])  # even sizes
        groups = groups.repeat_interleave(heads // 2, 0)[None]  # [1, heads, tokens]
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scaling + (0 if mask is None else mask)
        scores = scores.masked_fill(groups[..., :, None] != groups[..., None, :], float("-inf"))
        return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), value), None

    ALL_ATTENTION_FUNCTIONS.register(HAND, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(HAND, eager_mask)
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(HAND)
        yield
    finally:
        model.set_attn_implementation(before)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
def test_the_equation(name: str, implementation: str, size: int) -> None:
    """A short last group, padding, keys that queries share, attention to both sides; and the adapter merged."""
    narrow = implementation == "eager" and name != "bert"  # a softmax in float32, in hosts of any dtype
    model: Any = host(name).to(torch.float32 if narrow else torch.float64)
    model.set_attn_implementation(implementation)
    injection = peftcore.apply(model, "longlora", dtype="float32" if narrow else "float64", group_size=size)
    fill(injection)
    seen = PADDING.bool()
    given = {"attention_mask": PADDING, "use_cache": False} if name != "bert" else {"attention_mask": PADDING}

    def logits(each: Any) -> tuple[Tensor, Tensor]:
        embeds = each.get_input_embeddings()(IDS).detach().requires_grad_()
        made = each(inputs_embeds=embeds, **given).logits[seen]
        direction = torch.cos(torch.arange(made.numel(), dtype=made.dtype)).view_as(made)
        return made, torch.autograd.grad((made * direction).sum(), [embeds])[0]

    whole = logits(model)
    trained = logits(model.train())
    assert (trained[0] - whole[0]).abs().max() > 1e-2
    model.eval()
    injection.bake()
    close = 1e-4 if narrow else 1e-9
    for ours, plain in zip(whole, logits(model), strict=True):
        torch.testing.assert_close(ours, plain, rtol=close, atol=close)
    with groups_by_hand(model, size):
        expected = logits(model)
    for ours, theirs in zip(trained, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=close, atol=close)


def test_a_share_of_the_tokens() -> None:
    """8 tokens are four groups of 2; so are their first 8 among 11, beside a last one of 3."""
    outputs = []
    for options in ({}, {"group_size": 2}, {"group_ratio": 1.0}):
        model: Any = host("llama")
        injection = peftcore.apply(model, "longlora", dtype="float64", **options)
        fill(injection)
        outputs.append(model.train()(IDS[:, :8]).logits)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=0)
    assert (outputs[0] - outputs[2]).abs().max() > 1e-2


def test_what_trains_along() -> None:
    model: Any = host("llama")
    injection = peftcore.apply(model, "longlora")
    trained = {path for path, each in injection.operators.items() if isinstance(each, peftcore.author.Replacement)}
    assert trained == {"model.embed_tokens", "model.norm"} | {
        f"model.layers.{layer}.{name}_layernorm" for layer in (0, 1) for name in ("input", "post_attention")
    }
    bare = peftcore.apply(host("llama"), "longlora", train_norms=False, train_embeddings=False)
    assert not any(isinstance(each, peftcore.author.Replacement) for each in bare.operators.values())


def test_caches_are_for_evaluation() -> None:
    model: Any = host("llama")
    fill(peftcore.apply(model, "longlora", dtype="float64"))
    whole = model(IDS).logits
    past = model(IDS[:, :6], use_cache=True).past_key_values
    torch.testing.assert_close(model(IDS[:, 6:], past_key_values=past).logits, whole[:, 6:], rtol=1e-9, atol=1e-10)
    model.train()
    past = model(IDS[:, :6], use_cache=True).past_key_values
    with pytest.raises(SequenceError, match="5 training tokens attend to 11"):
        model(IDS[:, 6:], past_key_values=past)
