"""LoRAMoE: the kit; numbers of the authors' layer, whose softmax and loss are in float32; the equation for kinds of
layers; the balancing loss without padding, in a model, and where it cannot be."""

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
from peftcore.errors import ConfigError, MissingContext, NotMergeable, TrainingError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance, frozen, same_defaults, same_start
from peftcore.testing.kit import fill

EXPERTS, RANK = 4, 2
OPTIONS: dict[str, Any] = {"target": "0", "experts": EXPERTS, "rank": RANK, "alpha": 3.0, "dropout": 0.0}
NUMBERS = Path(__file__).parent / "numbers" / "loramoe.json"
CODE: Any = {"repository": "Ablustrund/LoRAMoE", "commit": "1177288", "script": "peft/tuners/lora.py"}
LOST = "a balancing loss has no gradient in reentrant checkpoints, which are refused"


@conformance(
    "loramoe",
    options={
        "*": {"experts": EXPERTS, "rank": RANK},
        "bert": {"balance": 0.1},
        # Tokens with 4 experts of rank 2 would be as large as a matrix there.
        **{host: {"experts": 3, "rank": RANK} for host in ("unet", "moe")},
    },
    expected_failures={"each_block_may_run_again-bert": LOST},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    """Numbers that are the same everywhere: sin(0), sin(step), sin(2 step), ..."""
    return (torch.arange(math.prod(shape), dtype=torch.float64) * step).sin().view(shape)


@against("authors", "loramoe", **CODE)
def test_numbers_of_the_authors() -> None:
    """The output, the loss, and the gradients of either. Their type 1 has the first half of the experts: our task 0."""
    model = nn.Sequential(nn.Linear(5, 4)).double().train()
    injection = peftcore.apply(model, "loramoe", **OPTIONS, tasks=2, balance=0.3, delta=0.2, dtype="float64")
    op: Any = injection.operators["0"]
    with torch.no_grad():
        model[0].weight.copy_(wave(4, 5, step=1.1))
        model[0].bias.copy_(wave(4, step=1.3))
        op.gate.copy_(wave(EXPERTS, 5, step=0.7))
        op.A.copy_(wave(EXPERTS, 2, 5, step=1.7))
        op.B.copy_(wave(EXPERTS, 4, 2, step=2.3))
    with peftcore.call(model, task=[0, 1]):
        y = model(wave(2, 3, 5, step=0.9))
    loss = injection.losses()
    (of_loss,) = torch.autograd.grad(loss, op.gate, retain_graph=True)
    (y * wave(2, 3, 4, step=0.3)).sum().backward()
    found = {"y": y, "loss": loss, "A": op.A.grad, "B": op.B.grad, "gate": op.gate.grad, "gate of the loss": of_loss}
    numbers = frozen(NUMBERS)
    assert numbers.keys() == found.keys()
    for name, value in found.items():
        assert difference(value.flatten(), torch.tensor(numbers[name], dtype=torch.float64)) < 1e-6, name


@against("authors", "loramoe", **CODE, part="start")
def test_start_is_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(2000, 3)), "loramoe", target="0", experts=20, rank=2)
    for name, told in frozen(NUMBERS, "start").items():
        same_start(getattr(injection.operators["0"], name), told)


