"""Prefix tuning against the real peft (its plain forward; its `generate` is wrong under these transformers), and
against the authors' parametrisation, written a second time in float64 with a prefilled cache in the place of an edited
attention."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import peftcore
from peftcore.errors import SequenceError
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS
from peftcore_additive._prefix import PrefixOperator

LENGTH, HIDDEN = 5, 12


@conformance("prefix_tuning")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str, dtype: torch.dtype = torch.float64) -> tuple[Any, dict[str, Tensor]]:
    model, inputs = HOSTS[name].build()
    return model.to(dtype).eval().requires_grad_(False), inputs


@torch.no_grad()
def fill(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        parameter.normal_(0, 0.5)


def logits(model: Any, **inputs: Any) -> Tensor:
    output: Tensor = model(**inputs).logits
    return output


def prefixes(injection: peftcore.Injection) -> list[Any]:
    """Its operators inside of attentions, without the one that starts positions behind them."""
    return [each for each in injection.operators.values() if isinstance(each, PrefixOperator)]


def behind(inputs: dict[str, Tensor], length: int = LENGTH) -> dict[str, Tensor]:
    """Positions that begin there."""
    rows, words = inputs["input_ids"].shape
    return {**inputs, "position_ids": torch.arange(length, length + words).expand(rows, -1)}


def assert_same_gradients(encoder: Any, injection: peftcore.Injection) -> None:
    """Of peft's tensors, which are those of all layers, and ours."""
    operators = prefixes(injection)
    if not injection.shared:
        pairs = [(encoder.embedding.weight.grad, torch.cat([each.prefix.grad for each in operators], 1))]
    else:
        (shared,) = injection.shared.values()
        hidden, _, out = encoder.transform
        pairs = [
            (encoder.embedding.weight.grad, shared.embedding.weight.grad),
            (hidden.weight.grad, shared.hidden.weight.grad),
            (hidden.bias.grad, shared.hidden.bias.grad),
            (out.weight.grad, torch.cat([each.out.weight.grad for each in operators])),
            (out.bias.grad, torch.cat([each.out.bias.grad for each in operators])),
        ]
    for expected, ours in pairs:
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("projection", [None, HIDDEN])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@against("peft 0.21", "prefix_tuning")
def test_forward_is_that_of_peft(name: str, projection: int | None) -> None:
    """Grouped key heads in llama; the network is one for all layers there, and cut into slices here."""
    peft = pytest.importorskip("peft")
    base, inputs = host(name)
    options = {"encoder_hidden_size": projection} if projection else {}
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=LENGTH, prefix_projection=projection is not None, **options
    )
    theirs = peft.get_peft_model(deepcopy(base), config).double().eval()
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_(0, 0.5)
    ours = deepcopy(base)
    injection = peftcore.apply(ours, "prefix_tuning", length=LENGTH, projection=projection, dtype="float64")
    operators = prefixes(injection)
    with torch.no_grad():
        for index, operator in enumerate(operators):
            if projection is None:
                operator.prefix.copy_(encoder.embedding.weight.chunk(len(operators), 1)[index])
            else:
                operator.out.weight.copy_(encoder.transform[2].weight.chunk(len(operators), 0)[index])
                operator.out.bias.copy_(encoder.transform[2].bias.chunk(len(operators), 0)[index])
        for shared in injection.shared.values():
            shared.embedding.weight.copy_(encoder.embedding.weight)
            shared.hidden.weight.copy_(encoder.transform[0].weight)
            shared.hidden.bias.copy_(encoder.transform[0].bias)
    valid = inputs["attention_mask"].bool()
    expected = logits(theirs, **inputs)[valid]
    assert (expected - logits(base, **inputs)[valid]).abs().max() > 0.01
    torch.testing.assert_close(logits(ours, **inputs)[valid], expected, rtol=1e-10, atol=1e-10)
    for output in (logits(ours, **inputs), logits(theirs, **inputs)):
        output[valid].square().sum().backward()
    assert_same_gradients(encoder, injection)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_positions_from_behind_the_prefix(name: str, tmp_path: Path) -> None:
    """What is passed, and what the host would count itself."""
    base, inputs = host(name)
    plain, shifted, again = deepcopy(base), deepcopy(base), deepcopy(base)
    options = {"length": LENGTH, "projection": None, "dtype": "float64", "seed": 0}
    peftcore.apply(plain, "prefix_tuning", behind=False, **options)
    injection = peftcore.apply(shifted, "prefix_tuning", **options)
    expected = logits(plain, **behind(inputs))
    assert (expected - logits(plain, **inputs)).abs().max() > 1e-3
    assert torch.equal(logits(shifted, **inputs), expected)
    assert torch.equal(logits(shifted, **behind(inputs, 0)), expected)
    with injection.disabled():
        assert torch.equal(logits(shifted, **inputs), logits(base, **inputs))
    injection.save(tmp_path)
    peftcore.load(again, tmp_path)
    assert torch.equal(logits(again, **inputs), expected)


