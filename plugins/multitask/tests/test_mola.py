"""MoLA: the kit; numbers of the authors' layer, whose softmax and loss are in float32; the equation for kinds of
layers; how experts are spread over the depth; the balancing loss of a model without padding."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_layers import LAYERS, OneLayer
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

EXPERTS, RANK = 4, 2
OPTIONS: dict[str, Any] = {"target": "0", "experts": EXPERTS, "rank": RANK, "alpha": 3.0, "dropout": 0.0}
NUMBERS = Path(__file__).parent / "numbers" / "mola.json"
CODE: Any = {"repository": "GCYZSL/MoLA", "commit": "01785c8", "script": "src/mola_lora_hacked.py"}


@conformance("mola", options={"*": {"experts": 3, "rank": RANK}, "llama": {"experts": [2, 3], "rank": RANK}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@against("authors", "mola", **CODE)
def test_numbers_of_the_authors() -> None:
    """The output and its gradients, and the loss of a layer with that of its router."""
    model = nn.Sequential(nn.Linear(5, 4)).double().train()
    injection = peftcore.apply(model, "mola", **OPTIONS, balance=0.3, dtype="float64")
    op: Any = injection.operators["0"]
    with torch.no_grad():
        model[0].weight.copy_(wave(4, 5, step=1.1))
        model[0].bias.copy_(wave(4, step=1.3))
        op.router.copy_(wave(EXPERTS, 5, step=0.7))
        op.A.copy_(wave(EXPERTS, 2, 5, step=1.7))
        op.B.copy_(wave(EXPERTS, 4, 2, step=2.3))
    x = wave(2, 3, 5, step=0.9).requires_grad_()
    y = model(x)
    loss = injection.losses() / 0.3
    (of_loss,) = torch.autograd.grad(loss, op.router, retain_graph=True)
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    found = {"y": y, "loss": loss, "x": x.grad, "A": op.A.grad, "B": op.B.grad, "router": op.router.grad}
    found["router of the loss"] = of_loss
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        assert value is not None
        assert difference(value.flatten(), torch.tensor(numbers[name], dtype=torch.float64)) < 1e-6, name


@against("authors", "mola", **CODE, part="start")
def test_start_is_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(2000, 4)), "mola", target="0", experts=20, rank=2)
    for name, told in frozen(NUMBERS, "start").items():
        same_start(getattr(injection.operators["0"], name), told)


@against("authors", "mola", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    op = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "mola", **OPTIONS).operators["0"]
    trained = {name: each.numel() for name, each in op.named_parameters() if each.requires_grad}
    assert trained == frozen(NUMBERS, "trains")


@against("authors", "mola", **CODE, part="defaults")
def test_defaults_are_those_of_the_authors_script() -> None:
    same_defaults(peftcore.apply(HOSTS["llama"].build()[0], "mola").config, frozen(NUMBERS, "defaults"))


@pytest.mark.parametrize("kind", LAYERS)
def test_the_equation(kind: str) -> None:
    """Each expert as a layer of its own, with its effective weight; position by position, all but the two largest gates
    are left out."""
    host = OneLayer(kind)
    x, channels, model = host.x, host.channels, deepcopy(host.model)
    injection = peftcore.apply(model, "mola", **OPTIONS, dtype="float64")
    fill(injection)
    op: Any = injection.operators["0"]
    plain = host.model(x)

    shares = host.with_weight(op.router.detach()).exp()
    second = shares.sort(-1).values[..., -2:-1]
    shares = torch.where(shares >= second, shares, 0)
    shares = shares / shares.sum(-1, keepdim=True)
    parts = [host.with_weight(torch.einsum("or,r...->o...", op.B[e], op.A[e]).detach()) for e in range(EXPERTS)]
    expected = plain.movedim(channels, -1) + 1.5 * sum(shares[..., e, None] * parts[e] for e in range(EXPERTS))
    assert difference(model(x), plain) > 1e-3
    torch.testing.assert_close(model(x).movedim(channels, -1), expected, rtol=1e-10, atol=1e-10)


def test_experts_are_spread_over_the_depth_as_in_the_authors_script() -> None:
    """number_experts of mola_training.py: eight layers each of 2, 4, 6 and 8."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 16}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32, **sizes))
    operators = peftcore.apply(model, "mola").operators
    for path, op in operators.items():
        depth = int(path.split(".")[2])
        assert len(op.A) == len(op.router) == 2 * (depth // 8) + 2, path  # type: ignore[arg-type]
    assert len(operators) == 7 * 32


def test_what_it_refuses() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(300, 200)), "mola", target="0", experts=8)
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(UnsupportedSite, match="0 belongs to no layer"):
        peftcore.apply(nn.Sequential(nn.Linear(3, 2)), "mola", target="0")
    with pytest.raises(ConfigError, match="top_k=3 is more than the fewest experts"):
        peftcore.apply(nn.Sequential(nn.Linear(3, 2)), "mola", target="0", experts=[4, 2], top_k=3)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_model_leaves_padding_out(side: str) -> None:
    """A padded batch has the loss of its tokens: the equation over the modules of each layer, by hooks."""
    torch.manual_seed(0)
    model, inputs = HOSTS["llama"].build()
    model.double().train()
    injection = peftcore.apply(model, "mola", experts=[2, 3], rank=RANK, balance=0.1, dropout=0.0, dtype="float64")
    fill(injection)
    seen: dict[str, list[tuple[Any, Tensor]]] = {}
    for path, op in injection.operators.items():
        block, module = ".".join(path.split(".")[:3]), model.get_submodule(path)
        module.register_forward_pre_hook(
            lambda m, args, block=block, op=op: seen.setdefault(block, []).append((op, args[0].detach()))
        )
    ids = inputs["input_ids"][:, :5]
    mask = torch.ones_like(ids)
    mask[0, slice(2) if side == "left" else slice(3, None)] = 0
    model(input_ids=ids, attention_mask=mask)
    found, expected = injection.losses(), torch.tensor(0.0, dtype=torch.float64)
    assert len(seen) == 2
    for modules in seen.values():
        p = torch.cat([(x[mask == 1] @ op.router.detach().T).softmax(-1) for op, x in modules])  # [tokens, experts]
        chosen = (p >= p.sort(-1).values[:, -2:-1]).double()
        expected += 0.1 * p.shape[-1] * (chosen.sum(0) / chosen.sum() * p.mean(0)).sum()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
