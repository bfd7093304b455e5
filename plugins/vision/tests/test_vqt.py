"""VQT: the authors' class and start, the equation on hosts of three libraries, and tokens that stay what they are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vpt_equations import ATTENTIONS, HOSTS, edit_attention, host, of_waves, pixels, prompted, wave

import peftcore
from peftcore.errors import ConfigError, SequenceError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore_vision.vqt import QueryOperator

CODE: Any = {"repository": "andytu28/VQT", "commit": "9bca87e", "script": "src/models/vit_backbones/h2t_vit.py"}
NUMBERS = Path(__file__).parent / "numbers" / "vqt.json"
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@conformance("vqt", hosts=["vit"])  # the kit's other hosts have no image in patches, or no head
def test_conformance(check: Callable[[], None]) -> None:
    check()


def asking(injection: peftcore.Injection) -> list[QueryOperator]:
    return [each for each in injection.operators.values() if isinstance(each, QueryOperator)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("summary", ["concat", "mean", "weighted"])
@against("authors", "vqt", **CODE)
def test_the_authors_class_with_the_same_numbers(summary: str, normalize: bool) -> None:
    expected = {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in frozen(NUMBERS)[f"{summary} {normalize}"].items()
    }
    model, injection = of_waves("vqt", length=2, summary=summary, normalize=normalize)
    operators = asking(injection)
    matrix = wave((3, 3 * operators[0].reads[0].shape[1]), "queries")
    for number, (operator, part) in enumerate(zip(operators, matrix.chunk(3, 1), strict=True)):
        operator.reads[0].data.copy_(part)
        if operator.sums is not None:
            operator.sums.data.copy_(wave((3, 2), "sums")[number])
    images = wave((2, 3, 8, 8), "images").requires_grad_()
    logits = model(images)
    torch.testing.assert_close(logits, expected["logits"], **CLOSE)
    queries = [each.prompt for each in operators]
    found = torch.autograd.grad((logits * wave((2, 3), "direction")).sum(), [*queries, images])
    torch.testing.assert_close(torch.stack(found[:-1]), expected["queries"], **CLOSE)
    torch.testing.assert_close(found[-1][:, :, 0], expected["images"], **CLOSE)


@against("authors", "vqt", **CODE, part="start")
def test_start_is_the_authors() -> None:
    """Queries, and the weights of their sums. The authors draw a new head over queries and class token; here the
    model's own goes on, and what it reads of queries starts at zero."""
    told = frozen(NUMBERS, "start")
    operators = asking(peftcore.apply(host("timm"), "vqt", length=1000, summary="weighted"))
    same_start(torch.stack([each.prompt for each in operators]), told["queries"])
    for each in operators:
        assert each.sums is not None
        same_start(each.sums, told["sums"])


@pytest.mark.parametrize("summary", ["concat", "mean", "weighted"])
@against("authors", "vqt", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train(summary: str) -> None:
    """Their head is one matrix; here its columns over queries lie with these."""
    injection = peftcore.apply(host("timm"), "vqt", length=2, summary=summary)
    operators, head = asking(injection), injection.model.head
    found = {"enc.transformer.encoder.query_prompt_embeddings": sum(each.prompt.numel() for each in operators)}
    found["head.last_layer.weight"] = head.weight.numel() + sum(each.reads[0].numel() for each in operators)
    found["head.last_layer.bias"] = head.bias.numel()
    if summary == "weighted":
        found["enc.combine_params"] = sum(each.sums.numel() for each in operators if each.sums is not None)
    assert found == frozen(NUMBERS, "trains")[summary]
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "vqt", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host("timm"), "vqt").config, frozen(NUMBERS, "defaults"))


HEADS: dict[str, tuple[str, Callable[[Any, Tensor], Tensor]]] = {
    "timm": ("head", lambda model, x: model.norm(x)[:, 0]),
    "torchvision": ("heads.head", lambda model, x: model.encoder.ln(x)[:, 0]),
}
"""Heads of hosts, and what they read of the last block's tokens."""