def test_positions_from_behind_where_the_host_counts_what_is_no_padding() -> None:
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=1,
    )  # fmt: skip
    base = transformers.RobertaForMaskedLM(config).eval()
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 1, 1]])
    plain, shifted = deepcopy(base), deepcopy(base)
    options = {"length": LENGTH, "projection": None, "seed": 0}
    peftcore.apply(plain, "prefix_tuning", behind=False, **options)
    peftcore.apply(shifted, "prefix_tuning", **options)
    places = torch.tensor([[2, 3, 4, 5], [2, 3, 1, 1]]) + LENGTH * (ids != 1)  # padding is not counted
    expected = logits(plain, input_ids=ids, attention_mask=(ids != 1).long(), position_ids=places)
    assert torch.equal(logits(shifted, input_ids=ids, attention_mask=(ids != 1).long()), expected)


def without_room(family: str) -> Any:
    """A model with twelve positions."""
    config: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"max_position_embeddings": 12 + 2 * (family == "Roberta"), "intermediate_size": 16, "pad_token_id": 1}
    config |= {"OPT": {"word_embed_proj_dim": 16, "ffn_dim": 16}, "CLIPText": {"eos_token_id": 39}}.get(family, {})
    return getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**config)).eval()


@pytest.mark.parametrize("method", ["prefix_tuning", "p_tuning_v2", "apt"])
@pytest.mark.parametrize("family", ["CLIPText", "GPT2", "Bert", "Roberta", "OPT"])
def test_prefix_and_text_are_no_more_than_the_positions(method: str, family: str) -> None:
    model = without_room(family)
    bare = deepcopy(model)
    injection = peftcore.apply(model, method, length=LENGTH)
    ids = torch.randint(3, 38, (2, 13 - LENGTH))
    model(input_ids=ids[:, :-1])
    error = f"12 positions, but {LENGTH} keys in front of a text of {13 - LENGTH} tokens need 13: shorten the text"
    with pytest.raises(SequenceError, match=error):
        model(input_ids=ids)
    with injection.disabled():
        torch.testing.assert_close(model(input_ids=ids)[0], bare(input_ids=ids)[0])
    with peftcore.route(model, [None, None]):
        torch.testing.assert_close(model(input_ids=ids)[0], bare(input_ids=ids)[0])


