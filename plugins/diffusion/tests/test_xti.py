"""Extended textual inversion: the promises of the kit, words as those of `textual_inversion`, and the numbers of
Mix-of-Show's code, whose words and cross-attentions are the same (`numbers/ed_lora.json`)."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable, TargetError, UnsupportedSite
from peftcore.testing import conformance, frozen
from peftcore.testing.hosts import HOSTS

EXACT = 1e-12
NUMBERS = Path(__file__).parent / "numbers" / "ed_lora.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
LAYERS, RANDOM, CLASS = SCRIPT["LAYERS"], SCRIPT["RANDOM"], SCRIPT["CLASS"]
WORDS = {"tokens": list(range(3, 40))}  # a random batch need not have the last word
OPTIONS = {"dit": {"tokens": [1, 2]}, "task": {"tokens": list(range(128))}} | dict.fromkeys(
    ("llama", "bert", "t5", "gpt2", "moe", "mistral"), WORDS
)
FAILURES = {
    "a_host_without_memory_can_be_planned-t5": "moved to the meta device, the host has no ties any more: two tables"
}


@conformance("xti", options=OPTIONS, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def difference(one: Tensor, other: Tensor) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


class Both(nn.Module):
    """A text encoder and a UNet in one host."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.unet = SCRIPT["encoder"](), SCRIPT["unet"]()
        self.eval()

    def forward(self, ids: Tensor, latents: Tensor, times: Tensor) -> Tensor:
        states = self.encoder(ids)[0].unflatten(0, (-1, LAYERS))
        sample: Tensor = self.unet(latents, times, states).sample
        return sample


def applied(model: Both, together: bool, **options: Any) -> nn.Parameter:
    """The vectors of the words, after the method went to both models, or to one that holds both."""
    options |= {"tokens": RANDOM + CLASS, "dtype": "float64"}
    if together:
        words = peftcore.apply(model, "xti", **options)
    else:
        words = peftcore.apply(model.encoder, "xti", **options)
        assert not list(peftcore.apply(model.unet, "xti", target="cross.k").parameters())
    (vectors,) = words.parameters()
    return vectors


@pytest.mark.parametrize("together", [True, False])
def test_numbers_of_a_text_for_each_layer(together: bool) -> None:
    """Outputs, and gradients of words and latents; the middle of the UNet, its last module, reads the second text."""
    model, expected = Both(), frozen(NUMBERS)["words"]
    vectors = applied(model, together)
    with torch.no_grad():
        vectors.copy_(SCRIPT["vectors"]())
    latents, times = SCRIPT["picture"]()
    ours = model(SCRIPT["ids"](), latents.requires_grad_(), times)
    (ours * SCRIPT["direction"](ours)).sum().backward()
    for name, value in {"output": ours, "words": vectors.grad, "latents": latents.grad}.items():
        assert (
            value is not None and difference(value.flatten(), torch.tensor(expected[name], dtype=torch.float64)) < EXACT
        ), name
    assert vectors.grad is not None and all(vectors.grad.abs().amax(1) > 0)
    assert model.encoder.get_input_embeddings().weight.grad is None


def test_the_equation_one_text_at_a_time() -> None:
    """Of one cross-attention after the other, whose matrices are given the text of its layer by hooks."""
    model = Both()
    vectors = applied(model, together=True, initializer=5)
    table = model.encoder.get_input_embeddings().weight
    assert torch.equal(vectors, table[5].expand(8, -1))
    with torch.no_grad():
        vectors.normal_(std=0.1)
    latents, times = SCRIPT["picture"]()
    ours = model(SCRIPT["ids"](), latents, times)
    plain = Both()
    with torch.no_grad():
        plain.encoder.get_input_embeddings().weight[RANDOM + CLASS] = vectors
        texts = [plain.encoder(SCRIPT["ids"]()[layer::LAYERS])[0] for layer in range(LAYERS)]
    paths = ["down_blocks.0.attentions.0", "mid_block.attentions.0", *(f"up_blocks.1.attentions.{n}" for n in (0, 1))]
    for path, text in zip(paths, texts, strict=True):
        attention = plain.unet.get_submodule(f"{path}.transformer_blocks.0.attn2")
        for part in (attention.to_k, attention.to_v):
            part.register_forward_pre_hook(lambda module, given, text=text: (text,))
    expected = plain.unet(latents, times, texts[0]).sample
    assert difference(ours, expected) < EXACT
    assert difference(model.unet(latents, times, texts[0]).sample, expected) > 1e-6


def test_what_reads_layers_is_saved_and_takes_one_text_for_all_too(tmp_path: Path) -> None:
    model, inputs = HOSTS["unet"].build()
    model.eval()
    base = model(**inputs).sample
    reader = peftcore.apply(model, "xti", target="cross.k")
    assert torch.equal(model(**inputs).sample, base)
    with pytest.raises(NotMergeable):
        reader.merge()
    inputs["encoder_hidden_states"] = torch.randn(2, 4, 5, 14)
    expected = model(**inputs).sample
    reader.save(tmp_path / "reader")
    reader.remove()
    with pytest.raises(ValueError, match="unpack"):
        model(**inputs)
    peftcore.load(model, tmp_path / "reader")
    assert torch.equal(model(**inputs).sample, expected)
    inputs["encoder_hidden_states"] = torch.randn(2, 3, 5, 14)
    with pytest.raises(ConfigError, match=r"3 layers, but the UNet has 4"):
        model(**inputs)


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match="one token id for each cross-attention, of which the UNet has 4"):
        peftcore.apply(Both(), "xti", tokens=[20, 21, 22, 23, 24])
    for host, target in (("unet", "attn.k"), ("t5", "cross.k")):
        with pytest.raises(UnsupportedSite, match=r"nor a cross\.k of a UNet"):
            peftcore.apply(HOSTS[host].build()[0], "xti", target=target)
    with pytest.raises(TargetError):
        peftcore.apply(HOSTS["unet"].build()[0], "xti")
    with pytest.raises(UnsupportedSite, match="resize the table first"):
        peftcore.apply(Both().encoder, "xti", tokens=[28])


def test_it_merges_into_a_text_encoder() -> None:
    model = Both().encoder
    injection = peftcore.apply(model, "xti", tokens=RANDOM, dtype="float64")
    nn.init.normal_(next(iter(injection.parameters())))
    expected = model(SCRIPT["ids"]())[0]
    injection.merge()
    assert difference(model(SCRIPT["ids"]())[0], expected) < EXACT
