"""Default targets: the first alternative that a host has, and what is said of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from core_toys import transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.layers.detect import dense_layer
from peftcore.roles import derive
from peftcore.surgery.defaults import default_sites
from peftcore.targets.resolver import Resolver
from peftcore.utils import notices

METHODS = ("lora", "dora", "ia3", "bitfit", "houlsby_adapter")


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "told", set())


class Residual(nn.Module):
    """A block of convolutions."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.depth = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm2(self.conv2(self.depth(torch.relu(self.norm1(self.conv1(x))))))


def residual() -> nn.Module:
    blocks = nn.Sequential(Residual(), Residual())
    return nn.Sequential(nn.Conv2d(3, 8, 3), blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


def convolutions() -> nn.Module:
    """Layers without blocks."""
    pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), *pool, nn.Linear(8, 4)).eval()


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


class Hybrid(nn.Module):
    """Attention in one block, a feed-forward alone in the other."""

    def __init__(self) -> None:
        super().__init__()
        whole = transformer()
        self.layers = nn.ModuleList([whole.layers[0], whole.layers[1]])
        self.layers[1].self_attn = None
        self.towers = nn.ModuleDict()

    def forward(self, x: Tensor) -> Tensor:
        return x


def planned(model: nn.Module, method: str, **arguments: Any) -> tuple[list[str], tuple[str, ...]]:
    plan = peftcore.plan(model, method, **arguments)
    return [site.path for site in plan.sites], plan.notes


def test_the_first_that_the_host_has_is_taken_and_said(caplog: pytest.LogCaptureFixture) -> None:
    found, notes = planned(residual(), "lora")
    assert found == [
        f"1.{i}.conv{j}" for i in (0, 1) for j in (1, 2)
    ]  # a kernel of each channel by itself is no matrix
    said = "lora: this Sequential has none of attn.q, attn.v, cross.q, cross.v; so it acts at all-layers (4 layers). "
    assert len(notes) == 1 and notes[0].startswith(said)
    for _ in range(2):
        peftcore.apply(residual(), "lora")
    assert caplog.messages == list(notes)  # once in a process
    assert f"note: {notes[0]}" in str(peftcore.plan(residual(), "lora"))


def test_the_methods_own_targets_come_first_and_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    found, notes = planned(transformer(), "lora")
    assert len(found) == 4 and not notes
    peftcore.apply(transformer(), "lora")
    assert not caplog.messages


def test_a_role_that_the_host_lacks_is_no_end_of_a_path() -> None:
    model = perceptron()
    model.add_module("attn", nn.ModuleDict({"q": nn.Linear(4, 4)}))
    found, notes = planned(model, "lora")
    assert "0" in found and "all-layers" in notes[0]
    assert planned(model, "lora", target="attn.q")[0] == ["attn.q"]


def test_what_the_user_names_is_taken_and_nothing_is_said() -> None:
    assert planned(residual(), "lora", target="1.0.conv1") == (["1.0.conv1"], ())
    with pytest.raises(TargetError, match=r"target 'attn\.q' matches nothing"):
        planned(residual(), "lora", target="attn.q")


def test_what_is_excluded_is_not_taken_and_no_alternative_instead() -> None:
    assert planned(residual(), "lora", exclude="*.conv1")[0] == ["1.0.conv2", "1.1.conv2"]
    with pytest.raises(TargetError, match="excludes everything"):
        planned(residual(), "lora", exclude=nn.Conv2d)
    with pytest.raises(TargetError, match="excludes everything"):
        planned(transformer(), "lora", exclude="attn.*")


def test_a_method_without_alternatives_is_an_error() -> None:
    with pytest.raises(TargetError, match=r"target 'attn.core', 'cross.core' matches nothing .* target='all-layers'"):
        planned(residual(), "prefix_tuning")


def test_parts_that_are_left_out_are_said() -> None:
    found, notes = planned(Hybrid(), "lora")
    assert found == ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]
    [note] = notes
    assert "leaves out 1 of 2 blocks (layers.1)" in note and "target='all-layers'" in note
    assert not planned(Hybrid(), "ia3")[1]  # the feed-forward has a gain
    assert not planned(Hybrid(), "lora", target="attn.q")[1]


class Fused(nn.Module):
    """An attention whose fused matrix nobody can tell apart: two readings of its rows are possible."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 12), nn.Linear(8, 8)


def test_what_nobody_can_tell_apart_is_taken_whole() -> None:
    block = {"attn": Fused(), "norm": nn.LayerNorm(8), "mlp": nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))}
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict(block)])})
    found, notes = planned(model, "lora")
    assert found == ["blocks.0.attn.qkv", "blocks.0.attn.proj"]
    assert "the rows of 'attn.q' in 'blocks.0.attn.qkv' are not known" in notes[0] and "acts at attn.*" in notes[0]
    with pytest.raises(TargetError, match="probe"):
        planned(model, "lora", target="attn.q")


def test_the_main_tower_comes_before_other_targets_elsewhere() -> None:
    mixer = transformer(depth=4)
    for layer in mixer.layers:
        layer.self_attn = None
    model = nn.ModuleDict({"text": transformer(), "mixer": mixer})
    resolver = Resolver(model, derive(model), dense_layer)
    assert resolver.host.main_tower() == "mixer"
    taken = default_sites(resolver, ("attn.q", "mlp.up"))
    assert taken.target == "mlp.up" and {site.module_path.partition(".")[0] for site in taken.sites} == {"mixer"}
    assert default_sites(resolver, ("attn.q", "ssm.in")).target == "attn.q"
    assert default_sites(resolver, ("ssm.in", "embed")).target == "embed"  # outside of all blocks
    [taken, left] = planned(model, "lora")[1]
    assert "it acts at mlp.gate, mlp.up, mlp.down (8 layers)" in taken and "leaves out text" in left


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [residual, convolutions, perceptron, transformer])
def test_by_name_alone_they_act(build: Any, method: str) -> None:
    torch.manual_seed(0)
    model = build()
    inputs = {
        residual: lambda: torch.randn(2, 3, 9, 9),
        convolutions: lambda: torch.randn(2, 1, 9, 9),
        perceptron: lambda: torch.randn(2, 4),
        transformer: lambda: torch.arange(6).view(2, 3),
    }[build]()
    before = model(inputs)
    injection = peftcore.apply(model, method)
    peftcore.testing.kit.fill(injection)
    after = model(inputs)
    assert not torch.allclose(before, after)
    after.square().sum().backward()
    assert all(parameter.grad is not None for parameter in injection.parameters())


def test_biases_that_are_not_there_are_an_error_that_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    with pytest.raises(TargetError, match=r"this Sequential has no biases, .* add_missing_bias=True"):
        peftcore.apply(model, "bitfit")
    with pytest.raises(TargetError, match=r"no biases at target='0'"):
        peftcore.apply(model, "bitfit", target="0")
    found = peftcore.apply(model, "bitfit", add_missing_bias=True).operators
    assert found.keys() == {"0.bias", "1.bias", "1"}  # the last of them is a head
