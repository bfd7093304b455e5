"""The adapter of Bapna and Firat, a preset of the serial one: numbers of the adapters package; behind whole blocks, by
hooks on a copy of the host; which blocks it refuses."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_package import assert_same_adapters
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, check_method, frozen
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import without_fast_paths

NUMBERS = Path(__file__).parent / "numbers" / "adapters_package.json"
BLOCKS = {
    "llama": ["model.layers.{}"],
    "bert": ["bert.encoder.layer.{}"],
    "gpt2": ["transformer.h.{}"],
    "t5": ["encoder.block.{}", "decoder.block.{}"],
    "moe": ["model.layers.{}"],
    "vit": ["vit.layers.{}"],
    "encoder": ["encoder.layers.{}"],
}


@pytest.mark.parametrize("name", ["bert", "llama"])
@against(
    "adapters 1.3",
    "houlsby_adapter",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/methods/modeling.py",
)
def test_the_numbers_of_the_adapters_package(name: str) -> None:
    """Its norm in front of the adapter, which stands behind all of the block; with another non-linearity, since all of
    relu's numbers are zero at some place there."""
    assert_same_adapters("residual_adapter_nmt", frozen(NUMBERS)["residual_adapter_nmt"], name, activation="gelu")


def behind(tensors: dict[str, Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        centered = h - h.mean(-1, keepdim=True)
        z = centered / (centered.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        z = z * tensors["norm.weight"] + tensors["norm.bias"]
        inner = (z @ tensors["down.weight"].T + tensors["down.bias"]).clamp_min(0)
        y = h + inner @ tensors["up.weight"].T + tensors["up.bias"]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return hook


@pytest.mark.parametrize("name", BLOCKS)
def test_equation_behind_blocks(name: str) -> None:
    base, inputs = HOSTS[name].build()
    if name == "moe":
        base.set_experts_implementation("eager")  # grouped products of torch have no float64
    base = base.double().eval().requires_grad_(False)
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    model = deepcopy(base)
    injection = peftcore.apply(model, "residual_adapter_nmt", bottleneck=5, dtype="float64")
    places = [place.format(layer) for place in BLOCKS[name] for layer in (0, 1)]
    assert sorted(injection.operators) == sorted(places)
    assert sum(p.numel() for p in injection.parameters()) == len(places) * (2 * 16 * 5 + 5 + 16 + 2 * 16)
    fill(injection)
    before = HOSTS[name].output(base(**inputs))
    copies = {}
    for path in places:
        named = injection.operators[path].named_parameters()
        copies[path] = {key: p.detach().clone().requires_grad_() for key, p in named}
        base.get_submodule(path).register_forward_hook(behind(copies[path]))
    with without_fast_paths():
        ours, expected = (HOSTS[name].output(each(**inputs)) for each in (model, base))
    assert (expected - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_conformance_behind_blocks() -> None:
    results = check_method("residual_adapter_nmt", hosts=["llama", "t5"])
    assert not [str(each) for each in results if each.status == "failed"]


def test_a_block_without_a_sequence_is_refused() -> None:
    model, _ = HOSTS["unet"].build()
    with pytest.raises(UnsupportedSite, match="does not process a sequence"):
        peftcore.apply(model, "residual_adapter_nmt")
    assert not peftcore.injections(model)


@pytest.mark.parametrize("method", ["lora", "parallel_adapter", "pfeiffer_adapter"])
def test_who_cannot_stand_behind_a_block_says_so(method: str) -> None:
    model, _ = HOSTS["llama"].build()
    with pytest.raises(UnsupportedSite, match=r"mlp\.output|branch"):
        peftcore.apply(model, method, target="block")
