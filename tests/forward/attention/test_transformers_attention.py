"""Edits in attentions of transformers: configs, implementations that are set later, an interface that is passed by."""

from pathlib import Path
from typing import Any

import pytest
import torch
from attention_hosts import METHODS, host, inputs
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama import modeling_llama

import peftcore
from peftcore.errors import InactiveSite, UnsupportedSite

NAMES = ["llama", "gpt2", "bert", "t5"]


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    output: Tensor = model(**given).logits
    return output


def test_saved_configs_know_nothing_of_it(tmp_path: Path) -> None:
    model = host("llama", "sdpa")
    before = model.config.to_json_string()
    peftcore.apply(model, METHODS["in_front"])
    logits(model, inputs("llama"))
    assert model.config.to_json_string() == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_a_later_implementation_counts(name: str) -> None:
    model, given = host(name, "eager"), inputs(name)
    injection = peftcore.apply(model, METHODS["in_front"])
    eager = model(**given, output_attentions=True)
    model.set_attn_implementation("sdpa")
    sdpa = model(**given)
    seen = given["attention_mask"].bool() if eager.logits.shape[1] == given["attention_mask"].shape[1] else ...
    torch.testing.assert_close(sdpa.logits[seen], eager.logits[seen], rtol=1e-4, atol=1e-4)
    with injection.disabled():
        assert not torch.allclose(model(**given).logits[seen], sdpa.logits[seen], atol=1e-2)


def test_a_later_implementation_that_cannot_be_edited_is_an_error() -> None:
    model, given = host("llama", "sdpa"), inputs("llama")
    injection = peftcore.apply(model, METHODS["in_front"])
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedSite, match="flex_attention"):
        model.model.layers[0].self_attn(torch.randn(1, 2, 16), position_embeddings=(torch.ones(1), torch.ones(1)))
    model.config._attn_implementation = "sdpa"
    assert logits(model, given).isfinite().all()
    injection.remove()


class Detour:
    """An interface that always answers with the same function, whatever it is asked for."""

    @staticmethod
    def get_interface(name: str, default: Any) -> Any:
        return sdpa_attention_forward


def test_an_attention_that_goes_around_its_interface_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module runs, its edits are never asked: an error at the first forward, not a silence."""
    model, given = host("llama", "sdpa"), inputs("llama")
    peftcore.apply(model, METHODS["in_front"])
    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Detour)
    with pytest.raises(InactiveSite, match="self_attn"):
        logits(model, given)
