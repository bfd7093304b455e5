"""Trainable tokens: the kit, the numbers of peft where it is right, training in place where it is not, and files."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from peft_pairs import ADAPTER, Both, Pair, difference
from test_in_place import masked_bert
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

import peftcore
from peftcore.errors import ConfigError, HostMismatch, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore.testing.hosts import HOSTS

TOKENS = [7, 3, 5, 1]


UNTIED = ("llama", "bert", "moe", "mistral")
"""Hosts that show tokens of the batch alone, so half of all tokens train there; the smallest layer has four rows."""
MOVED = "torch cuts the ties of a host that moves to the meta device, so one table counts as three"


@conformance(
    "trainable_tokens",
    options={
        "*": {"token_indices": [3, 0, 2]},
        "dit": {"token_indices": [1, 2]},  # the classes of its batch
        "task": {"token_indices": [*range(65, 91), *range(97, 123)]},  # letters
        **{name: {"token_indices": [*range(3, 40, 2)]} for name in UNTIED},
    },
    expected_failures={"a_host_without_memory_can_be_planned-t5": MOVED},
)
def test_trainable_tokens(check: Callable[[], None]) -> None:
    check()


def token_pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """The rows; peft keeps them in the order in which they were named."""
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(site.path, operator.value, layer.trainable_tokens_delta[ADAPTER], lambda t: t)


def config(name: str, **options: Any) -> peft.TrainableTokensConfig:
    return peft.TrainableTokensConfig(token_indices=sorted(TOKENS), target_modules=[name], **options)


def decoder(name: str, **options: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model, inputs = HOSTS[name].build()
    inputs["input_ids"][:, :3] = torch.tensor([3, 5, 7])
    return model.eval(), lambda adapted: adapted(**inputs).logits


@pytest.mark.parametrize(("name", "table"), [("llama", "embed_tokens"), ("gpt2", "wte")])
@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "trainable_tokens")
def test_numbers_of_peft(name: str, table: str) -> None:
    """A table of its own, and one that is tied to the head; token 1 is not in the batch, but in the tied head."""
    model, run = decoder(name)
    both = Both(model, "trainable_tokens", {"token_indices": TOKENS}, config(table), token_pairs)
    both.assert_same(run)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:::peft")
def test_numbers_of_peft_on_scaled_tables_and_padding(padded: bool) -> None:
    """The row of the padding stands for it, too, but learns nothing where it is looked up."""
    layer = (
        Gemma3TextScaledWordEmbedding(20, 6, 0, embed_scale=3.0) if not padded else nn.Embedding(20, 6, padding_idx=7)
    )
    model, ids = nn.Sequential(layer), torch.tensor([[1, 7, 3, 2], [5, 5, 0, 7]])
    both = Both(model, "trainable_tokens", {"token_indices": TOKENS, "target": "0"}, config("0"), token_pairs)
    both.assert_same(lambda adapted: adapted(ids))
    gradient = both.injection.operators["0"].value.grad
    assert gradient.any(-1).tolist() == [True, True, True, not padded]


def in_place(model: nn.Module, table: nn.Parameter, rows: Tensor) -> nn.Module:
    with torch.no_grad():
        table[sorted(TOKENS)] = rows
    return model


def test_a_tied_head_keeps_its_bias() -> None:
    """peft wraps a tied head and leaves its bias out; the right numbers are those of the table changed in place."""
    model, inputs = masked_bert()
    model.eval()
    before, by_hand = model(**inputs).logits, deepcopy(model)
    injection = peftcore.apply(model, "trainable_tokens", token_indices=TOKENS)
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.value)
    in_place(by_hand, by_hand.bert.embeddings.word_embeddings.weight, operator.value)
    expected = by_hand(**inputs).logits
    assert difference(model(**inputs).logits, expected) < 1e-5 < 0.01 < difference(expected, before)

    other = deepcopy(by_hand)
    tuner = peft.PeftModel(other, config("word_embeddings"))
    bias = by_hand.cls.predictions.decoder.bias
    assert bias.abs().max() > 0.1
    torch.testing.assert_close(tuner(**inputs).logits + bias, expected)

    injection.bake()
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.equal(model.cls.predictions.decoder.weight, by_hand.cls.predictions.decoder.weight)


def test_ten_steps_move_the_rows_as_in_place_and_nothing_else() -> None:
    """Of gradients in place, those of the rows alone; the tied head's are in them."""
    model, inputs = HOSTS["gpt2"].build()
    model = model.double().eval()
    by_hand = deepcopy(model)
    base = model.transformer.wte.weight.detach().clone()
    injection = peftcore.apply(model, "trainable_tokens", token_indices=TOKENS, dtype="float64")
    table = by_hand.requires_grad_(False).transformer.wte.weight.requires_grad_(True)
    mask = torch.zeros(40, 1).double()
    mask[TOKENS] = 1
    ours, theirs = torch.optim.SGD(injection.parameters(), lr=0.3), torch.optim.SGD([table], lr=0.3)
    for _ in range(10):
        for host, optimizer in ((model, ours), (by_hand, theirs)):
            optimizer.zero_grad()
            host(**inputs, labels=inputs["input_ids"]).loss.backward()
            if host is by_hand:
                table.grad *= mask
            optimizer.step()
    (operator,) = injection.operators.values()
    torch.testing.assert_close(operator.value, table[sorted(TOKENS)], rtol=0, atol=1e-12)
    assert (operator.value - base[sorted(TOKENS)]).abs().max() > 0.01
    assert torch.equal(model.transformer.wte.weight, base)


