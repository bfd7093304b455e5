"""CoOp: the authors' class, the equation through CLIP's and SigLIP's text towers, contexts of classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vpt_equations import TEXT, host, pixels, transformers

import peftcore
from peftcore.errors import ConfigError, MissingContext, SequenceError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS as KIT
from peftcore.testing.kit import fill

NUMBERS = Path(__file__).parent / "numbers" / "coop.json"
CODE: Any = {"repository": "KaiyangZhou/CoOp", "commit": "ff61507", "script": "trainers/coop.py"}
X = 3
IDS = torch.tensor([[1, X, X, X, 5, 39, 0, 0], [1, X, X, X, 6, 7, 8, 39], [1, X, X, X, 9, 4, 39, 0]])
"""Three classes in the towers below, each behind three places."""
TABLE = "text_model.embeddings.token_embedding"


@conformance(
    "coop",
    hosts=["bert", "t5"],  # the kit's other hosts of texts generate
    options={"*": {"length": 2}, "task": {"length": 4, "classes": 10}},  # a shared context moves all ten names alike
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def tower(name: str) -> Any:
    if name == "clip":
        return host("clip")
    torch.manual_seed(0)
    model = transformers.SiglipTextModel(transformers.SiglipTextConfig(**TEXT, max_position_embeddings=8))
    return model.double().eval().requires_grad_(False)


def features(name: str, model: Any, ids: Tensor) -> Tensor:
    """The features of texts."""
    output: Tensor = (model.get_text_features(ids) if name == "clip" else model(ids)).pooler_output
    return output


def by_hand(name: str, model: Any, embedded: Tensor) -> Tensor:
    """The features of texts that are embedded already."""
    text, length = model.text_model if name == "clip" else model, embedded.shape[1]
    causal = torch.full((1, 1, length, length), -1e300, dtype=torch.float64).triu(1) if name == "clip" else None
    hidden = text.embeddings(inputs_embeds=embedded)
    hidden = text.final_layer_norm(text.encoder(inputs_embeds=hidden, attention_mask=causal).last_hidden_state)
    if name == "siglip":
        return text.head(hidden[:, -1])
    return model.text_projection(hidden[torch.arange(3), IDS.argmax(-1)])


def table(model: nn.Module) -> Any:
    (found,) = (
        m for path, m in model.named_modules() if path.endswith("token_embedding") and isinstance(m, nn.Embedding)
    )
    return found


@pytest.mark.parametrize("order", ["end", "middle", "front"])
@pytest.mark.parametrize("placeholder", [X, None])
@against("authors", "coop", **CODE)
def test_the_authors_class_puts_the_same_together(order: str, placeholder: int | None) -> None:
    config = transformers.CLIPTextConfig(**{**TEXT, "hidden_size": 2, "num_attention_heads": 1})
    model = transformers.CLIPTextModel(config)
    options = {"length": 4, "classes": 2, "placeholder": placeholder}
    (operator,) = peftcore.apply(model, "coop", **options).operators.values()
    vectors = {f"{'vw'[k]}{i}": v for k, context in enumerate(operator.context) for i, v in enumerate(context)}
    words = [row.split() for row in frozen(NUMBERS)[order]]
    ids = torch.tensor([[X if word in vectors else int(word) for word in row] for row in words])
    weight = table(model).weight
    expected = [[vectors[word] if word in vectors else weight[int(word)] for word in row] for row in words]
    same = torch.equal(table(model)(ids), torch.stack([torch.stack(row) for row in expected]))
    assert same == (placeholder == X or order == "end")


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize("classes", [None, 3])
def test_the_equation(name: str, classes: int | None) -> None:
    model, base = tower(name), tower(name)
    injection = peftcore.apply(model, "coop", length=3, classes=classes, dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    copy = operator.context.detach().clone().requires_grad_()
    embedded = table(base)(IDS)
    expected = by_hand(name, base, torch.cat([embedded[:, :1], copy.expand(3, -1, -1), embedded[:, 4:]], 1))
    ours = features(name, model, IDS)
    assert (expected - features(name, base, IDS)).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    assert copy.grad is not None and copy.grad.abs().max() > 1e-4
    torch.testing.assert_close(operator.context.grad, copy.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("alone", [False, True])
def test_padding_on_the_left_is_no_place(alone: bool) -> None:
    """In the whole model, and where `generate` runs the encoder by itself."""
    model, inputs = KIT["t5"].build()
    fill(peftcore.apply(model.double().eval(), "coop", length=3, dtype="float64"))
    ids, answers = inputs["input_ids"][:1], inputs["decoder_input_ids"][:1]
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    if alone:
        ours, expected = model.encoder(padded, mask)[0][:, 4:], model.encoder(ids)[0]
    else:
        ours = model(input_ids=padded, attention_mask=mask, decoder_input_ids=answers).logits
        expected = model(input_ids=ids, decoder_input_ids=answers).logits
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_images_are_compared_with_all_classes() -> None:
    model, base = tower("clip"), tower("clip")
    fill(peftcore.apply(model, "coop", length=3, dtype="float64"))
    logits = model(input_ids=IDS, pixel_values=pixels()).logits_per_image
    text, image = features("clip", model, IDS), base.get_image_features(pixels()).pooler_output
    cosine = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(logits, base.logit_scale.exp() * cosine, rtol=1e-10, atol=1e-10)


def test_a_row_has_the_context_of_its_class() -> None:
    model = tower("clip")
    fill(peftcore.apply(model, "coop", length=3, classes=3, dtype="float64"))
    whole = features("clip", model, IDS)
    with pytest.raises(MissingContext, match="2 texts, but the prompts are for 3 classes"):
        features("clip", model, IDS[:2])
    with peftcore.call(model, classes=[2, 0]):
        torch.testing.assert_close(features("clip", model, IDS[[2, 0]]), whole[[2, 0]], rtol=1e-10, atol=1e-10)


@against("authors", "coop", **CODE, part="start")
def test_start() -> None:
    model, told = tower("clip"), frozen(NUMBERS, "start")
    shared = peftcore.apply(model, "coop", length=1280).operators[TABLE].context
    own = peftcore.apply(model, "coop", name="own", classes=80).operators[TABLE].context
    assert shared.shape == (1, 1280, 32) and own.shape == (80, 16, 32)
    same_start(shared, told["shared"])
    same_start(own, told["own"])


@against("authors", "coop", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Their one tensor of words."""
    told = frozen(NUMBERS, "trains")
    for name, classes in (("shared", None), ("own", 5)):
        found = list(peftcore.apply(tower("clip"), "coop", classes=classes).parameters())
        assert {"prompt_learner.ctx": sum(each.numel() for each in found if each.requires_grad)} == told[name]


