"""ED-LoRA: the promises of the kit, the numbers of the authors' code (`numbers/ed_lora.json`), with which rate words
train, and what a merged UNet takes."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, TargetError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore_multitask import gather
from peftcore_multitask.regmean import grams, take_grams

EXACT = 1e-12
NUMBERS = Path(__file__).parent / "numbers" / "ed_lora.json"
SCRIPT = run_path(str(NUMBERS.with_suffix(".py")))
RANK, LAYERS = SCRIPT["RANK"], SCRIPT["LAYERS"]
WORDS = {"random_tokens": SCRIPT["RANDOM"], "class_tokens": SCRIPT["CLASS"]}
EVERYWHERE = ["attn.q", "attn.k", "attn.v", "attn.out", "cross.q", "cross.k", "cross.v", "cross.out"]
CODE: Any = {"repository": "TencentARC/Mix-of-Show", "commit": "51270fd", "script": "mixofshow/models/edlora.py"}
OPTIONS = {"rank": RANK, "alpha": SCRIPT["ALPHA"], "dtype": "float64"}


@conformance("ed_lora")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def difference(one: Tensor, other: Any) -> float:
    other = torch.as_tensor(other, dtype=torch.float64).view(one.shape)
    return ((one - other).abs().max() / other.abs().max()).item()


class Both(nn.Module):
    """A text encoder and a UNet in one host."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.unet = SCRIPT["encoder"](), SCRIPT["unet"]()
        self.eval()

    def forward(self, latents: Tensor, times: Tensor) -> Tensor:
        states = self.text(SCRIPT["ids"]())[0].unflatten(0, (-1, LAYERS))
        sample: Tensor = self.unet(latents, times, states).sample
        return sample


def operators(model: Both, together: bool) -> dict[str, Any]:
    """Those of the method on both models, or on one that holds both, by path there."""
    if together:
        return dict(peftcore.apply(model, "ed_lora", target=EVERYWHERE, **WORDS, **OPTIONS).operators)
    text = peftcore.apply(model.text, "ed_lora", **WORDS, **OPTIONS)
    unet = peftcore.apply(model.unet, "ed_lora", **OPTIONS)
    parts = (("text", text), ("unet", unet))
    return {f"{part}.{path}": each for part, own in parts for path, each in own.operators.items()}


@pytest.mark.parametrize("together", [True, False])
@against("authors", "ed_lora", **CODE)
def test_numbers_of_the_authors(together: bool) -> None:
    """Outputs, and gradients of words, factors and latents, in training mode too."""
    model, expected = Both(), frozen(NUMBERS)["whole"]
    own = operators(model, together)
    matrices = {path: each for path, each in sorted(own.items()) if path in expected["A"]}
    assert len(matrices) == len(expected["A"]) == 2 * 4 + 4 * 8
    for number, each in enumerate(matrices.values()):
        SCRIPT["factors"](number, each.A, each.B)
    (words,) = (each for path, each in own.items() if path.endswith("token_embedding"))
    with torch.no_grad():
        words.vectors.copy_(SCRIPT["vectors"]())
    latents, times = SCRIPT["picture"]()
    for mode in (False, True):
        ours = model.train(mode)(latents.requires_grad_(), times)
        assert difference(ours, expected["output"]) < EXACT
    (ours * SCRIPT["direction"](ours)).sum().backward()
    assert difference(words.vectors.grad, expected["words"]) < EXACT
    assert difference(latents.grad, expected["latents"]) < EXACT
    for path, each in matrices.items():
        for name in ("A", "B"):
            assert difference(each.get_parameter(name).grad, expected[name][path]) < 1e-10, path


def test_a_merged_unet_takes_one_text_for_all_and_reads_layers_with_xti() -> None:
    model = Both()
    injection = peftcore.apply(model.unet, "ed_lora", **OPTIONS)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    latents, times = SCRIPT["picture"]()
    states = model.text(SCRIPT["ids"]())[0].unflatten(0, (-1, LAYERS))
    expected, one = (model.unet(latents, times, each).sample for each in (states, states[:, 0]))
    injection.bake()
    assert difference(model.unet(latents, times, states[:, 0]).sample, one) < EXACT
    peftcore.apply(model.unet, "xti", target="cross.k")
    assert difference(model.unet(latents, times, states).sample, expected) < EXACT


def filled(host: nn.Module, seed: int, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(host, "ed_lora", name=f"a{seed}", **{**OPTIONS, **options})
    torch.manual_seed(seed)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, std=0.1)
    return injection


