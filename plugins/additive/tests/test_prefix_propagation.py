"""Prefix-propagation: numbers of the authors' models (`numbers/prefix_propagation.json`); the equation on decoders and
T5, with caches; what windows of attention see of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sines import wave, waves
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, RouteError, TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

SIZES = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
SIZES |= {"max_position_embeddings": 24, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES |= {"intermediate_size": 12, "pad_token_id": 1, "type_vocab_size": 1}
IDS = torch.tensor([[2, 5, 3, 9, 4, 6, 8], [4, 4, 10, 7, 1, 1, 1]])
REAL = torch.arange(7) < torch.tensor([[7], [4]])
LENGTH = 3
PARAMETERS = {
    None: {"embedding.weight": "prefix"},
    5: {
        "embedding.weight": "start",
        **{
            f"trans.{at}.{kind}": f"{name}.{kind}"
            for at, name in ((0, "down"), (2, "up"))
            for kind in ("weight", "bias")
        },
    },
}
"""The authors' tensors and ours, by width of the network."""


@conformance("prefix_propagation")
def test_conformance(check: Callable[[], None]) -> None:
    check()


NUMBERS = Path(__file__).parent / "numbers" / "prefix_propagation.json"
CODE: Any = {"repository": "MonliH/prefix-propagation", "commit": "fc868c5", "script": "model/longformer.py"}


def small(name: str) -> Any:
    model: Any
    if name == "roberta":
        model = transformers.RobertaModel(transformers.RobertaConfig(**SIZES))
    else:
        config = transformers.LongformerConfig(**SIZES, attention_window=4)
        model = transformers.LongformerModel(config, add_pooling_layer=False)
    waves(dict(model.double().named_parameters()), 0.1)
    with torch.no_grad():  # the authors' rows have the positions from 0 on, and ours those in front of the first token
        table = model.embeddings.position_embeddings.weight
        table[2 : 2 + LENGTH] = table[:LENGTH].clone()
    return model.train()


def as_theirs(tensor: Tensor) -> Tensor:
    """What is added at blocks ``[blocks, length, width]`` as the authors keep it, ``[length, blocks * width]``."""
    return tensor.transpose(0, 1).flatten(1) if tensor.dim() == 3 else tensor