@against("authors", "coop", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(tower("clip"), "coop").config, frozen(NUMBERS, "defaults"))


def test_it_starts_from_words() -> None:
    model = tower("clip")
    options = {"init_ids": [7, 3, 9], "classes": 2, "dtype": "float64"}
    context = peftcore.apply(model, "coop", name="words", **options).operators[TABLE].context
    assert torch.equal(context, table(model).weight[[7, 3, 9]].expand(2, -1, -1))
    with pytest.raises(ConfigError, match="vocabulary of 40"):
        peftcore.apply(model, "coop", name="wrong", init_ids=[40])


def test_where_it_cannot_be() -> None:
    model = tower("clip")
    peftcore.apply(model, "coop", length=3, placeholder=X)
    with pytest.raises(SequenceError, match="3 positions"):
        features("clip", model, torch.tensor([[1, X, X, 5, 39]]))
    peftcore.apply(model, "coop", name="longer", length=5)
    peftcore.activate(model, "longer")
    with pytest.raises(SequenceError, match="5 positions"):
        features("clip", model, torch.tensor([[1, X, X, 5, 39]]))
    with pytest.raises(UnsupportedSite, match="not the token table of a text tower"):
        peftcore.apply(host("vit"), "coop", target="classifier")
    with pytest.raises(UnsupportedSite, match="generating model"):
        peftcore.apply(KIT["llama"].build()[0], "coop")
