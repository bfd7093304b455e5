"""Our own files say what was tied: between models that tie otherwise they are refused, and old ones that do not say
go on loading."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tied_hosts import HEAD, TARGETS, host, run, shift, tables
from torch import nn

import peftcore
from peftcore.errors import HostMismatch
from peftcore.files.safe_io import TensorFile

ADAPTERS: dict[str, Callable[[nn.Module, str], peftcore.Injection]] = {
    "trained along": lambda model, name: peftcore.apply(
        model, "lora", target=TARGETS[name], train=tables(name)["embedding"]
    ),
    "trained tokens": lambda model, name: peftcore.apply(model, "trainable_tokens", token_indices=[5, 6]),
    "all of it": lambda model, name: peftcore.apply(model, "fish_mask", target="embed", data=[batch()]),
}


def batch() -> dict[str, Any]:
    ids = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


CASES = [
    (name, tied, kind)
    for name in ("llama", "gpt2", "bart")
    for tied in (True, False)
    for kind in ADAPTERS
    if tied or name != "bart" or kind == "trained along"  # BART untied has a shared table that nothing calls
]


@pytest.mark.parametrize(("name", "tied", "kind"), CASES)
def test_another_tying_is_another_base(name: str, tied: bool, kind: str, tmp_path: Path) -> None:
    model = host(name, tied)
    injection = ADAPTERS[kind](model, name)
    shift([*injection.parameters()])
    injection.save(tmp_path)
    same, other = host(name, tied), host(name, not tied)
    before = run(other)
    peftcore.load(same, tmp_path)
    assert torch.equal(run(same), run(model))
    with pytest.raises(HostMismatch, match=r"was not tied to|was tied to"):
        peftcore.load(other, tmp_path)
    assert torch.equal(run(other), before) and "peft" not in dict(other.named_children())


def test_a_file_that_does_not_say(tmp_path: Path) -> None:
    """Files of before have no mark, and load as they did."""
    injection = ADAPTERS["trained along"](host("llama", True), "llama")
    injection.save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    said = json.loads(TensorFile(file).metadata["peftcore"])
    assert said.pop("ties") == {"model.embed_tokens": ["lm_head.weight"]}
    save_file(load_file(file), file, {"peftcore": json.dumps(said)})
    for tied in (True, False):
        assert peftcore.load(host("llama", tied), tmp_path).trained_along == ("model.embed_tokens.weight",)


def test_no_ties_say_so_too(tmp_path: Path) -> None:
    ADAPTERS["trained along"](host("llama", False), "llama").save(tmp_path)
    assert json.loads(TensorFile(tmp_path / "adapter.safetensors").metadata["peftcore"])["ties"] == {}


def test_an_update_beside_the_table_has_no_ties(tmp_path: Path) -> None:
    """A LoRA at a table acts there alone, whatever is tied to it."""
    model = host("llama", True)
    injection = peftcore.apply(model, "lora", target=[*tables("llama")["embedding"], HEAD], rank=2)
    assert injection.ties == {}
    injection.save(tmp_path)
    peftcore.load(host("llama", False), tmp_path)


def test_an_encoder_by_itself_fits_the_model_around_it(tmp_path: Path) -> None:
    """A table of an encoder without a head goes into a model whose head is tied to it, and back."""
    inner = host("gpt2", True).transformer
    injection = peftcore.apply(inner, "lora", target="c_attn", train=["wte"], rank=2, dtype="float64")
    shift([*injection.parameters()])
    injection.save(tmp_path / "inner")
    around = host("gpt2", True)
    outer = peftcore.load(around, tmp_path / "inner")
    assert outer.ties == {"transformer.wte": ("lm_head.weight",)}
    outer.save(tmp_path / "outer")
    again = host("gpt2", True).transformer
    peftcore.load(again, tmp_path / "outer")
    ids = batch()["input_ids"]
    assert torch.equal(again(ids).last_hidden_state, inner(ids).last_hidden_state)
