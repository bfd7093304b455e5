"""GaLore: which side is projected, what the optimizer keeps, numbers of the authors' own optimizer, and that written a
second time."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults
from peftcore.testing.hosts import HOSTS
from peftcore_reparameterized.galore import GaLoreConfig, Projection

NUMBERS = Path(__file__).parent / "numbers" / "galore.json"
CODE: Any = {"repository": "jiaweizzhao/GaLore", "commit": "33f2c4f", "script": "galore_torch/adamw.py"}
SHAPES = ((20, 12), (9, 20), (9, 9))
RANK, GAP, SCALE, LR, DECAY, BETAS, EPS = 4, 3, 0.25, 0.01, 0.1, (0.9, 0.999), 1e-8
SIDES = ("std", "reverse_std", "right", "left", "full")


@conformance("galore")
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Chain(nn.Module):
    """A tall matrix, a wide one, a square one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(inputs, outputs) for outputs, inputs in SHAPES)
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        for linear in self.maps:
            x = torch.tanh(linear(x))
        return self.head(x)


def adapted(dtype: str = "float64", **options: Any) -> tuple[nn.Module, peftcore.Injection, list[nn.Parameter]]:
    """The host, its injection (with a head that trains along), and the projected weights."""
    torch.manual_seed(0)
    model = Chain().to(getattr(torch, dtype))
    given = {"rank": RANK, "gap": GAP, "scale": SCALE, **options}
    injection = peftcore.apply(model, "galore", target="maps.*", train=["head"], dtype=dtype, **given)
    values = [injection.operators[f"maps.{index}"].value for index in range(len(SHAPES))]
    return model, injection, values


class Reference:
    """The authors' optimizer for one matrix, from its description: Adam on a projection of the gradient that is renewed
    every `GAP` steps, the update back-projected and scaled, weight decay last."""

    def __init__(self, weight: Tensor, side: str) -> None:
        self.weight, self.side, self.steps = weight.clone(), side, 0
        self.left = self.right = self.mean = self.square = torch.empty(0)

    def step(self, gradient: Tensor) -> None:
        tall = gradient.shape[0] >= gradient.shape[1]
        by_shape = {"std": ("right" if tall else "left"), "reverse_std": ("left" if tall else "right")}
        side = by_shape.get(self.side, self.side)
        on_left, on_right = side in ("left", "full"), side in ("right", "full")
        if self.steps % GAP == 0:
            U, _, V = torch.linalg.svd(gradient, full_matrices=False)
            self.left, self.right = U[:, :RANK], V[:RANK]
        low = self.left.T @ gradient if on_left else gradient
        low = low @ self.right.T if on_right else low
        if self.steps == 0:
            self.mean, self.square = torch.zeros_like(low), torch.zeros_like(low)
        self.steps += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * low
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * low**2
        first, second = 1 - BETAS[0] ** self.steps, 1 - BETAS[1] ** self.steps
        update = (self.mean / first) / ((self.square / second).sqrt() + EPS)
        update = self.left @ update if on_left else update
        update = update @ self.right if on_right else update
        self.weight = (self.weight - LR * SCALE * update) * (1 - LR * DECAY)


@pytest.mark.parametrize("side", SIDES)
def test_the_authors_optimizer(side: str) -> None:
    _, injection, values = adapted(side=side)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=LR, weight_decay=DECAY, betas=BETAS, eps=EPS)
    references = [Reference(value.detach(), side) for value in values]
    for _ in range(8):
        for parameter in injection.parameters():
            parameter.grad = torch.randn_like(parameter)
        for value, reference in zip(values, references, strict=True):
            reference.step(value.grad)
        optimizer.step()
        for value, reference in zip(values, references, strict=True):
            assert (value - reference.weight).abs().max() < 1e-12
            assert optimizer.state[value]["exp_avg"].shape == reference.mean.shape


def wave(shape: tuple[int, ...], seed: int) -> Tensor:
    """Numbers that look random and are the same everywhere."""
    steps = torch.arange(1.0, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(steps**1.5 * (0.37 + 0.11 * seed)).view(shape).float()


@pytest.mark.parametrize("side", [each for each in SIDES if each != "full"])
@against("authors", "galore", **CODE)
def test_numbers_of_the_authors_package(side: str) -> None:
    _, injection, values = adapted(dtype="float32", side=side)
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.05, eps=1e-12, weight_decay=0.1)
    for index, value in enumerate(values):
        value.data.copy_(wave(SHAPES[index], 10 + index))
    for step in range(8):
        for index, value in enumerate(values):
            value.grad = wave(SHAPES[index], step + index)
        optimizer.step()
    for value, expected in zip(values, frozen(NUMBERS)[side], strict=True):
        assert value.flatten()[::5].tolist() == pytest.approx(expected, abs=2e-5)


