"""Child-Tuning_D: which weights are in the child network, and the authors' optimizer, written a second time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import CalibrationError
from peftcore.testing import against, conformance, frozen, same_defaults
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "child_tuning_d.json"
CODE: Any = {"repository": "RunxinXu/ChildTuning", "commit": "d0d8655", "script": "ChildTuningD.py"}
SHARE = 0.3
MOVED = "torch cuts the ties of a host that moves to the meta device, so one table counts as two"
TIED = "a table is one weight: where one of its places is left out, the others still have it trained, everywhere"
PATCHES = "the module that embeds patches has the class token, so it runs for all rows once an injection"
ALL = "every tensor of the host trains, so the base does not show"


@conformance(
    "child_tuning_d",
    expected_failures={
        "each_pays_for_its_own_rows-vit": PATCHES,
        **{f"a_host_without_memory_can_be_planned-{name}": MOVED for name in ("gpt2", "t5")},
        **{f"an_injection_acts_only_where_it_lives-{name}": TIED for name in ("gpt2", "t5")},
        **{f"base_weights_load_into_an_adapted_host-{name}": ALL for name in HOSTS},
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Stack(nn.Module):
    """Three linear maps and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for linear in self.maps:
            x = torch.tanh(linear(x))
        logits = self.head(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def host() -> Stack:
    torch.manual_seed(0)
    return Stack().double()


def batches(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(5, 6, generator=generator).double() * (1 + 3 * index) for index in range(count)]
    return [{"x": x, "labels": torch.arange(5) % 3} for x in xs]


def adapted(**options: Any) -> tuple[Stack, peftcore.Injection]:
    model = host()
    given = {"share": SHARE, "target": "maps.*", "train": ["head"], "data": batches(), **options}
    return model, peftcore.apply(model, "child_tuning_d", dtype="float64", **given)


def masks(injection: peftcore.Injection) -> dict[str, Tensor]:
    return {path: o.mask for path, o in injection.operators.items() if not path.startswith("head")}


def expected_masks(share: float = SHARE, norm: float | None = 1.0) -> dict[str, Tensor]:
    """Squared gradients of the host itself, clipped one tensor at a time; numpy's percentile of all of them."""
    model = host()
    fisher = {name: torch.zeros_like(p) for name, p in model.maps.named_parameters(prefix="maps")}
    for given in batches():
        model.zero_grad()
        model(**given)["loss"].backward()
        for name, total in fisher.items():
            gradient = model.get_parameter(name).grad
            scale = 1.0 if norm is None else min(1.0, norm / (gradient.norm().item() + 1e-6))
            total += (gradient * scale) ** 2 / len(batches())
    threshold = np.percentile(np.concatenate([each.flatten().numpy() for each in fisher.values()]), 100 * (1 - share))
    return {name: total >= threshold for name, total in fisher.items()}


@pytest.mark.parametrize("share", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("norm", [None, 0.05, 1.0])
def test_the_child_network_is_that_of_the_authors(share: float, norm: float | None) -> None:
    _, injection = adapted(share=share, max_grad_norm=norm)
    found = masks(injection)
    expected = expected_masks(share, norm)
    named = {path if path.endswith("bias") else f"{path}.weight": mask for path, mask in found.items()}
    assert named.keys() == expected.keys()
    assert all(torch.equal(mask, expected[path]) for path, mask in named.items())
    count = sum(mask.numel() for mask in found.values())
    assert sum(int(mask.sum()) for mask in found.values()) == pytest.approx(share * count, abs=1)


def wave(*shape: int, step: float) -> Tensor:
    return torch.sin(step * torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) ** 1.5).view(shape)


class Layers(nn.Module):
    """An embedder, two layers that double what they read in training, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(4, 6)
        self.layer = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.classifier = nn.Linear(6, 3)
        with torch.no_grad():
            for index, parameter in enumerate(self.double().parameters()):
                parameter.copy_(wave(*parameter.shape, step=0.3 + 0.1 * index))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.embedder(x)
        for linear in self.layer:
            x = torch.tanh(linear(2 * x if self.training else x))
        return {"loss": nn.functional.cross_entropy(self.classifier(x), labels)}


@against("authors", "child_tuning_d", **CODE)
def test_the_child_network_of_the_authors_code() -> None:
    """It is chosen in training mode."""
    data = [{"x": wave(5, 4, step=0.7 + i) * (1 + 3 * i), "labels": torch.arange(5) % 3} for i in range(4)]
    options = {"target": "layer.*", "dtype": "float64", "data": data}
    injection = peftcore.apply(Layers().eval(), "child_tuning_d", **options)
    found = {f"{site.module_path}.{site.tensor}": injection.operators[site.path].mask for site in injection.sites}
    child = {name: mask.flatten().nonzero().flatten().tolist() for name, mask in found.items()}
    assert child == frozen(NUMBERS)
    other = peftcore.apply(Layers().eval(), "child_tuning_d", **options, training=False).operators
    assert any(not torch.equal(other[path].mask, each.mask) for path, each in injection.operators.items())


def test_clipping_matters() -> None:
    one, other = expected_masks(norm=None), expected_masks(norm=0.05)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_the_authors_optimizer() -> None:
    """AdamW on masked gradients: moments see zeros outside of the child, weight decay does not know of it."""
    lr, decay, betas, eps = 0.01, 0.1, (0.9, 0.999), 1e-8
    model, injection = adapted()
    optimizer = injection.optimizer(torch.optim.AdamW, lr=lr, weight_decay=decay, betas=betas, eps=eps)
    values = {path: operator.value for path, operator in injection.operators.items()}
    weights = {path: value.detach().clone() for path, value in values.items()}
    means = {path: torch.zeros_like(value) for path, value in weights.items()}
    squares = {path: torch.zeros_like(value) for path, value in weights.items()}
    found = masks(injection)
    for step in range(1, 6):
        optimizer.zero_grad()
        model(**batches()[step % 4])["loss"].backward()
        for path, value in values.items():
            gradient = value.grad * found.get(path, 1.0)
            means[path] = betas[0] * means[path] + (1 - betas[0]) * gradient
            squares[path] = betas[1] * squares[path] + (1 - betas[1]) * gradient**2
            update = (means[path] / (1 - betas[0] ** step)) / ((squares[path] / (1 - betas[1] ** step)).sqrt() + eps)
            weights[path] = weights[path] * (1 - lr * decay) - lr * update
        optimizer.step()
        for path, value in values.items():
            assert (value - weights[path]).abs().max() < 1e-12, path


def test_nothing_outside_of_the_child_moves_without_weight_decay() -> None:
    model, injection = adapted()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = injection.optimizer(torch.optim.AdamW, lr=0.01, weight_decay=0.0)
    before = {path: operator.value.detach().clone() for path, operator in injection.operators.items()}
    for given in batches():
        optimizer.zero_grad()
        model(**given)["loss"].backward()
        optimizer.step()
    for path, mask in masks(injection).items():
        assert torch.equal(injection.operators[path].value != before[path], mask), path
    for path in ("head", "head.bias"):  # trained whole
        assert (injection.operators[path].value != before[path]).all()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in base.items() if "peft" not in name)


def test_the_child_is_kept_in_the_file_and_loading_wants_no_data(tmp_path: Any) -> None:
    _, injection = adapted()
    injection.save(tmp_path)
    loaded = peftcore.load(host(), tmp_path, trainable=True)
    assert all(torch.equal(mask, masks(injection)[path]) for path, mask in masks(loaded).items())
    rule = loaded.method.gradient_rule(loaded)
    operator = loaded.operators["maps.0"]
    assert torch.equal(rule.project(torch.ones_like(operator.value), operator.value), operator.mask.double())


def test_data_is_needed() -> None:
    with pytest.raises(CalibrationError, match="data="):
        peftcore.apply(host(), "child_tuning_d", target="maps.*")


@against("authors", "child_tuning_d", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(peftcore.apply(host(), "child_tuning_d", data=batches()).config, frozen(NUMBERS, "defaults"))


@against("authors", "child_tuning_d", **CODE, part="trains")
def test_default_targets_are_what_the_blocks_hold_and_all_else_trains_whole() -> None:
    model, inputs = HOSTS["bert"].build()
    inputs["labels"] = torch.tensor([0, 2])
    injection = peftcore.apply(model, "child_tuning_d", data=[inputs], share=0.2)
    blocks = {name for name, _ in model.named_parameters() if ".layer." in name and "peft" not in name}
    found = {f"{site.module_path}.{site.tensor}": injection.operators[site.path] for site in injection.sites}
    assert found.keys() == {name for name, _ in HOSTS["bert"].build()[0].named_parameters()}
    child = {name: dict(operator.named_buffers()).get("mask") for name, operator in found.items()}
    told = frozen(NUMBERS, "trains")
    assert {name for name, mask in child.items() if mask is not None} == blocks == set(told["child"])
    assert {name for name, mask in child.items() if mask is None} == set(told["whole"])
    total = sum(child[name].numel() for name in blocks)
    assert sum(int(child[name].sum()) for name in blocks) == pytest.approx(0.2 * total, abs=1)
    alone = peftcore.apply(HOSTS["bert"].build()[0], "child_tuning_d", data=[inputs], others=False)
    assert len(alone.operators) == len(blocks)


def test_tied_weights_count_once() -> None:
    class Tied(Stack):
        def __init__(self) -> None:
            super().__init__()
            self.maps[2].weight = self.maps[0].weight

    torch.manual_seed(0)
    model = Tied().double()
    injection = peftcore.apply(model, "child_tuning_d", target="maps.*", data=batches(), dtype="float64")
    assert "maps.2" not in injection.operators
    assert sum(parameter.numel() for parameter in injection.parameters()) == 2 * 36 + 3 * 6


def test_number_of_parameters() -> None:
    assert peftcore.plan(host(), "child_tuning_d", target="maps.*").trainable == 3 * (36 + 6)
