"""P-tuning: the authors' network; the other implementation with the same tensors, for both networks; counts; how the
prompt is made."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.testing import against, check_method, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

peft = pytest.importorskip("peft")
LENGTH, HIDDEN = 4, 6


@conformance("p_tuning", options={"gpt2": {"length": 4}})  # a table of 32 positions: 20 rows do not fit often
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def name_in_the_other(key: str) -> str:
    """Its name for one of our tensors: the embedding, the LSTM, the perceptron."""
    if key == "start":
        return "embedding.weight"
    return key.replace("head.", "mlp_head.").replace("lstm.", "lstm_head.")


@pytest.mark.parametrize(
    ("name", "encoder"), [("llama", "mlp"), ("llama", "lstm"), ("gpt2", "mlp"), ("gpt2", "lstm"), ("t5", "mlp")]
)
@against("peft 0.21", "p_tuning")
def test_the_other_implementation_with_the_same_tensors(name: str, encoder: str) -> None:
    """(On encoder-decoders its LSTM runs over rows for both halves at once and uses the encoder's: another prompt.)"""
    model, inputs = host(name)
    base = deepcopy(model)
    injection = peftcore.apply(model, "p_tuning", length=LENGTH, hidden=HIDDEN, encoder=encoder, dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    config = peft.PromptEncoderConfig(
        task_type="SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        encoder_hidden_size=HIDDEN,
        encoder_reparameterization_type=encoder.upper(),
    )
    other = peft.get_peft_model(base, config).double().eval()
    theirs = dict(other.prompt_encoder["default"].named_parameters())
    for key, value in operator.named_parameters():
        with torch.no_grad():
            theirs[name_in_the_other(key)][: len(value)] = value  # the embedding of an encoder-decoder has more rows
    ours, expected = model(**inputs).logits, other(**inputs).logits
    expected = expected if name == "t5" else expected[:, LENGTH:]
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for key, value in operator.named_parameters():
        gradient = theirs[name_in_the_other(key)].grad[: len(value)]
        assert gradient.abs().max() > 0
        torch.testing.assert_close(value.grad, gradient, rtol=1e-8, atol=1e-8)


def equation(tensors: dict[str, Tensor], encoder: str) -> Tensor:
    """The prompt, written a second time: the perceptron, or the recurrences of the LSTM gate by gate."""
    rows = tensors["start"]
    for layer in (0, 1) if encoder == "lstm" else ():
        directions = []
        for suffix in ("", "_reverse"):
            weights = [tensors[f"lstm.{kind}_l{layer}{suffix}"] for kind in ("weight_ih", "weight_hh")]
            biases = [tensors[f"lstm.{kind}_l{layer}{suffix}"] for kind in ("bias_ih", "bias_hh")]
            hidden = cell = torch.zeros(HIDDEN, dtype=torch.float64)
            outputs = []
            for row in rows.flip(0) if suffix else rows:
                gates = weights[0] @ row + biases[0] + weights[1] @ hidden + biases[1]
                enter, keep, new, leave = gates.view(4, -1)
                cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
                hidden = leave.sigmoid() * cell.tanh()
                outputs.append(hidden)
            directions.append(torch.stack(outputs[::-1] if suffix else outputs))
        rows = torch.cat(directions, dim=-1)
    last = 2 if encoder == "lstm" else 4
    for index in range(0, last + 1, 2):
        rows = rows @ tensors[f"head.{index}.weight"].T + tensors[f"head.{index}.bias"]
        rows = rows if index == last else rows.clamp(min=0)
    return rows


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_equation(encoder: str) -> None:
    model, inputs = host("llama")
    base = deepcopy(model)
    injection = peftcore.apply(model, "p_tuning", length=LENGTH, hidden=HIDDEN, encoder=encoder, dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    tensors = {key: value.detach().clone() for key, value in operator.named_parameters()}
    rows = equation(tensors, encoder)
    embeds = torch.cat([rows.expand(2, -1, -1), base.model.embed_tokens(inputs["input_ids"])], dim=1)
    mask = torch.cat([torch.ones(2, LENGTH, dtype=torch.long), inputs["attention_mask"]], dim=1)
    expected = base(inputs_embeds=embeds, attention_mask=mask).logits[:, LENGTH:]
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-10, atol=1e-10)


SIZES = [(encoder, hidden) for encoder in ("mlp", "lstm", "residual") for hidden in (None, 6)]


@pytest.mark.parametrize(("encoder", "hidden"), SIZES)
def test_counts(encoder: str, hidden: int | None) -> None:
    """By the layers' own sizes: d = 16."""
    model, _ = host("llama")
    injection = peftcore.apply(model, "p_tuning", length=5, encoder=encoder, hidden=hidden)
    h = hidden or 16
    layers = [nn.Linear(16, h), nn.Linear(h, h), nn.Linear(h, 16)]
    if encoder == "lstm":
        layers = [nn.LSTM(16, h, 2, bidirectional=True), nn.Linear(2 * h, 2 * h), nn.Linear(2 * h, 16)]
    if encoder == "residual":
        layers = [nn.Linear(16, h), nn.Linear(h, 16), nn.LayerNorm(16)]
    expected = 5 * 16 + sum(p.numel() for layer in layers for p in layer.parameters())
    assert sum(p.numel() for p in injection.parameters()) == expected


def test_dropout_between_the_layers_acts_in_training_only() -> None:
    model, inputs = host("llama")
    peftcore.apply(model, "p_tuning", length=LENGTH, encoder="lstm", lstm_dropout=0.5, dtype="float64")
    assert torch.equal(model(**inputs).logits, model(**inputs).logits)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(**inputs).logits, model(**inputs).logits)


def test_it_trains_under_autocast_at_its_own_precision() -> None:
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    injection = peftcore.apply(model, "p_tuning", length=LENGTH, encoder="lstm")
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs).logits
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in injection.parameters())


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


