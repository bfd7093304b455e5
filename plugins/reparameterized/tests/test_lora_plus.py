"""LoRA+: the same training as with peft's optimizer of that name, and who learns at which rate."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, TrainingError
from peftcore.testing import against, conformance

LR, RATIO, EMBEDDING, DECAY, STEPS = 0.03, 8.0, 0.002, 0.1, 6
EXACT = 1e-11


@conformance("lora_plus", options={"*": {"alpha": 12.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Words(nn.Module):
    """An embedding, two linear maps, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 9)
        self.second = nn.Linear(9, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.table(ids))))))


def adapted(model: nn.Module, **options: Any) -> peftcore.Injection:
    return peftcore.apply(
        model,
        "lora_plus",
        **{"target": ["table", "first", "second"], "rank": 3, "alpha": 5.0, "dtype": "float64", "ratio": RATIO}
        | {"embedding_lr": EMBEDDING, **options},
    )


def pairs(injection: peftcore.Injection, theirs: Any) -> list[tuple[Tensor, Tensor]]:
    """The factors in both libraries."""
    found = []
    for path, operator in injection.operators.items():
        layer = theirs.get_submodule(path)
        if path == "table":
            held = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            held = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        found += list(zip((operator.A, operator.B), held, strict=True))
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        ids = torch.randint(11, (5, 4), generator=generator)
        goal = torch.randn(5, 4, 3, generator=generator, dtype=torch.float64)
        (model(ids) - goal).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("scaling", ["rank", "sqrt_rank"])
@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "lora_plus")
def test_a_training_beside_peft(cls: type[torch.optim.Optimizer], scaling: Any) -> None:
    torch.manual_seed(0)
    base = Words().double()
    ours, ids = deepcopy(base), torch.randint(11, (5, 4))
    injection = adapted(ours, scaling=scaling)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=scaling == "sqrt_rank", target_modules=["table", "first", "second"]
    )
    theirs = peft.get_peft_model(deepcopy(base), config).double()
    both = pairs(injection, theirs.base_model.model)
    assert len(both) == 6 == len([p for p in theirs.parameters() if p.requires_grad])
    with torch.no_grad():
        for mine, held in both:
            held.copy_(mine.normal_(0, 0.1))
    starts = [mine.detach().clone() for mine, _ in both]
    train(ours, injection.optimizer(cls, lr=LR, weight_decay=DECAY))
    rates = {"loraplus_lr_ratio": RATIO, "loraplus_lr_embedding": EMBEDDING, "loraplus_weight_decay": DECAY}
    train(theirs, create_loraplus_optimizer(theirs, cls, lr=LR, **rates))
    for (mine, held), start in zip(both, starts, strict=True):
        assert (mine - start).abs().max() > 1e-5
        assert (mine - held).abs().max() <= EXACT * held.abs().max()
    assert (ours(ids) - theirs(ids)).abs().max() <= EXACT * ours(ids).abs().max()
    injection.bake()
    merged = theirs.merge_and_unload()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, merged.get_parameter(name), rtol=1e-10, atol=1e-12)


def rates(injection: peftcore.Injection, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    of = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(of) == sum(len(group["params"]) for group in optimizer.param_groups)
    return {f"{path}.{n}": of[p] for path, each in injection.operators.items() for n, p in each.named_parameters()}


def test_who_learns_at_which_rate() -> None:
    """What the user trains along has the plain rate, matrix and bias; options of some sites count there alone."""
    injection = adapted(Words(), train=["head"], overrides={"second": {"ratio": 3.0, "rank": 2}})
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.5, weight_decay=0.25, betas=(0.8, 0.9))
    assert rates(injection, optimizer) == {
        "table.A": EMBEDDING,
        "table.B": EMBEDDING,
        "first.A": 0.5,
        "first.B": 4.0,
        "second.A": 0.5,
        "second.B": 1.5,
        "head.value": 0.5,
        "head.bias.value": 0.5,
    }
    assert {(group["weight_decay"], group["betas"]) for group in optimizer.param_groups} == {(0.25, (0.8, 0.9))}


def test_the_first_step_of_sgd() -> None:
    """By hand, without any library: only B moves at first, by ratio * lr."""
    model = nn.Sequential(nn.Linear(6, 4)).double()
    injection = peftcore.apply(model, "lora_plus", target="0", rank=2, alpha=3.0, ratio=10.0, dtype="float64")
    (operator,) = injection.operators.values()
    A, x, direction = operator.A.detach().clone(), torch.randn(5, 6).double(), torch.randn(5, 4).double()
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    (model(x) * direction).sum().backward()
    optimizer.step()
    torch.testing.assert_close(operator.B, -0.1 * 10.0 * 1.5 * direction.T @ (x @ A.T))
    assert torch.equal(operator.A, A)


def test_defaults_are_those_of_the_paper() -> None:
    model = Words()
    injection = peftcore.apply(model, "lora_plus", target=["table", "first"])
    found = rates(injection, injection.optimizer(torch.optim.SGD, lr=2e-4))
    assert found == {"table.A": 1e-6, "table.B": 1e-6, "first.A": 2e-4, "first.B": pytest.approx(32e-4)}
    assert injection.operators["first"].scale == 1.0


def test_frozen_factors_are_in_no_group() -> None:
    injection = adapted(Words())
    injection.operators["first"].B.requires_grad_(False)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 5
    injection.trainable(False)
    with pytest.raises(TrainingError, match="frozen"):
        injection.optimizer(torch.optim.SGD, lr=0.1)


def test_groups_survive_in_a_union() -> None:
    model = Words()
    methods = [{"method": "lora_plus", "target": "first", "ratio": 5.0}, {"method": "lora", "target": "second"}]
    injection = peftcore.apply(model, methods)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [0.1, 0.5]


@pytest.mark.parametrize("ratio", [0.5, math.inf, math.nan])
def test_b_never_learns_slower(ratio: float) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        adapted(Words(), ratio=ratio)
