"""IDPG: the kit; prompts and gradients of the authors' encoder, with both networks; the second pass, on hosts."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from prompted_hosts import host, outputs
from sines import wave
from torch import Tensor

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "idpg.json"
CODE: Any = {"repository": "CSerxy/IDPG", "commit": "691b282"}
CODE["script"] = "fairseq/modules/transformer_sentence_encoder.py"
SMALL = {"length": 3, "hidden": 4, "phm": 2}


BREAKS = "the first pass, in which another choice holds, breaks the graph"
HOST_NAMES = ("llama", "bert", "t5", "gpt2", "moe", "mistral")


# Generation without a cache has to be told where the text ends.
@conformance(
    "idpg",
    options={"*": SMALL},
    context=lambda model, picture: {"prompt_length": 3},
    expected_failures={f"compiled_equals_eager-{host}": BREAKS for host in HOST_NAMES},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def narrow(width: int = 8) -> Any:
    """A model as wide as the authors' encoder there."""
    import transformers

    sizes = {"hidden_size": width, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = transformers.BertModel(transformers.BertConfig(vocab_size=11, **sizes), add_pooling_layer=False)
    return model.double().eval()


def theirs(operator: Any) -> dict[str, list[Tensor]]:
    """Our tensors by the names of the authors', who list the parts of each apart, and have matrices the other way."""
    if isinstance(operator.down, torch.nn.Linear):
        layers = {"generation_dense": operator.down, "generation_out_proj": operator.up}
        return {
            f"{name}.{kind}": [getattr(layer, kind)] for name, layer in layers.items() for kind in ("weight", "bias")
        }
    names = {
        "generation_dense_w": operator.down.factors,
        "generation_shared_w1": operator.down.rules,
        "generation_out_proj_w": operator.up.factors,
        "generation_shared_w2": operator.up.rules,
    }
    parts = {f"{name}.{index}": [each, index] for name, each in names.items() for index in range(len(each))}
    return {**parts, "generation_dense_b": [operator.down.bias], "generation_out_proj_b.weight": [operator.up.bias]}


def part(tensor: Tensor, *index: int) -> Tensor:
    return tensor[index] if index else tensor


@pytest.mark.parametrize(("network", "phm"), [("dnn", None), ("phm", 2)])
@against("authors", "idpg", **CODE)
def test_the_authors_numbers(network: str, phm: int | None) -> None:
    """The rows of two texts, of the states of their first tokens, and the gradients of each tensor; their gelu computes
    in float32."""
    numbers = frozen(NUMBERS)[network]
    injection = peftcore.apply(narrow(), "idpg", **{**SMALL, "phm": phm}, dtype="float64")
    (operator,) = injection.operators.values()
    names = theirs(operator)
    assert names.keys() == numbers["tensors"].keys()
    with torch.no_grad():
        for name, (tensor, *index) in names.items():
            mine = part(tensor, *index)
            mine.copy_(torch.tensor(numbers["tensors"][name], dtype=torch.float64).view(mine.shape))
    operator.summary.take = lambda: torch.tensor(numbers["summary"], dtype=torch.float64).view(2, 8)
    rows = operator.rows_of(torch.zeros(2, 5, 8).double(), torch.ones(2, 5).bool())
    assert rows.flatten().tolist() == pytest.approx(numbers["rows"], abs=1e-6)
    (rows * wave((2, 3, 8), 0.23)).sum().backward()
    for name, (tensor, *index) in names.items():
        assert part(tensor.grad, *index).flatten().tolist() == pytest.approx(numbers["gradients"][name], abs=1e-6), name


@pytest.mark.parametrize("phm", [None, 2])
@pytest.mark.parametrize("name", ["bert", "t5", "llama"])
def test_the_prompt_is_made_of_what_the_model_makes_of_the_text(name: str, phm: int | None) -> None:
    """Each text by itself, with the network a second time: Kronecker products one by one."""
    model, _ = host(name)
    base = deepcopy(model)
    injection = peftcore.apply(model, "idpg", **{**SMALL, "phm": phm}, dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 3, 4, 1]]), torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    more = {"decoder_input_ids": ids[:, :2]} if name == "t5" else {}
    ours = outputs(name, model, input_ids=ids, attention_mask=mask, **more)
    stack = {"bert": "bert", "t5": "encoder", "llama": "model"}[name]
    matrices = []
    for layer in (operator.down, operator.up):
        if phm is None:
            matrices.append(layer.weight)
        else:
            pairs = zip(layer.rules, layer.factors, strict=True)
            matrices.append(sum(torch.kron(rule, factor) for rule, factor in pairs).T)
    for index, count in enumerate((4, 3)):
        words = base.get_input_embeddings()(ids[index : index + 1, :count])
        states = base.get_submodule(stack)(inputs_embeds=words)[0][0]
        u = states[-1 if name == "llama" else 0]
        hidden = torch.nn.functional.gelu(matrices[0] @ u + operator.down.bias)
        rows = (matrices[1] @ hidden + operator.up.bias).view(1, 3, 16)
        some = {key: value[index : index + 1] for key, value in more.items()}
        expected = outputs(name, base, inputs_embeds=torch.cat([rows, words], 1), **some)[0]
        if name != "t5":
            expected = expected[3:]
        torch.testing.assert_close(ours[index, : len(expected)], expected, rtol=1e-9, atol=1e-9)
    alone = outputs(name, base, input_ids=ids, attention_mask=mask, **more)
    assert (ours - alone).abs().max() > 1e-3