def test_several_are_fused_by_their_inputs() -> None:
    """Those of a UNet by regression, where each reads a text for each layer, which the fused one leaves to `xti`."""
    model, every = Both().unet, []
    latents, times = SCRIPT["picture"]()
    parts = [filled(model, seed) for seed in range(2)]
    for seed, part in enumerate(parts):
        batch = {"sample": latents + seed, "timestep": times}
        every.append(grams(part, [{**batch, "encoder_hidden_states": torch.randn(2, 4, 5, 12).double()}]))
    before = [peftcore.deltas(part) for part in parts]
    merged = gather(model, "mix_of_show", {"a0": 1.0, "a1": 1.0})
    take_grams(merged, every)
    fused = peftcore.deltas(merged)
    assert len(fused) == 4 * 8 and "xti" not in fused
    for path, change in fused.items():
        G = [matrices[path] for matrices in every]
        wanted = sum(delta[path] @ g for delta, g in zip(before, G, strict=True))
        assert torch.allclose(change @ sum(G), wanted, atol=1e-3 * float(wanted.abs().max()))
    peftcore.apply(model, "xti", target="cross.k", name="layers")
    peftcore.activate(model, peftcore.Stack(merged.name, "layers"))
    assert model(latents, times, torch.randn(2, 4, 5, 12).double()).sample.isfinite().all()


def test_fused_text_encoders_know_all_words() -> None:
    model = Both().text
    tokens = (SCRIPT["RANDOM"], SCRIPT["CLASS"])
    parts = [filled(model, seed, class_tokens=own) for seed, own in enumerate(tokens)]
    vectors: list[Any] = [each.operators["embeddings.token_embedding"] for each in parts]
    expected = [each.vectors.detach().clone() for each in vectors]
    merged = gather(model, "mix_of_show", {"a0": 1.0, "a1": 1.0})
    merged.merge()
    table = model.get_input_embeddings().weight
    assert all(torch.allclose(table[own], value) for own, value in zip(tokens, expected, strict=True))


IDS = list(range(SCRIPT["NEW"], SCRIPT["VOCABULARY"]))
NEW: Any = {"random_tokens": IDS[:16], "class_tokens": IDS[16:]}


class Texts(nn.Module):
    """A text encoder, and a table of another that is wide enough to compare a draw."""

    def __init__(self) -> None:
        super().__init__()
        self.text = SCRIPT["encoder"](SCRIPT["VOCABULARY"])
        self.wide = SCRIPT["encoder"](SCRIPT["VOCABULARY"], SCRIPT["WIDE"], layers=0)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(ids)[0], self.wide(ids)[0]


@against("authors", "ed_lora", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """V_rand is one vector for all layers, V_class that of a word; B is zero, A as torch's linear layers start."""
    told = frozen(NUMBERS, "start")
    words: Any = peftcore.apply(Texts(), "ed_lora", initializer=SCRIPT["MAN"], **NEW).operators
    same_start(words["wide.embeddings.token_embedding"].vectors[0], told["random"])
    vectors = words["text.embeddings.token_embedding"].vectors
    assert len(vectors[:16].unique(dim=0)) == told["random rows"]
    same_start(vectors[16:], told["class"])
    factors: Any = peftcore.apply(nn.Sequential(nn.Linear(200, 3)), "ed_lora", target="0", rank=200).operators["0"]
    same_start(factors.A, told["A"])
    same_start(factors.B, told["B"])


@against("authors", "ed_lora", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Factors of both models, and of the table that theirs trains the rows of words, for the others are put back."""
    told, trained = frozen(NUMBERS, "trains"), {}
    hosts = {"text": SCRIPT["encoder"](SCRIPT["VOCABULARY"]), "unet": SCRIPT["unet"]()}
    for part, options in (("text", NEW), ("unet", {})):
        own = peftcore.apply(hosts[part], "ed_lora", **options).operators
        trained |= {f"{part}.{path}": [each.numel() for each in one.parameters()] for path, one in own.items()}
    assert told["besides factors"] == ["text_encoder.embeddings.token_embedding.weight"]
    assert told["words"] == IDS and trained.pop("text.embeddings.token_embedding") == [len(IDS) * 12]
    assert {path: sizes for path, sizes in trained.items() if sizes} == told["factors"]


@against("authors", "ed_lora", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(SCRIPT["unet"](), "ed_lora").config, frozen(NUMBERS, "defaults"))


def test_words_have_a_rate_of_their_own() -> None:
    injection = peftcore.apply(Both(), "ed_lora", **WORDS, word_lr=0.5)
    groups = injection.optimizer(torch.optim.AdamW, lr=0.25).param_groups
    assert sorted((group["lr"], len(group["params"])) for group in groups) == [(0.25, 2 * 32), (0.5, 1)]


def test_what_is_refused() -> None:
    for options, error, words in (
        ({"random_tokens": [20, 21, 22]}, ConfigError, "of which the UNet has 4"),
        ({"class_tokens": [20, 21, 22, 28]}, UnsupportedSite, "resize the table first"),
        ({"target": "embed"}, UnsupportedSite, "random_tokens= and class_tokens="),
    ):
        with pytest.raises(error, match=words):
            peftcore.apply(Both(), "ed_lora", **options)
    with pytest.raises(TargetError):
        peftcore.apply(Both().unet, "ed_lora", **WORDS)