@against("authors", "prefix_propagation", **CODE)
@pytest.mark.parametrize("projection", PARAMETERS)
@pytest.mark.parametrize("name", ["roberta", "longformer"])
def test_numbers_of_the_authors(name: str, projection: int | None) -> None:
    """Outputs at tokens, and gradients, with padding on the right, in training; where attention has windows, rows and
    the first token are seen from everywhere."""
    numbers = frozen(NUMBERS)[str(projection)][name]
    model = small(name)
    options = {"length": LENGTH, "projection": projection, "dropout": 0.0, "dtype": "float64"}
    injection = peftcore.apply(model, "prefix_propagation", **options)
    (operator,) = injection.operators.values()
    own = dict(operator.named_parameters())
    assert set(own) == set(PARAMETERS[projection].values())
    theirs = {each: torch.zeros_like(as_theirs(own[mine])) for each, mine in PARAMETERS[projection].items()}
    waves(theirs, 0.2)
    with torch.no_grad():
        for each, mine in PARAMETERS[projection].items():
            if projection is None:
                own[mine].copy_(theirs[each].unflatten(1, (3, 8)).transpose(0, 1))
            else:
                own[mine].copy_(theirs[each])
    given = {} if name == "roberta" else {"global_attention_mask": (torch.arange(7) == 0).long().expand(2, -1)}
    y = model(input_ids=IDS, attention_mask=REAL.long(), **given)[0]
    torch.testing.assert_close(
        y.masked_fill(~REAL[..., None], 0).flatten(), torch.tensor(numbers["output"]).double(), rtol=1e-6, atol=1e-7
    )
    (y.square() * wave(y.shape, 0.3) * REAL[..., None]).sum().backward()
    assert set(theirs) == set(numbers["gradients"])
    for each, mine in PARAMETERS[projection].items():
        gradient, expected = own[mine].grad, torch.tensor(numbers["gradients"][each]).double()
        assert gradient is not None and expected.abs().max() > 1e-4
        torch.testing.assert_close(as_theirs(gradient).flatten(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("projection", "count"), [(None, 8 * 768 * 12), (64, 8 * 768 + 769 * 64 + 65 * 768 * 12)])
def test_counts_of_a_longformer_base(projection: int | None, count: int) -> None:
    """Of the authors' scripts: eight rows, half of what prefix tuning trains."""
    with torch.device("meta"):
        model = transformers.LongformerModel(transformers.LongformerConfig(attention_window=512))
    assert peftcore.plan(model, "prefix_propagation", projection=projection).trainable == count


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def adapted(name: str, **options: Any) -> tuple[Any, dict[str, Tensor], peftcore.Injection]:
    model, inputs = host(name)
    injection = peftcore.apply(model, "prefix_propagation", **{"length": LENGTH, "dtype": "float64", **options})
    fill(injection)
    return model, inputs, injection


@pytest.mark.parametrize(("name", "blocks"), [("llama", "model.layers"), ("t5", "encoder.block")])
def test_the_equation_by_hooks_in_front_of_blocks(name: str, blocks: str) -> None:
    """On the bare host, given zeros in front of its embedded tokens."""
    model, inputs, injection = adapted(name)
    bare = host(name)[0]
    (prefix,) = injection.operators.values()

    def adds(depth: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
            x, *rest = args
            return (torch.cat([x[:, :LENGTH] + prefix.prefix[depth], x[:, LENGTH:]], dim=1), *rest), kwargs

        return hook

    for depth, block in enumerate(bare.get_submodule(blocks)):
        block.register_forward_pre_hook(adds(depth), with_kwargs=True)
    given = dict(inputs)
    embedded = bare.get_input_embeddings()(given.pop("input_ids"))
    given["inputs_embeds"] = torch.cat([torch.zeros_like(embedded[:, :1]).expand(-1, LENGTH, -1), embedded], dim=1)
    if given.get("attention_mask") is not None:
        given["attention_mask"] = nn.functional.pad(given["attention_mask"], (LENGTH, 0), value=1)
    ours, theirs = model(**inputs).logits, bare(**given).logits
    theirs = theirs[:, LENGTH:] if name == "llama" else theirs
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours - host(name)[0](**inputs).logits).abs().max() > 1e-3


def test_a_decoder_that_reads_an_encoder() -> None:
    """Its answers are what a bare one gives behind zeros to which hooks add the same."""
    model, inputs, injection = adapted("t5", target="stack.decoder")
    bare = host("t5")[0]
    (prefix,) = injection.operators.values()
    for depth, block in enumerate(bare.decoder.block):
        added = prefix.prefix[depth]
        block.register_forward_pre_hook(
            lambda module, args, added=added: (
                torch.cat([args[0][:, :LENGTH] + added, args[0][:, LENGTH:]], 1),
                *args[1:],
            )
        )
    given = dict(inputs)
    embedded = bare.get_input_embeddings()(given.pop("decoder_input_ids"))
    zeros = torch.zeros_like(embedded[:, :1]).expand(-1, LENGTH, -1)
    given["decoder_inputs_embeds"] = torch.cat([zeros, embedded], dim=1)
    ours, theirs = model(**inputs).logits, bare(**given).logits[:, LENGTH:]
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert (ours - host("t5")[0](**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("path", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_generation_from_padded_prompts(path: dict[str, Any]) -> None:
    """A cache has the rows of all blocks, to which nothing is added again."""
    model, _, _ = adapted("llama")
    ids, mask = torch.randint(3, 40, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    given = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, **path}
    cached = model.generate(ids, use_cache=True, **given)
    assert torch.equal(model.generate(ids, **{**given, "use_cache": False, "cache_implementation": None}), cached)
    assert torch.equal(model.generate(ids[1:, 2:], **{**given, "attention_mask": mask[1:, 2:]})[0, 4:], cached[1, 6:])


@against("authors", "prefix_propagation", **CODE, part="start")
def test_start_is_the_authors() -> None:
    (operator,) = peftcore.apply(host("bert")[0], "prefix_propagation", length=2000).operators.values()
    same_start(operator.prefix, frozen(NUMBERS, "start")["prefix"])


@against("authors", "prefix_propagation", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head, and the token types, which their Longformer trains along. Their rows for words that a task adds to
    the vocabulary belong to the task, and not to the prefix."""
    model: Any = transformers.LongformerForSequenceClassification(
        transformers.LongformerConfig(**{**SIZES, "type_vocab_size": 1}, attention_window=4)
    )
    injection = peftcore.apply(model, "prefix_propagation", train=["classifier", "token_type_embeddings"])
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in injection.parameters()}
    told = frozen(NUMBERS, "trains")
    assert told.pop("longformer.embeddings.additional_word_embeddings.weight") == [2, 8]
    (operator,) = (each for path, each in injection.operators.items() if path.endswith("sequence"))
    found = {"propagated_prefix_encoder.embedding.weight": [8, operator.prefix.numel() // 8]}
    for name, tensor in injection.state_dict().items():
        if name.endswith(".value"):
            host = name.removesuffix(".value")
            found[host if host.endswith("bias") else f"{host}.weight"] = list(tensor.shape)
    assert found == told and len(found) == len(list(injection.parameters()))


@against("authors", "prefix_propagation", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("bert")[0], "prefix_propagation").config, frozen(NUMBERS, "defaults"))


def test_dropout_in_training() -> None:
    model, inputs = host("bert")
    peftcore.apply(model, "prefix_propagation", length=64, dropout=0.5, dtype="float64")
    quiet = model(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, quiet)
    model.train()
    assert (model(**inputs).logits - model(**inputs).logits).abs().max() > 1e-6


def test_what_it_refuses() -> None:
    model, inputs, injection = adapted("llama")
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(RouteError), peftcore.route(model, ["prefix_propagation", None]):
        model(**inputs)
    with pytest.raises(UnsupportedSite, match="not a stack of tokens"):
        peftcore.apply(host("bert")[0], "prefix_propagation", target="bert.encoder")
    with pytest.raises(TargetError, match="no such roles"):
        peftcore.apply(HOSTS["vit"].build()[0], "prefix_propagation")
