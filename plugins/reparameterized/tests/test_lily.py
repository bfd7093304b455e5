"""Lily beside peft's and beside its equation, token by token; who shares what."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import adapted, hosted
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, RouteError
from peftcore.testing import against, conformance

OPTIONS: dict[str, Any] = {"rank": 3, "experts": 4}
MEANS = "as in the authors' code, the router takes a mean over all tokens of all rows that run together, padding too"
APART = ("mlp", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit")
PADDED = ("llama", "t5", "gpt2", "moe", "mistral")
FAILURES = {
    **{f"rows_stay_apart-{host}": MEANS for host in APART},
    **{f"padding_on_the_left_does_not_matter-{host}": MEANS for host in PADDED},
    **{f"generation_does_not_depend_on_the_cache-{host}": MEANS for host in ("llama", "moe")},
    "generation_in_other_ways_does_not_depend_on_the_cache-moe": MEANS,
}


# On the UNet three steps of a small update move what routes some queries by less than float32 has.
@conformance("lily", options={"*": {"rank": 4}, "unet": {"rank": 4, "scale": 50.0}}, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", ["linear", "wide", "conv1d-of-transformers", "convolution", "embedding"])
def test_equation(kind: str) -> None:
    base, x = hosted(kind)
    host, injection, operator = adapted(kind, "lily", **OPTIONS, scale=1.5)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    copies = [p.detach().clone().requires_grad_() for p in (operator.A.module.weight, operator.B.module.weight)]
    A, B, R = *copies, operator.router.detach().clone().requires_grad_()
    if kind == "convolution":
        low = nn.functional.conv2d(x, A, stride=2, padding=1).movedim(1, -1)
    else:
        low = A.T[x] if kind == "embedding" else x @ A.T
    tokens = low.reshape(-1, 3)
    p = sum((R @ token).softmax(0) for token in tokens) / len(tokens)
    update = 1.5 * sum(p[e] * (low @ B[e]) for e in range(4))
    expected = base(x) + (update.movedim(-1, 1) if kind == "convolution" else update)
    ours = host(x)
    assert difference(ours, base(x)) > 1e-3
    assert difference(ours, expected) <= 1e-10
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for mine, copy in ((operator.A.module.weight, A), (operator.B.module.weight, B), (operator.router, R)):
        assert copy.grad.abs().max() > 0
        assert difference(mine.grad, copy.grad) <= 1e-10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def blocks() -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(5)))


TARGET = ["up", "down"]


def test_who_shares_what() -> None:
    injection = peftcore.apply(blocks(), "lily", target=TARGET, **OPTIONS, stride=2)
    assert {name: tuple(m.weight.shape) for name, m in injection.shared.items()} == {
        **{f"A_{name}_8x8_{n}": (3, 8) for name in TARGET for n in range(3)},
        **{f"B_{name}_8x8": (4, 3, 8) for name in TARGET},
    }
    ups = [injection.operators[f"{n}.up"].A.module for n in range(5)]
    assert [ups.index(each) for each in ups] == [0, 0, 2, 2, 4]
    for name, module in injection.shared.items():
        assert module.weight.abs().max() <= 8**-0.5 and bool(module.weight.any()) == name.startswith("A")
    together = peftcore.apply(blocks(), "lily", target=TARGET, **OPTIONS, stride=2, across="shape")
    assert sorted(together.shared) == [*(f"A_all_8x8_{n}" for n in range(5)), "B_all_8x8"]


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    A, B = operator.A.module.weight, operator.B.module.weight
    yield Pair(f"{site.path}.A", A, layer.lily_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", B, layer.lily_B[ADAPTER].weight, lambda t: t.view(B.shape))
    yield Pair(f"{site.path}.router", operator.router, layer.lily_router[ADAPTER].weight, lambda t: t)


@pytest.mark.parametrize("across", ["name", "shape"])
@against("peft 0.21", "lily")
def test_beside_peft(across: str) -> None:
    torch.manual_seed(0)
    targets = TARGET if across == "name" else r"\d\.(up|down)"
    config = peft.LilyConfig(r=3, num_B=4, stride_A=2, scaling=1.5, target_modules=targets)
    options = {"target": TARGET, **OPTIONS, "stride": 2, "scale": 1.5, "across": across, "dtype": "float64"}
    both = Both(blocks().double(), "lily", options, config, pairs)
    for pair in both.pairs:  # what is shared comes several times, and is filled once
        pair.seen(pair.theirs.data).copy_(pair.ours)
    counts = {id(p): p.numel() for p in both.tuner.parameters() if p.requires_grad}
    groups, shared_A = (2, 6) if across == "name" else (1, 5)
    assert sum(p.numel() for p in both.injection.parameters()) == sum(counts.values())
    assert sum(counts.values()) == 10 * 4 * 3 + shared_A * 3 * 8 + groups * 4 * 3 * 8
    x = torch.randn(2, 3, 8).double()
    for model in (both.ours, both.tuner):
        model.train()
    both.assert_same_gradients(*both.assert_same_outputs(lambda model: model(x)))


def test_rows_meet_and_are_not_routed() -> None:
    model, x = blocks(), torch.randn(2, 3, 8)
    injection = peftcore.apply(model, "lily", target=TARGET, **OPTIONS)
    for parameter in injection.parameters():
        nn.init.normal_(parameter, 0, 0.5)
    with torch.no_grad():
        assert difference(model(x)[:1], model(x[:1])) > 1e-4
    with pytest.raises(RouteError), peftcore.route(model, ["lily", None]):
        model(x)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="rank cannot change at single sites"):
        peftcore.apply(blocks(), "lily", target=TARGET, **OPTIONS, overrides={"0.up": {"rank": 2}})