def test_what_trains_along_is_trained_as_usual() -> None:
    _, injection, _ = adapted()
    plain = [parameter.detach().clone().requires_grad_() for parameter in injection.parameters()][-2:]
    head = list(injection.parameters())[-2:]
    optimizer = injection.optimizer(torch.optim.AdamW, lr=LR, weight_decay=DECAY)
    reference = torch.optim.AdamW(plain, lr=LR, weight_decay=DECAY)
    for _ in range(3):
        for parameter in injection.parameters():
            parameter.grad = torch.randn_like(parameter)
        for one, other in zip(plain, head, strict=True):
            one.grad = other.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(*pair) for pair in zip(plain, head, strict=True))
    assert [len(group["params"]) for group in optimizer.param_groups] == [3, 2]


def test_the_state_of_the_optimizer_is_small() -> None:
    """2 rank max(in, out) numbers a matrix for Adam's moments, and rank min(in, out) for the projection."""
    _, injection, values = adapted()
    optimizer = injection.optimizer(torch.optim.AdamW, lr=LR)
    for parameter in injection.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for value, (outputs, inputs) in zip(values, SHAPES, strict=True):
        moments = sum(state.numel() for state in optimizer.state[value].values() if state.dim() == 2)
        projection = sum(v.numel() for v in optimizer.rules[0].state[value].values() if isinstance(v, Tensor))
        assert moments == 2 * RANK * max(inputs, outputs)
        assert projection == RANK * min(inputs, outputs)


def test_the_projection_is_the_best_of_its_rank() -> None:
    """At the step that renews it, back-projecting the projected gradient is the truncated SVD."""
    _, injection, values = adapted()
    rule = injection.method.gradient_rule(injection)
    for value in values:
        gradient = torch.randn_like(value)
        U, S, V = torch.linalg.svd(gradient, full_matrices=False)
        best = U[:, :RANK] @ S[:RANK].diag() @ V[:RANK]
        torch.testing.assert_close(rule.restore(rule.project(gradient, value), value), SCALE * best)


def test_the_projection_is_renewed_every_gap_steps() -> None:
    _, injection, (value, *_) = adapted()
    rule = injection.method.gradient_rule(injection)
    seen = []
    for _ in range(2 * GAP + 1):
        rule.project(torch.randn_like(value), value)
        seen.append(rule.state[value]["right"])
    assert [torch.equal(one, other) for one, other in itertools.pairwise(seen)] == [True, True, False] * 2


def test_a_rank_above_the_width_is_plain_training_in_other_coordinates() -> None:
    """With SGD, whose updates are linear in the gradient, nothing is lost."""
    _, injection, values = adapted(rank=100, scale=1.0)
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    before = [value.detach().clone() for value in values]
    for parameter in injection.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for value, old in zip(values, before, strict=True):
        torch.testing.assert_close(value.detach(), old - 0.1 * value.grad)


def test_gradients_in_half_precision_are_projected_in_full() -> None:
    """SVD knows no bfloat16; state and updates keep the dtype of the weights."""
    _, injection, values = adapted(dtype="bfloat16")
    optimizer = injection.optimizer(torch.optim.AdamW, lr=LR)
    before = [value.detach().clone() for value in values]
    for parameter in injection.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for value, old in zip(values, before, strict=True):
        assert value.dtype is optimizer.state[value]["exp_avg"].dtype is torch.bfloat16
        assert not torch.equal(value, old)


def test_the_base_stays_and_merging_writes_into_it() -> None:
    model, injection, _ = adapted(dtype="float32")
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if "peft" not in name}
    optimizer = injection.optimizer(torch.optim.AdamW, lr=LR)
    x = torch.randn(5, 12)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items())
    expected = model(x)
    injection.bake()
    torch.testing.assert_close(model(x), expected)
    assert not any(torch.equal(linear.weight, base[f"maps.{i}.weight"]) for i, linear in enumerate(model.maps))