def test_prefix_and_text_from_a_cache_are_counted_whole() -> None:
    peftcore.apply(model := without_room("GPT2"), "prefix_tuning", length=LENGTH)
    ids = torch.randint(3, 38, (2, 12 - LENGTH))
    cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(SequenceError, match=f"{LENGTH} keys in front of a text of {13 - LENGTH} tokens need 13"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_tokens_without_positions_stay_where_they_are() -> None:
    """T5 has distances alone, which a prefix does not change."""
    plan = peftcore.plan(host("t5")[0], "prefix_tuning")
    assert "T5Stack takes no position_ids, so its tokens stay where they are" in plan.notes
    assert {site.form for site in plan.sites} == {"attention"}


def test_rows_of_other_prefixes_have_positions_of_their_own() -> None:
    """Rows of a route are as each prefix alone has them, and a row without one is the base's."""
    base, inputs = host("gpt2")
    inputs = {key: value[:1].expand(3, -1) for key, value in inputs.items()}
    model = deepcopy(base)
    for name, length in (("short", 2), ("long", 7)):
        peftcore.apply(model, "prefix_tuning", name=name, length=length, projection=None, dtype="float64")
    expected = []
    for name in ("short", "long"):
        peftcore.activate(model, name)
        expected.append(logits(model, **inputs)[0])
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    with peftcore.route(model, ["long", None, "short"]):
        found = logits(model, **inputs)
    plain = logits(base, **inputs)[1]
    for row, wanted in zip(found, (expected[1], plain, expected[0]), strict=True):
        torch.testing.assert_close(row, wanted, rtol=1e-10, atol=1e-10)


class Authors(nn.Module):
    """The parametrisation of the authors' code: one network for all layers, whose output is cut, layer by layer, into
    keys and values by heads."""

    def __init__(self, layers: int, heads: int, width: int, hidden: int | None) -> None:
        super().__init__()
        self.sizes = (LENGTH, 2 * layers, heads, width // heads)
        self.flat = nn.Parameter(torch.randn(LENGTH, layers * 2 * width)) if hidden is None else None
        self.z = nn.Parameter(torch.randn(LENGTH, width))
        self.network = nn.Sequential(
            nn.Linear(width, hidden or 1), nn.Tanh(), nn.Linear(hidden or 1, 2 * layers * width)
        )

    def cache(self, rows: int) -> DynamicCache:
        made = self.network(self.z) if self.flat is None else self.flat
        by_layer = made.view(self.sizes).permute(1, 2, 0, 3)  # keys and values in turn, [heads, length, head_dim]
        cache = DynamicCache()
        for layer in range(self.sizes[1] // 2):
            key, value = (each.expand(rows, -1, -1, -1) for each in by_layer[2 * layer : 2 * layer + 2])
            cache.update(key, value, layer)
        return cache


@pytest.mark.parametrize("hidden", [None, HIDDEN])
def test_equation_of_the_authors(hidden: int | None) -> None:
    base, inputs = host("gpt2")
    authors = Authors(2, 2, 16, hidden).double()
    model = deepcopy(base)
    model.set_attn_implementation("sdpa")
    injection = peftcore.apply(model, "prefix_tuning", length=LENGTH, projection=hidden, dtype="float64")
    first, second = prefixes(injection)
    with torch.no_grad():
        if hidden is None:
            first.prefix.copy_(authors.flat[:, :32])
            second.prefix.copy_(authors.flat[:, 32:])
            pairs = [((first.prefix, second.prefix), authors.flat, 1)]
        else:
            (shared,) = injection.shared.values()
            last = authors.network[2]
            pairs = [
                ((shared.embedding.weight,), authors.z, 0),
                ((shared.hidden.weight,), authors.network[0].weight, 0),
                ((shared.hidden.bias,), authors.network[0].bias, 0),
                ((first.out.weight, second.out.weight), last.weight, 0),
                ((first.out.bias, second.out.bias), last.bias, 0),
            ]
            for mine, whole, dim in pairs:
                for part, value in zip(mine, whole.chunk(len(mine), dim), strict=True):
                    part.copy_(value)
    valid = inputs["attention_mask"].bool()
    ours = logits(model, **inputs)[valid]
    wide = torch.cat([torch.ones(2, LENGTH).long(), inputs["attention_mask"]], 1)
    places = behind(inputs)["position_ids"]
    expected = base(
        input_ids=inputs["input_ids"], attention_mask=wide, position_ids=places, cache=authors.cache(2), use_cache=True
    ).logits[valid]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    (ours * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, whole, dim in pairs:
        gradient = torch.cat([part.grad for part in mine], dim)
        assert whole.grad.abs().max() > 0
        torch.testing.assert_close(gradient, whole.grad, rtol=1e-8, atol=1e-9)


# Layers of each stack, and the width of a layer's keys and values: t5 has two stacks, and cross-attention.
STACKS = {"llama": ([2], 8), "gpt2": ([2], 16), "bert": ([2], 16), "t5": ([2, 2, 2], 16)}


@pytest.mark.parametrize("name", STACKS)
def test_parameters(name: str) -> None:
    """2 k d a layer; with the network (m + 1) 2 d a layer and k d + (d + 1) m a stack."""
    model, _ = host(name)
    stacks, width = STACKS[name]
    flat = peftcore.plan(model, "prefix_tuning", length=LENGTH, projection=None)
    assert flat.trainable == sum(stacks) * LENGTH * 2 * width
    made = peftcore.plan(model, "prefix_tuning", length=LENGTH, projection=HIDDEN)
    shared = len(stacks) * (LENGTH * width + (width + 1) * HIDDEN)
    assert made.trainable == sum(stacks) * (HIDDEN + 1) * 2 * width + shared
    gated = peftcore.plan(model, "prefix_tuning", length=LENGTH, projection=None, gate=True)
    assert gated.trainable == flat.trainable + sum(stacks)


def test_encoder_decoder_and_cross_attention_have_prefixes_of_their_own() -> None:
    injection = peftcore.apply(host("t5")[0], "prefix_tuning", length=LENGTH, projection=HIDDEN)
    kinds = (
        "encoder_block_layer_SelfAttention",
        "decoder_block_layer_SelfAttention",
        "decoder_block_layer_EncDecAttention",
    )
    assert set(injection.shared) == {f"{kind}_{LENGTH}x{HIDDEN}" for kind in kinds}
    assert len(injection.operators) == 6


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("projection", [None, HIDDEN])
def test_a_gate_at_zero_is_the_identity_and_at_one_the_prefix(name: str, projection: int | None) -> None:
    base, inputs = host(name)
    expected = logits(base, **inputs)
    gated, open_ = deepcopy(base), deepcopy(base)
    options = {"length": LENGTH, "projection": projection, "behind": False, "dtype": "float64", "seed": 0}
    plain = peftcore.apply(open_, "prefix_tuning", **options)
    injection = peftcore.apply(gated, "prefix_tuning", gate=True, **options)
    assert torch.equal(logits(gated, **inputs), expected)
    with torch.no_grad():
        for path, module in injection.modules():
            source = dict(plain.modules())[path]
            for key, parameter in source.named_parameters():
                module.get_parameter(key).copy_(parameter)
            for key, parameter in module.named_parameters():
                if key == "gate":
                    parameter.fill_(1)
    moved = logits(open_, **inputs)
    assert (moved - expected).abs().max() > 1e-3
    torch.testing.assert_close(logits(gated, **inputs), moved, rtol=1e-10, atol=1e-10)


def test_a_gate_learns_first() -> None:
    model, inputs = host("llama")
    injection = peftcore.apply(model, "prefix_tuning", gate=True, projection=None, dtype="float64")
    logits(model, **inputs).square().sum().backward()
    for operator in prefixes(injection):
        assert operator.gate.grad.abs() > 0
        assert not operator.prefix.grad.any()


def test_start() -> None:
    """N(0, 1) where the prefix itself trains; what torch gives embeddings and linear maps where a network makes it."""
    model, _ = host("llama")
    injection = peftcore.apply(model, "prefix_tuning", length=4000, projection=None)
    drawn = torch.cat([operator.prefix.flatten() for operator in prefixes(injection)]).detach()
    assert abs(drawn.std() - 1) < 0.02 and abs(drawn.mean()) < 0.02
    injection.remove()
    made = peftcore.apply(model, "prefix_tuning", length=4000)
    (shared,) = made.shared.values()
    assert abs(shared.embedding.weight.std() - 1) < 0.02
    bound = 512**-0.5  # the last matrix has 512 inputs, whether it is whole or a slice
    largest = max(operator.out.weight.abs().max().item() for operator in prefixes(made))
    assert 0.99 * bound < largest <= bound


def test_dropout_is_drawn_for_each_row() -> None:
    model, inputs = host("llama")
    inputs = {key: value[:1].repeat(2, 1) for key, value in inputs.items()}
    injection = peftcore.apply(model, "prefix_tuning", dropout=0.5, projection=None, dtype="float64")
    still = logits(model, **inputs)
    torch.testing.assert_close(still[0], still[1])
    for operator in injection.operators.values():
        operator.train()
    moving = logits(model, **inputs)
    assert (moving[0] - moving[1]).abs().max() > 1e-3


def test_layers_may_have_prefixes_of_other_lengths(tmp_path: Path) -> None:
    model, inputs = host("llama", torch.float32)
    other = deepcopy(model)
    overrides = {"*layers.1.*": {"length": 2, "projection": 3}}
    injection = peftcore.apply(model, "prefix_tuning", length=LENGTH, projection=HIDDEN, overrides=overrides)
    assert len(injection.shared) == 2
    fill(injection)
    expected = logits(model, **inputs)
    injection.save(tmp_path)
    peftcore.load(other, tmp_path)
    assert torch.equal(logits(other, **inputs), expected)


@pytest.mark.parametrize("behind", [False, True])
def test_generation_follows_the_prefix(behind: bool) -> None:
    """What peft 0.21.2 gets wrong under these transformers: with a cache and without, the same text, not the base's."""
    model, inputs = host("llama", torch.float32)
    words = {key: value[:1] for key, value in inputs.items()}
    model.generation_config.eos_token_id = None
    options = {"max_new_tokens": 8, "do_sample": False}
    base = model.generate(**words, **options)
    fill(peftcore.apply(model, "prefix_tuning", length=LENGTH, projection=None, behind=behind))
    cached = model.generate(**words, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**words, **options, use_cache=False))
    assert not torch.equal(cached, base)
