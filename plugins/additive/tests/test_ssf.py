"""SSF: the kit; numbers of the authors' vision transformer, which without scales and shifts is timm's; the equation on
other layers, and norms that multiply by 1 + w."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_start
from peftcore.testing.hosts import HOSTS, stir
from peftcore.testing.kit import fill


# What is added to all keys alike changes no softmax: only rounding moves it, and in this host not far enough to show
# beside a number that is not zero.
@conformance("ssf", options={"unet": {"init_std": 0.0}})
def test_ssf(check: Callable[[], None]) -> None:
    check()


def wave(shape: tuple[int, ...], k: float) -> Tensor:
    size = torch.Size(shape).numel()
    return torch.sin(torch.arange(size, dtype=torch.float64) * k + k).view(shape)


PLACES = ["patch_embed.proj", "norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2", "norm"]
NUMBERS = Path(__file__).parent / "numbers" / "ssf.json"
CODE: Any = {"repository": "dongzelian/SSF", "commit": "0135361", "script": "models/vision_transformer.py"}


@torch.no_grad()
def vision_transformer() -> nn.Module:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 4, "patch_size": 2, "in_chans": 2, "embed_dim": 8, "mlp_ratio": 1.5, "num_classes": 3}
    model = timm.models.vision_transformer.VisionTransformer(**sizes, depth=1, num_heads=2).double().eval()
    for index, parameter in enumerate(model.parameters()):
        parameter.copy_(wave(tuple(parameter.shape), 0.37 + 0.11 * index))
    return model


@against("authors", "ssf", **CODE)
def test_the_authors_numbers() -> None:
    """Outputs, and gradients of the first scale and of a norm's shift; the head is left out, all else is adapted."""
    model, x, numbers = vision_transformer(), wave((2, 2, 4, 4), 0.23), frozen(NUMBERS)
    base = model(x)
    operators = peftcore.apply(model, "ssf", dtype="float64").operators
    assert [path.removeprefix("blocks.0.") for path in operators] == PLACES
    with torch.no_grad():
        for index, operator in enumerate(operators.values()):
            operator.gain.copy_(1 + wave(operator.gain.shape, 0.29 + 0.07 * index))
            operator.shift.copy_(wave(operator.shift.shape, 0.53 + 0.05 * index))
    y = model(x)
    y.square().sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["outputs"], abs=1e-10)
    assert operators["patch_embed.proj"].gain.grad.tolist() == pytest.approx(numbers["scale"], abs=1e-10)
    assert operators["blocks.0.norm2"].shift.grad.tolist() == pytest.approx(numbers["shift"], abs=1e-10)
    assert (y - base).abs().max() > 1


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "conv1d-of-transformers": (lambda: Conv1D(5, 6), (3, 6)),
    "grouped": (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), (2, 4, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(9, 5), (2, 3)),
    "layer-norm": (lambda: nn.LayerNorm(6, bias=False), (3, 6)),
    "group-norm": (lambda: nn.GroupNorm(2, 6), (2, 6, 4)),
    "batch-norm": (lambda: nn.BatchNorm2d(6), (2, 6, 3, 3)),
    "rms-norm": (lambda: nn.RMSNorm(6), (3, 6)),
    "llama-norm": (lambda: LlamaRMSNorm(6), (3, 6)),
    "gemma-norm": (lambda: GemmaRMSNorm(6), (3, 6)),
}
CHANNELS_FIRST = {"grouped", "transposed", "group-norm", "batch-norm"}


@pytest.mark.parametrize("name", LAYERS)
def test_equation_on_layers(name: str) -> None:
    """gamma * y + beta of what the layer gave, by its own forward; merged the same."""
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    model = stir(nn.Sequential(build())).double().requires_grad_(False).eval()
    x = torch.randint(9, shape) if name == "embedding" else torch.randn(shape).double()
    before = model(x)
    injection = peftcore.apply(model, "ssf", target="0", dtype="float64")
    fill(injection)
    (operator,) = injection.operators.values()
    assert (operator.shift is None) == name.endswith(("rms-norm", "llama-norm", "gemma-norm"))
    line = [1, -1, *[1] * (before.dim() - 2)] if name in CHANNELS_FIRST else [-1]
    shift = torch.zeros(1).double() if operator.shift is None else operator.shift.view(line)
    expected = before * operator.gain.view(line) + shift
    # transformers' norms are computed in float32
    tolerance = 1e-6 if name in ("llama-norm", "gemma-norm") else 1e-12
    torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)
    injection.merge()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=tolerance)
    assert (expected - before).abs().max() > 0.01


def test_experts_are_scaled_each_by_its_own() -> None:
    model, _ = HOSTS["moe"].build()
    injection = peftcore.apply(model, "ssf", target="experts.down", dtype="float64")
    fill(injection)
    path = "model.layers.0.mlp.experts.down_proj"
    operator: Any = injection.operators[path]
    before = model.get_parameter(path).clone()
    assert operator.gain.shape == (3, 16) and operator.shift is None
    injection.merge()
    torch.testing.assert_close(model.get_parameter(path).double(), before * operator.gain[..., None], rtol=0, atol=1e-7)


def test_what_is_adapted_of_itself() -> None:
    """No head, no router, no table, and no norm that has no weight; all of them but the last where they are named."""
    model, _ = HOSTS["moe"].build()
    paths = set(peftcore.apply(model, "ssf").operators)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.norm", "model.layers.1.self_attn.o_proj"} <= paths
    others = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.gate"]
    assert not paths & set(others)
    named = peftcore.apply(model, "ssf", target=others, name="named").operators
    assert set(named) == set(others) and named["model.layers.0.mlp.gate"].shift is None
    bare = nn.LayerNorm(4, elementwise_affine=False)
    plain = nn.Sequential(nn.Linear(4, 4), bare, nn.Conv1d(4, 4, 1), nn.Linear(4, 4))
    assert {"0", "2"} <= set(peftcore.apply(plain, "ssf").operators) <= {"0", "2", "3"}
    with pytest.raises(UnsupportedSite, match="no tensor"):
        peftcore.plan(plain, "ssf", target="1")


@against("authors", "ssf", **CODE, part="start")
def test_start() -> None:
    """The authors' draw."""
    operator: Any = peftcore.apply(nn.Sequential(nn.Linear(2, 40000)), "ssf", target="0").operators["0"]
    told = frozen(NUMBERS, "start")
    same_start(operator.gain, told["gain"])
    same_start(operator.shift, told["shift"])


@against("authors", "ssf", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The scales and shifts of all places, and the head, which `train` names here."""
    told, injection = frozen(NUMBERS, "trains"), peftcore.apply(vision_transformer(), "ssf", train=["head"])
    *operators, weight, bias = injection.operators.values()
    assert [value.numel() for each in operators for value in each.parameters()] == told["sizes"]
    assert [weight.value.numel(), bias.value.numel()] == [3 * 8, 3] and told["besides"] == ["head.weight", "head.bias"]
