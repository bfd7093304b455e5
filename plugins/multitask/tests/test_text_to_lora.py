"""Text-to-LoRA: the kit; the LoRAs that the authors' own network makes, with gradients, and what rows get of them; the
loss and dropout in training; LoRAs that are written down; which sites share what; how it starts and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_pairs import difference
from sines import wave
from torch import nn
from torch.nn.functional import linear
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.errors import ConfigError, MissingContext, RouteError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill
from peftcore_multitask.text_to_lora import make_lora

NUMBERS = Path(__file__).parent / "numbers" / "text_to_lora.json"
CODE: Any = {"repository": "SakanaAI/text-to-lora", "commit": "8ba7749"}
CODE["script"] = "src/hyper_llm_modulator/hyper_modulator.py"
SMALL: dict[str, Any] = {"vector_width": 5, "rank": 2, "alpha": 4.0, "latent": 12, "head_width": 6}
KIT = {**SMALL, "vector_width": 16, "latent": 16, "head_width": 16}


@conformance(
    "text_to_lora",
    options={"*": KIT, "encoder": {"target": ["mlp.up", "mlp.down"]}},  # its attention's matrices are not called
    context=lambda model, picture: {"task_vector": picture.flatten(1)[:, :16]},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def llama(layers: int = 2) -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": layers, "vocab_size": 16}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).double().eval()


def parameters(injection: Any, depth: int = 2) -> list[list[nn.Parameter]]:
    """In the order of the authors' numbers; embeddings are rows of one of theirs."""
    network = injection.shared["network"]
    layers = [injection.shared[f"layer/model/layers/n/{layer}"] for layer in range(depth)]
    names = (f"kind/model/layers/n/self_attn/{each}" for each in ("q_proj/8x8", "v_proj/8x4"))
    kinds = [injection.shared[name] for name in names]
    single = [*network.reader.parameters(), *network.reader_norm.parameters()]
    rest = [*network.layer_norm.parameters(), *network.kind_norm.parameters(), *network.up.parameters()]
    rest += [*network.down.parameters(), *network.blocks.parameters(), *network.last_norm.parameters()]
    rest += [*network.last_up.parameters(), *network.last_down.parameters()]
    rest += [each for kind in kinds for each in kind.head.parameters()]
    tables = [[each.value for each in layers], [each.value for each in kinds]]
    return [*([each] for each in single), *tables, *([each] for each in rest)]