def test_new_tokens_come_back_on_a_table_that_was_resized_anew(tmp_path: Any) -> None:
    """What the file keeps are rows: another start of the new rows makes no difference."""
    first, inputs = HOSTS["llama"].build()
    second = deepcopy(first)
    for seed, model in enumerate((first, second)):
        torch.manual_seed(seed)
        model.resize_token_embeddings(43)
    inputs["input_ids"][0, :3] = torch.tensor([40, 41, 42])
    injection = peftcore.apply(
        first, "trainable_tokens", token_indices=[40, 41, 42], target=["embed_tokens", "lm_head"]
    )
    for operator in injection.operators.values():
        nn.init.normal_(operator.value)
    injection.save(tmp_path)
    assert not torch.equal(first.lm_head.weight[40:], second.lm_head.weight[40:])
    peftcore.load(second, tmp_path)
    assert torch.equal(second(**inputs).logits, first(**inputs).logits)
    with pytest.raises(HostMismatch):
        peftcore.load(HOSTS["llama"].build()[0], tmp_path)


def test_a_table_and_its_copies_are_one() -> None:
    model, _ = HOSTS["t5"].build()
    injection = peftcore.apply(model, "trainable_tokens", token_indices=TOKENS)
    (graft,) = injection.grafts
    names = {site.module_path for site in graft.holders}
    assert names == {"shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}
    assert peftcore.plan(HOSTS["t5"].build()[0], "trainable_tokens", token_indices=TOKENS).trainable == 4 * 16


@pytest.mark.parametrize("indices", [[], [3, 3], [-1]])
def test_indices_that_are_none(indices: list[int]) -> None:
    with pytest.raises(ConfigError, match="token_indices"):
        peftcore.plan(nn.Sequential(nn.Embedding(9, 4)), "trainable_tokens", token_indices=indices)


def test_rows_that_are_not_there() -> None:
    for layer, why in ((nn.Embedding(9, 4), "9 rows, but token_indices has 9"), (nn.Conv1d(20, 20, 3), "not a table")):
        for do in (peftcore.plan, peftcore.apply):
            with pytest.raises(UnsupportedSite, match=why):
                do(nn.Sequential(layer), "trainable_tokens", target="0", token_indices=[2, 9])