@against("authors", "loramoe", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    op = peftcore.apply(nn.Sequential(nn.Linear(5, 4)), "loramoe", **OPTIONS).operators["0"]
    assert {name: each.numel() for name, each in op.named_parameters() if each.requires_grad} == frozen(
        NUMBERS, "trains"
    )


@against("authors", "loramoe", **CODE, part="defaults")
def test_defaults_are_those_of_the_authors_script() -> None:
    """Also the matrices of the feed-forward."""
    injection = peftcore.apply(HOSTS["llama"].build()[0], "loramoe")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))
    assert {path.rpartition(".")[2] for path in injection.operators} == {"gate_proj", "down_proj", "up_proj"}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_equation(kind: str) -> None:
    """Each expert as a layer of its own, with its effective weight; their changes weighted position by position."""
    host = OneLayer(kind)
    x, channels, model = host.x, host.channels, deepcopy(host.model)
    injection = peftcore.apply(model, "loramoe", **OPTIONS, dtype="float64")
    fill(injection)
    op: Any = injection.operators["0"]
    plain = host.model(x)

    shares = host.with_weight(op.gate.detach()).exp()
    shares = shares / shares.sum(-1, keepdim=True)
    parts = [host.with_weight(torch.einsum("or,r...->o...", op.B[e], op.A[e]).detach()) for e in range(EXPERTS)]
    expected = plain.movedim(channels, -1) + 1.5 * sum(shares[..., e, None] * parts[e] for e in range(EXPERTS))
    assert difference(model(x), plain) > 1e-3
    torch.testing.assert_close(model(x).movedim(channels, -1), expected, rtol=1e-10, atol=1e-10)


def test_each_expert_drops_for_itself_and_the_gate_does_not() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 8)).double(), torch.randn(5, 12).double()
    plain = model(x)
    injection = peftcore.apply(model, "loramoe", **{**OPTIONS, "dropout": 0.5}, dtype="float64")
    fill(injection)
    op: Any = injection.operators["0"]
    torch.manual_seed(1)
    found = model(x)
    torch.manual_seed(1)
    shares = (x @ op.gate.T).softmax(-1)
    parts = [nn.functional.dropout(x, 0.5) @ A.T @ B.T for A, B in zip(op.A, op.B, strict=True)]
    expected = plain + 1.5 * sum(shares[:, e : e + 1] * parts[e] for e in range(EXPERTS))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count_in_the_loss(side: str) -> None:
    """A padded batch has the loss of its rows by themselves, hosts' own loss included; their sum is that of rows that
    are computed one by one."""
    torch.manual_seed(0)
    model, inputs = HOSTS["bert"].build()
    model.double().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    injection = peftcore.apply(model, "loramoe", balance=1.0, dropout=0.0, dtype="float64")
    fill(injection)
    ids = inputs["input_ids"]
    pads = torch.zeros(len(ids), 3, dtype=ids.dtype)
    order = (pads, ids) if side == "left" else (ids, pads)
    mask = torch.cat([torch.ones_like(each) if each is ids else each for each in order], 1)
    places = mask.cumsum(1).sub(1).clamp(min=0)
    model(input_ids=ids)
    plain = injection.losses()
    model(input_ids=torch.cat(order, 1), attention_mask=mask, position_ids=places)
    assert plain > 1e-4
    torch.testing.assert_close(injection.losses(), plain, rtol=1e-9, atol=1e-12)
    model(input_ids=torch.cat(order, 1), attention_mask=torch.ones_like(mask), position_ids=places)
    assert (injection.losses() - plain).abs() > 1e-6


def test_what_is_refused() -> None:
    injection = peftcore.apply(HOSTS["llama"].build()[0], "loramoe")
    with pytest.raises(NotMergeable):
        injection.merge()
    with pytest.raises(UnsupportedSite, match="dropout=0"):
        peftcore.apply(nn.Sequential(nn.Embedding(5, 3)), "loramoe", target="0")
    with pytest.raises(ConfigError, match="cannot be split equally"):
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "loramoe", tasks=3, delta=0.1)


def test_only_training_has_to_be_told_tasks() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    peftcore.apply(model, "loramoe", target="0", tasks=2, delta=0.1, balance=0.1)
    model.eval()(torch.randn(2, 3, 4))
    with pytest.raises(MissingContext, match="task"):
        model.train()(torch.randn(2, 3, 4))


def test_a_loss_that_would_be_lost_is_refused() -> None:
    model, inputs = HOSTS["llama"].build()
    peftcore.apply(model.train(), "loramoe", balance=0.1)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(TrainingError, match="use_reentrant"):
        model(**inputs)
