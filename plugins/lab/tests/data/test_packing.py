"""Examples that share a row do not see each other, and what cannot promise that is refused."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import peftcore
from peftcore.errors import BadInput
from peftcore_lab.data.packing import PackedCollator, Row, check_apart, packed

VOCABULARY = 40
SIZES = {
    "llama": (transformers.LlamaConfig, {"hidden_size": 16, "intermediate_size": 24}),
    "gpt2": (transformers.GPT2Config, {"n_embd": 16, "n_head": 2, "n_layer": 2}),
    "mistral": (transformers.MistralConfig, {"hidden_size": 16, "intermediate_size": 24, "sliding_window": 4}),
    "mamba": (transformers.MambaConfig, {"hidden_size": 16, "state_size": 4}),
}


def model(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    config, sizes = SIZES[kind]
    heads = {} if kind in ("gpt2", "mamba") else {"num_attention_heads": 2, "num_key_value_heads": 1}
    layers = {} if kind == "gpt2" else {"num_hidden_layers": 2}
    torch.manual_seed(0)
    made: Any = transformers.AutoModelForCausalLM.from_config(
        config(vocab_size=VOCABULARY, use_cache=False, bos_token_id=1, eos_token_id=2, **heads, **layers, **sizes)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.to(dtype).eval()


def examples(*lengths: int) -> list[Row]:
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCABULARY, (length,), generator=draw).tolist() for length in lengths]
    return [{"input_ids": each, "labels": [-100, *each[1:]]} for each in ids]


def test_rows_are_full() -> None:
    rows = packed(examples(5, 3, 7, 2, 1, 4), 8)
    assert [len(row["input_ids"]) for row in rows] == [8, 8, 6]
    assert rows[0]["position_ids"] == [*range(7), 0]
    for row in rows:
        assert all(label == -100 for label, place in zip(row["labels"], row["position_ids"], strict=True) if not place)


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_losses_and_gradients_are_those_of_each_by_itself(kind: str, method: str) -> None:
    """Prefixes are seen by each of the examples."""
    host, parts = model(kind), examples(5, 3, 7, 2, 4)
    injection = peftcore.apply(host, method, dtype="float64")
    check_apart(host, injection, VOCABULARY)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.normal_(0, 0.1)

    def summed(batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        labels = batch.pop("labels")
        logits = host(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
        return loss.detach(), list(torch.autograd.grad(loss, [*injection.parameters()]))

    loss, gradients = summed(PackedCollator(0)(packed(parts, 8)))
    alone = [summed({name: torch.tensor([values]) for name, values in part.items()}) for part in parts]
    torch.testing.assert_close(loss, sum(each for each, _ in alone))
    for number, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, sum(each[number] for _, each in alone))
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_keeps_them_apart_passes(dtype: torch.dtype) -> None:
    for kind in ("llama", "gpt2", "mistral"):
        host = model(kind, dtype)
        check_apart(host, None, VOCABULARY)
        injection = peftcore.apply(host, "lora", rank=2)
        before = injection.state_dict()
        check_apart(host, injection, VOCABULARY)
        for name, value in injection.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize("method", ["prompt_tuning", "loreft"])
def test_methods_that_take_a_row_for_one_text_are_refused(method: str) -> None:
    host = model("llama", torch.float32)
    injection = peftcore.apply(host, method)
    with pytest.raises(BadInput, match=r"data\.pack"):
        check_apart(host, injection, VOCABULARY)


def test_models_that_carry_a_state_along_are_refused() -> None:
    with pytest.raises(BadInput, match=r"data\.pack"):
        check_apart(model("mamba"), None, VOCABULARY)