@against("authors", "text_to_lora", **CODE)
def test_numbers_of_the_authors() -> None:
    """Both factors of each site for two vectors, what a layer adds for a row of each, and gradients (of large tensors
    every n-th value)."""
    model = llama()
    injection: Any = peftcore.apply(model, "text_to_lora", **SMALL, dtype="float64")
    rows = parameters(injection)
    assert sorted(id(each) for row in rows for each in row) == sorted(map(id, injection.parameters()))
    with torch.no_grad():
        for index, row in enumerate(rows):
            shape = (len(row), *row[0].shape) if len(row) > 1 else row[0].shape
            values = wave(shape, 0.3 + 0.07 * index)
            for each, value in zip(row, values if len(row) > 1 else [values], strict=True):
                each.copy_(value)
    vectors, found = wave((2, 5), 0.9), {}
    for name in ("q_proj", "v_proj"):
        for layer in range(2):
            A, B = injection.operators[f"model.layers.{layer}.self_attn.{name}"].made(vectors)
            found |= {f"{layer}/{name}/A": A, f"{layer}/{name}/B": B}
    projection: Any = model.model.layers[1].self_attn.q_proj
    x = wave((2, 3, 8), 0.4)
    with peftcore.call(model, task_vector=vectors):
        found["added"] = projection(x) - linear(x, projection.weight)
    total: Any = sum((each * wave(each.shape, 0.2)).sum() for each in found.values())
    total.backward()
    gradients = [torch.cat([each.grad.flatten() for each in row]) for row in rows]
    found |= {str(index): each[:: 1 + len(each) // 100] for index, each in enumerate(gradients)}
    numbers = frozen(NUMBERS)
    assert {*numbers} == {*found}
    for name, value in numbers.items():
        expected = torch.tensor(value, dtype=torch.float64)
        assert expected.any() and difference(found[name].flatten(), expected) < 1e-6, name


@against("authors", "text_to_lora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Also the biases of the heads, which are a LoRA's start: A, then B."""
    told, options = frozen(NUMBERS, "start"), {**SMALL, "rank": 600, "vector_width": 200, "latent": 200}
    injection = peftcore.apply(llama(300), "text_to_lora", **options)
    *rows, head_q, bias_q, head_v, bias_v = (
        torch.cat([*map(torch.flatten, row)]) for row in parameters(injection, 300)
    )
    found = {str(index): row for index, row in enumerate(rows)}
    for name, head, bias in (("q_proj", head_q, bias_q), ("v_proj", head_v, bias_v)):
        found |= {f"{name}/head": head, f"{name}/A": bias[: 600 * 8], f"{name}/B": bias[600 * 8 :]}
    assert len(told) > 20
    for name, value in told.items():
        same_start(found[name], value)


@against("authors", "text_to_lora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The whole network, and nothing of the model."""
    assert peftcore.apply(llama(), "text_to_lora", **SMALL).summary().trainable == frozen(NUMBERS, "trains")


@against("authors", "text_to_lora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(llama(), "text_to_lora").config, frozen(NUMBERS, "defaults"))


def filled(model: nn.Module, **options: Any) -> Any:
    """With noise, in which vectors make a difference."""
    injection = peftcore.apply(model, "text_to_lora", **{**SMALL, **options}, dtype="float64")
    fill(injection)
    with torch.no_grad():
        for each in injection.parameters():
            each.add_(0.5 * torch.randn_like(each))
    return injection


def test_rows_get_the_lora_of_their_vector() -> None:
    """One for each, one for each two that follow each other, one for all."""
    model = llama()
    filled(model)
    ids, vectors = torch.randint(16, (4, 5)), torch.randn(4, 5).double()
    alone = []
    for row, vector in zip(ids, vectors, strict=True):
        with peftcore.call(model, task_vector=vector[None]):
            alone.append(model(row[None]).logits)
            if len(alone) == 1:
                torch.testing.assert_close(model(ids).logits[0], alone[0][0])
    with peftcore.call(model, task_vector=vectors):
        torch.testing.assert_close(model(ids).logits, torch.cat(alone))
        with peftcore.call(model, copies=2):
            torch.testing.assert_close(model(ids.repeat_interleave(2, 0)).logits[::2], torch.cat(alone))
        with peftcore.call(model, guidance=True):
            torch.testing.assert_close(model(ids.repeat(2, 1)).logits[4:], torch.cat(alone))
    assert difference(alone[0], alone[1]) > 1e-3


def test_training_drops_inputs_and_numbers_of_the_network_and_adds_its_loss() -> None:
    """Means of squares of what is made, once for each kind, by hand; without dropout it is what evaluation computes."""
    model = llama().train()
    injection = filled(model, decay=0.3, dropout=0.0, network_dropout=0.0)
    vectors, ids = torch.randn(2, 5).double(), torch.randint(16, (2, 4))
    expected = 0.0
    for name in ("q_proj", "v_proj"):
        made = [injection.operators[f"model.layers.{layer}.self_attn.{name}"].made(vectors) for layer in range(2)]
        expected += sum(torch.stack(each).square().mean() for each in zip(*made, strict=True))
    with peftcore.call(model, task_vector=vectors):
        trained, loss = model(ids).logits, injection.losses()
        torch.testing.assert_close(loss, 0.3 * expected)
        assert loss.requires_grad
        torch.testing.assert_close(model.eval()(ids).logits, trained)
        assert not injection.losses()
    for which in ("dropout", "network_dropout"):
        model = llama().train()
        filled(model, **{"dropout": 0.0, "network_dropout": 0.0, which: 0.5})
        with peftcore.call(model, task_vector=vectors):
            assert difference(model(ids).logits, model(ids).logits) > 1e-3, which


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_a_lora_that_is_written_down(host: str, tmp_path: Path) -> None:
    """Also of parts of a fused matrix; it is saved without the network, and merges."""
    torch.manual_seed(0)
    model, inputs = HOSTS[host].build()
    injection = filled(model.double().train())
    vector = torch.randn(5)
    model.eval()
    with peftcore.call(model, task_vector=vector[None]), torch.no_grad():
        expected = model(**inputs).logits
    injection.shared["network"].train()
    lora = make_lora(injection, vector, "sums")
    assert injection.shared["network"].dropout.training and not injection.active and lora.active
    assert not any(each.requires_grad for each in lora.parameters())
    assert difference(model(**inputs).logits, expected) < 1e-6
    lora.save(tmp_path)
    torch.manual_seed(0)
    other = HOSTS[host].build()[0].double().eval()
    loaded = peftcore.load(other, tmp_path)
    loaded.merge()
    assert difference(other(**inputs).logits, expected) < 1e-6
    with pytest.raises(ConfigError, match="text_to_lora"):
        make_lora(lora, vector)
    with pytest.raises(ConfigError, match="vector_width"):
        make_lora(injection, vector[:3], "wrong")
    assert {*peftcore.injections(model)} == {"text_to_lora", "sums"}


def test_how_it_starts_and_what_it_has() -> None:
    """All vectors give the same LoRA, which does nothing; the number of values by the formula in the docstring."""
    model = llama()
    ids = torch.randint(16, (2, 5))
    before = model(ids).logits
    injection: Any = peftcore.apply(model, "text_to_lora", **SMALL)
    with peftcore.call(model, task_vector=torch.randn(2, 5)):
        assert torch.equal(model(ids).logits, before)
    A, B = injection.operators["model.layers.0.self_attn.q_proj"].made(torch.randn(2, 5))
    again, _ = injection.operators["model.layers.1.self_attn.q_proj"].made(torch.randn(2, 5))
    assert torch.equal(A[0], A[1]) and torch.equal(A, again) and not B.any()
    assert 0.1 < A.abs().max() < 8**-0.5
    network = 6 * 12 // 2 + 28 * 12**2 + 27 * 12 + (4 * 12 + 1) * 6
    assert injection.summary().trainable == network + 4 * 3 + 7 * 2 * (8 + 8 + 8 + 4)


def test_what_is_refused() -> None:
    model = llama()
    ids = torch.randint(16, (3, 5))
    with pytest.raises(ConfigError, match="overrides"):
        peftcore.apply(model, "text_to_lora", overrides={"*.0.*": {"rank": 1}})
    assert peftcore.plan(model, "text_to_lora", overrides={"*.0.*": {"alpha": 1.0}})
    with pytest.raises(UnsupportedSite, match="not a linear layer"):
        peftcore.apply(model, "text_to_lora", target="embed")
    assert not peftcore.injections(model)
    peftcore.apply(model, "text_to_lora", **SMALL)
    with pytest.raises(MissingContext, match="task_vector"):
        model(ids)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (torch.randn(5), ConfigError, r"\[1 or rows, 5\]"),
        (torch.randn(3, 4), ConfigError, r"\[1 or rows, 5\]"),
        ("sums", ConfigError, r"\[1 or rows, 5\]"),
        (torch.randn(2, 5), RouteError, "task_vector has 2 entries, but the batch has 3 rows"),
    ]
    for told, error, words in wrong:
        with pytest.raises(error, match=words), peftcore.call(model, task_vector=told):
            model(ids)