NUMBERS = Path(__file__).parent / "numbers" / "residual_prompt_tuning.json"


@against("others", "p_tuning", repository="arazd/ResidualPrompts", commit="53087ca", script="prompt_tuner2.py")
def test_the_residual_network_of_its_authors() -> None:
    """The rows, and the gradients of the prompt and of each tensor; the encoder gets these rows in front."""
    model, inputs = host("t5")
    base, numbers = deepcopy(model), frozen(NUMBERS)
    options = {"length": LENGTH, "hidden": HIDDEN, "dtype": "float64"}
    injection = peftcore.apply(model, "residual_prompt_tuning", **options)
    (operator,) = injection.operators.values()
    tensors = {"start": operator.start, **{str(index): each for index, each in enumerate(operator.head.parameters())}}
    with torch.no_grad():
        operator.start.copy_(wave((LENGTH, 16), 0.41))
        for index, each in enumerate(operator.head.parameters()):
            each.copy_(wave(tuple(each.shape), 0.37 + 0.11 * index))
    rows = operator.rows(operator.start)
    expected = torch.tensor(numbers["rows"], dtype=torch.float64).view(LENGTH, 16)
    torch.testing.assert_close(rows, expected, rtol=1e-10, atol=1e-10)
    (rows * wave((LENGTH, 16), 0.23)).sum().backward()
    assert numbers.keys() == {"rows", *tensors}
    for name, tensor in tensors.items():
        assert tensor.grad.flatten().tolist() == pytest.approx(numbers[name], abs=1e-9), name
    ids, mask = inputs["input_ids"], inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    embeds = torch.cat([expected.expand(len(ids), -1, -1), base.shared(ids)], dim=1)
    longer = torch.cat([mask.new_ones(len(ids), LENGTH), mask], dim=1)
    theirs = base(inputs_embeds=embeds, attention_mask=longer, decoder_input_ids=inputs["decoder_input_ids"]).logits
    torch.testing.assert_close(model(**inputs).logits, theirs, rtol=1e-10, atol=1e-10)


AUTHORS = Path(__file__).parent / "numbers" / "p_tuning.json"
CODE: Any = {"repository": "THUDM/P-tuning", "commit": "f4225d4", "script": "LAMA/p_tuning/prompt_encoder.py"}


@against("authors", "p_tuning", **CODE)
def test_the_network_of_the_authors() -> None:
    """Rows and all gradients; the network is as wide as the embeddings, half in each direction."""
    numbers, script = frozen(AUTHORS), run_path(str(AUTHORS.with_suffix(".py")))
    model, _ = host("llama")
    options = {"length": sum(script["TEMPLATE"]), "encoder": "lstm", "hidden": script["WIDTH"] // 2}
    injection = peftcore.apply(model, "p_tuning", **options, dtype="float64")
    (operator,) = injection.operators.values()
    own: dict[str, Any] = dict(operator.named_parameters())
    assert list(own) == list(numbers["gradients"])
    with torch.no_grad():
        for index, each in enumerate(own.values()):
            each.copy_(script["wave"](each.shape, 0.31 + 0.11 * index) / 2)
    rows = operator.rows(operator.start)
    (rows * script["wave"](rows.shape, 0.23)).sum().backward()
    assert rows.flatten().tolist() == pytest.approx(numbers["rows"], abs=1e-10)
    for name, each in own.items():
        assert each.grad.flatten().tolist() == pytest.approx(numbers["gradients"][name], abs=1e-10), name


@against("authors", "p_tuning", **CODE, part="start")
def test_start_is_the_authors() -> None:
    config = transformers.LlamaConfig(
        hidden_size=512, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    injection = peftcore.apply(transformers.LlamaModel(config), "p_tuning", length=80, encoder="lstm", hidden=256)
    (operator,) = injection.operators.values()
    for part, told in frozen(AUTHORS, "start").items():
        own = [each.flatten() for name, each in operator.named_parameters() if name.split(".")[0] == part]
        same_start(torch.cat(own), told)


@against("authors", "p_tuning", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    script, model = run_path(str(AUTHORS.with_suffix(".py"))), host("llama")[0]
    options = {"length": sum(script["TEMPLATE"]), "encoder": "lstm", "hidden": script["WIDTH"] // 2}
    (operator,) = peftcore.apply(model, "p_tuning", **options).operators.values()
    assert {name: each.numel() for name, each in operator.named_parameters()} == frozen(AUTHORS, "trains")


@against("authors", "p_tuning", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    why = {
        "length": "theirs are nine rows in three places of a cloze; ours stand in front, as many as in prompt_tuning",
        "encoder": "the perceptron is what peft takes, and has no steps one after the other",
        "hidden": "None stands for the width of the embeddings, which their LSTM has in both directions together",
    }
    config = peftcore.apply(host("llama")[0], "p_tuning").config
    same_defaults(config, frozen(AUTHORS, "defaults"), otherwise=why)


def test_the_residual_network_starts_from_words() -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "residual_prompt_tuning", length=30, dtype="float64")
    (operator,) = injection.operators.values()
    where = (operator.start[:, None] == model.model.embed_tokens.weight[None]).all(-1)
    assert where.any(1).all() and len(where.nonzero()[:, 1].unique()) > 10
    assert operator.head[0].weight.shape == (800, 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_kit_holds_for_the_residual_network(name: str) -> None:
    options = {"length": LENGTH, "encoder": "residual", "hidden": HIDDEN}
    results = check_method("p_tuning", hosts=[name], options={name: options})
    failed = [str(result) for result in results if result.status == "failed"]
    assert results and not failed, failed