def test_options_may_differ_from_site_to_site() -> None:
    _, injection, values = adapted(overrides={"maps.1": {"rank": 2, "side": "right"}})
    rule = injection.method.gradient_rule(injection)
    shapes = [rule.project(torch.randn_like(value), value).shape for value in values]
    assert shapes == [(20, RANK), (9, 2), (9, RANK)]


def test_default_targets_are_the_matrices_of_the_blocks() -> None:
    model, _ = HOSTS["gpt2"].build()
    injection = peftcore.apply(model, "galore")
    wanted = {f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "mlp.c_fc")}
    assert wanted <= set(injection.operators)
    assert all(operator.value.dim() == 2 for operator in injection.operators.values())


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3), nn.LayerNorm(4)])
def test_only_matrices_are_projected(layer: nn.Module) -> None:
    with pytest.raises(UnsupportedSite, match="dimension"):
        peftcore.apply(nn.Sequential(layer), "galore", target="0")


def test_number_of_parameters() -> None:
    _, injection, _ = adapted()
    assert sum(parameter.numel() for parameter in injection.parameters()) == sum(math.prod(s) for s in SHAPES) + 30


@pytest.mark.parametrize("side", SIDES)
def test_each_expert_has_a_projection_of_its_own(side: Any) -> None:
    stack = nn.Parameter(torch.randn(3, 7, 5, dtype=torch.float64))
    rule = Projection({stack: GaLoreConfig(rank=2, side=side)})
    gradient = torch.randn_like(stack)
    together = rule.restore(rule.project(gradient, stack), stack)
    for index, one in enumerate(stack):
        alone = nn.Parameter(one.detach().clone())
        rule.configs[alone] = GaLoreConfig(rank=2, side=side)
        torch.testing.assert_close(together[index], rule.restore(rule.project(gradient[index], alone), alone))


def test_experts_train_by_default() -> None:
    model, inputs = HOSTS["moe"].build()
    injection = peftcore.apply(model, "galore", rank=2)
    assert "model.layers.0.mlp.experts.gate_up_proj" in injection.operators
    optimizer = injection.optimizer(torch.optim.SGD, lr=0.1)
    value = injection.operators["model.layers.0.mlp.experts.down_proj"].value
    before = value.detach().clone()
    model(**inputs).logits.square().mean().backward()
    optimizer.step()
    assert (value - before).flatten(1).abs().amax(1).gt(0).sum() >= 2


@against("authors", "galore", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The matrices of the blocks are projected; all else trains as usual, and is named by `train` here."""
    sizes: Any = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, **sizes))
    told, rest = frozen(NUMBERS, "trains"), ["model.embed_tokens", "lm_head", "*norm"]
    injection = peftcore.apply(model, "galore", train=rest)
    projected = {f"{graft.site.module_path}.{graft.site.tensor}" for graft in injection.grafts if graft.by_method}
    every = {f"{site.module_path}.{site.tensor}" for site in injection.sites}
    assert projected == set(told["projected"])
    assert every - projected == set(told["regular"])


@against("authors", "galore", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(
        peftcore.apply(nn.Sequential(nn.Linear(4, 4)), "galore", target="0").config, frozen(NUMBERS, "defaults")
    )


def test_what_the_defaults_do() -> None:
    """A step of SGD is a quarter of the gradient, in its 128 leading directions on the shorter side, which stay for 200
    steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(150, 140, bias=False))
    injection = peftcore.apply(model, "galore", target="0")
    (value,) = injection.parameters()
    before = value.detach().clone()
    optimizer = injection.optimizer(torch.optim.SGD, lr=1.0)
    gradients = torch.randn(2, 140, 150)

    def directions(gradient: Tensor) -> Tensor:
        U, _, _ = torch.linalg.svd(gradient, full_matrices=False)
        return U[:, :128]

    value.grad = gradients[0].clone()
    optimizer.step()
    P = directions(gradients[0])
    torch.testing.assert_close(value.detach() - before, -0.25 * P @ P.T @ gradients[0], rtol=1e-3, atol=1e-4)
    kept, small = injection.method.gradient_rule(injection), gradients[1]
    for step in range(201):
        low = kept.project(gradients[0] if step == 0 else small, value)
        expected = directions(small if step == 200 else gradients[0]).T @ small
        if step in (199, 200):  # up to signs of singular vectors
            torch.testing.assert_close(low.abs(), expected.abs(), rtol=1e-2, atol=1e-3)