def test_the_first_pass_keeps_no_gradients_and_leaves_the_cache() -> None:
    model, inputs = host("llama")
    model.requires_grad_(True)
    injection = peftcore.apply(model, "idpg", **SMALL, dtype="float64")
    fill(injection)
    given = {"input_ids": inputs["input_ids"], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**given, use_cache=True)
    with peftcore.call(model, prompt_length=inputs["input_ids"].shape[1]):
        assert torch.equal(cached, model.generate(**given, use_cache=False))
    ran = []
    model.model.layers[0].register_forward_hook(lambda module, args, y: ran.append(torch.is_grad_enabled()))
    model(**inputs)
    assert ran == [False, True]


@pytest.mark.parametrize(("phm", "count"), [(None, 17 * 4 + 5 * 48), (2, 16 + (16 * 4 + 4 * 48) // 2 + 4 + 48)])
def test_counts(phm: int | None, count: int) -> None:
    injection = peftcore.apply(host("llama")[0], "idpg", **{**SMALL, "phm": phm})
    assert sum(p.numel() for p in injection.parameters()) == count


@pytest.mark.parametrize(
    ("network", "options"), [("dnn", {"hidden": 400, "phm": None}), ("phm", {"hidden": 12_800, "phm": 32})]
)
@against("authors", "idpg", **CODE, part="start")
def test_start_is_the_authors(network: str, options: dict[str, Any]) -> None:
    """Of 400 rows in a width of 32; their lists of factors together."""
    (operator,) = peftcore.apply(narrow(32).float(), "idpg", length=400, **options).operators.values()
    own = {name.rsplit(".", 1)[0] if name[-1].isdigit() else name: each[0] for name, each in theirs(operator).items()}
    told = frozen(NUMBERS, "start")[network]
    assert own.keys() == told.keys()
    for name, each in told.items():
        same_start(own[name], each)


@pytest.mark.parametrize(("network", "phm"), [("dnn", None), ("phm", 2)])
@against("authors", "idpg", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train(network: str, phm: int | None) -> None:
    model = narrow()
    injection = peftcore.apply(model, "idpg", **{**SMALL, "phm": phm})
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in injection.parameters()}
    own = theirs(*injection.operators.values())
    assert {id(each[0]) for each in own.values()} == {id(p) for p in injection.parameters()}
    assert sorted(own) == frozen(NUMBERS, "trains")[network]


@against("authors", "idpg", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(narrow(32), "idpg").config, frozen(NUMBERS, "defaults"))


def test_what_does_not_divide_is_refused() -> None:
    model, _ = host("llama")
    with pytest.raises(UnsupportedSite, match="phm=5"):
        peftcore.apply(model, "idpg", phm=5)
    assert not peftcore.injections(model)
