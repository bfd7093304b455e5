"""SPT: the kit; its equation, by blocks that are run one by one on rows and tokens, with gradients; the search and what
it chooses; what is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore_additive.spt_selective import chosen

LENGTH = 3


# Five rows and five tokens, twice, for two experts, would have the size of the mixture's table.
@conformance("spt_selective", options={"*": {"length": 4}, "t5": {"length": 4, "layers": [1]}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.double().eval().requires_grad_(False), inputs


def causal(count: int) -> Tensor:
    return torch.full((count, count), -torch.inf, dtype=torch.float64).triu(1)[None, None]


def after_blocks(name: str, model: Any, inputs: dict[str, Tensor], rows: Callable[[int, Tensor | None], Any]) -> Tensor:
    """The tokens behind the last block, where ``rows(l, P_l)`` stand in front of them in block l, or nothing."""
    if name == "bert":
        blocks, x = model.bert.encoder.layer, model.bert.embeddings(inputs["input_ids"])
    else:
        blocks = model.transformer.h
        x = model.transformer.wte(inputs["input_ids"]) + model.transformer.wpe.weight[: inputs["input_ids"].shape[1]]
    made: Tensor | None = None
    for number, block in enumerate(blocks):
        made = rows(number, made)
        count = 0 if made is None else LENGTH
        both = x if made is None else torch.cat([made.expand(len(x), -1, -1), x], 1)
        output = block(both, attention_mask=None if name == "bert" else causal(both.shape[1]))
        both = output if isinstance(output, Tensor) else output[0]
        made, x = both[:, :count] if count else None, both[:, count:]
    return x if name == "bert" else model.transformer.ln_f(x)


@pytest.mark.parametrize("layers", [None, [0], [1], [0, 1]])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_equation(name: str, layers: list[int] | None) -> None:
    model, inputs = host(name)
    base, _ = host(name)
    base.load_state_dict(model.state_dict())
    for each in (model, base):
        each.config._attn_implementation = "eager"
    injection = peftcore.apply(model, "spt_selective", length=LENGTH, layers=layers, dtype="float64")
    fill(injection)
    (op,) = (each for path, each in injection.operators.items() if path.endswith("sequence"))
    places = layers or [0, 1]
    assert op.prompts.shape == (len(places), LENGTH, 16)

    def rows(number: int, below: Tensor | None) -> Tensor | None:
        if number not in places:
            return below
        p = op.prompts[places.index(number)]
        if layers is not None:
            return p
        a = 1 / (1 + (-op.alpha[number]).exp())
        return a * p if below is None else (1 - a) * below + a * p

    given = {"input_ids": inputs["input_ids"]}
    inner = model.bert if name == "bert" else model.transformer
    ours = inner(**given).last_hidden_state
    expected = after_blocks(name, base, inputs, rows)
    assert (ours - (base.bert if name == "bert" else base.transformer)(**given).last_hidden_state).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-10)
    direction, parameters = torch.randn_like(ours), list(injection.parameters())
    found = [torch.autograd.grad((each * direction).sum(), parameters) for each in (ours, expected)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-7, atol=1e-9)
    assert all(each.abs().max() > 0 for each in found[0])


def test_the_search_finds_the_block_whose_prompt_helps() -> None:
    """A target that a prompt in block 1 alone makes: its share grows, the other falls behind."""
    model, inputs = host("bert")
    teacher, _ = host("bert")
    teacher.load_state_dict(model.state_dict())
    prompts = torch.randn(1, LENGTH, 16).double() * 2
    told = peftcore.apply(teacher, "spt_selective", length=LENGTH, layers=[1], dtype="float64")
    (op,) = (each for path, each in told.operators.items() if path.endswith("sequence"))
    op.prompts.data.copy_(prompts)
    goal = teacher(**inputs).logits.detach()
    search = peftcore.apply(model, "spt_selective", length=LENGTH, dtype="float64")
    (own,) = (each for path, each in search.operators.items() if path.endswith("sequence"))
    own.prompts.data.copy_(torch.cat([torch.randn(1, LENGTH, 16).double() * 2, prompts]))
    assert all(each.sigmoid() == 0.5 for each in own.alpha)
    optimizer = torch.optim.Adam([own.alpha], lr=0.2)
    losses = []
    for _ in range(120):
        loss = nn.functional.mse_loss(model(**inputs).logits, goal)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]  # rows whose share is zero are seen as zeros, so it cannot be none
    assert chosen(search, 1) == [1] and chosen(search, 2) == [0, 1]


def test_what_is_refused() -> None:
    model, _ = host("bert")
    with pytest.raises(ConfigError, match="names a block twice"):
        peftcore.apply(model, "spt_selective", layers=[1, 1])
    with pytest.raises(UnsupportedSite, match="blocks 0 to 1"):
        peftcore.apply(model, "spt_selective", layers=[2])
    with pytest.raises(UnsupportedSite, match="target the encoder"):
        peftcore.apply(host("t5")[0], "spt_selective", target="stack.decoder")
    injection = peftcore.apply(model, "spt_selective", layers=[1])
    with pytest.raises(ConfigError, match="0 searches over blocks, not one"):
        chosen(injection, 1)
    injection.remove()
    with pytest.raises(ConfigError, match="count=3 is not a number from 1 to 2"):
        chosen(peftcore.apply(model, "spt_selective"), 3)