def unit(v: Tensor) -> Tensor:
    return v / v.square().sum(-1, keepdim=True).sqrt()


@pytest.mark.parametrize("summary", ["concat", "weighted"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_equation(name: str, summary: str) -> None:
    model, base, images = host(name), host(name), pixels().requires_grad_()
    injection, _ = prompted(model, "vqt", length=3, summary=summary, dropout=0.0)
    operators = asking(injection)
    edit_attention(name, base, [lambda key, value: (key[:, :, 3:], value[:, :, 3:])] * 3)
    x, read = HOSTS[name].embed(base, images), []
    for block, own in zip(base.get_submodule(HOSTS[name].blocks), operators, strict=True):
        y = block(torch.cat([own.prompt.expand(2, -1, -1), x], 1))
        made, x = y[:, :3], y[:, 3:]
        read.append(made.flatten(1) if own.sums is None else torch.einsum("t,btd->bd", own.sums, made))
    path, states = HEADS[name]
    logits = torch.cat([unit(each) for each in read], 1) @ torch.cat([each.reads[0] for each in operators], 1).T
    expected = base.get_submodule(path)(unit(states(base, x))) + logits
    ours = HOSTS[name].run(model.train(), images)
    torch.testing.assert_close(ours, expected, **CLOSE)
    direction, parameters = torch.randn_like(ours), [*injection.parameters(), images]
    found = [torch.autograd.grad((output * direction).sum(), parameters) for output in (ours, expected)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-8, atol=1e-9)
    assert all(each.abs().max() > 1e-4 for each in found[0])


@pytest.mark.parametrize("name", ["vit", "timm", "timm_mean", "torchvision"])
def test_tokens_stay_what_they_are(name: str) -> None:
    """With matrices of zeros the model's own outputs come out; with others they do not."""
    model, images = host(name), pixels()
    plain = HOSTS[name].run(host(name), images)
    injection, prompts = prompted(model, "vqt", length=3, normalize=False)
    moved = HOSTS[name].run(model, images)
    assert (moved - plain).abs().max() > 1e-2
    for operator in asking(injection):
        for read in operator.reads:
            read.data.zero_()
    torch.testing.assert_close(HOSTS[name].run(model, images), plain, rtol=1e-12, atol=1e-12)
    assert len(prompts) == 3


@pytest.mark.parametrize("names", [("vqt", "vpt_deep"), ("vpt_deep", "vqt"), ("vqt", "e2vpt"), ("e2vpt", "vqt")])
def test_beside_prompts_that_tokens_see(names: tuple[str, str]) -> None:
    """Queries ask what the tokens hold with the other adapter, which they do not change."""
    model, other, images = host("timm"), host("timm"), pixels()
    applied = {}
    for seed, method in enumerate(names):
        options = {"normalize": False} if method == "vqt" else {"segments": 4} if method == "e2vpt" else {}
        applied[method] = prompted(model, method, name=method, seed=seed, **options)[0]
        if method != "vqt":
            prompted(other, method, name=method, seed=seed, **options)
    peftcore.activate(model, *names)
    with_queries = model(images)
    for operator in asking(applied["vqt"]):
        operator.reads[0].data.zero_()
    torch.testing.assert_close(model(images), other(images), rtol=1e-12, atol=1e-12)
    assert (with_queries - other(images)).abs().max() > 1e-2


def test_refused() -> None:
    with pytest.raises(UnsupportedSite, match="does not have a head"):
        prompted(host("siglip"), "vqt")
    with pytest.raises(ConfigError, match="takes no overrides"):
        prompted(host("timm"), "vqt", overrides={"blocks.1": {"length": 2}})
    model = host("timm")
    prompted(model, "vpt_shallow", name="one")
    prompted(model, "vqt", name="other")
    peftcore.activate(model, "one", "other")
    with pytest.raises(SequenceError, match="apply vqt before it"):
        model(pixels())
    alone = host("timm")
    prompted(alone, "vqt")
    with pytest.raises(SequenceError, match="after all blocks"):
        alone.head(torch.ones(2, 16, dtype=torch.float64))
