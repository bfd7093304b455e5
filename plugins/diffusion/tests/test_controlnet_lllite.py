"""ControlNet-LLLite beside its authors' code, at layers of three depths."""

from collections.abc import Callable
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, MissingContext, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "controlnet_lllite.json"
MADE = SimpleNamespace(**run_path(str(NUMBERS.with_suffix(".py"))))
AUTHORS = {"repository": "kohya-ss/sd-scripts", "commit": "48d368f", "script": "networks/control_net_lllite.py"}


def edges(model: nn.Module, picture: Tensor) -> dict[str, Tensor]:
    return {"condition": picture.expand(-1, 3, -1, -1).repeat_interleave(4, 2).repeat_interleave(4, 3)}


FAILURES = {
    "every_trainable_tensor_learns-unet": "a constant that is added to all keys of an attention leaves its softmax as "
    "it is, and so does the bias behind the network of keys"
}


@conformance("controlnet_lllite", telling=["unet"], context=edges, expected_failures=FAILURES)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class Attention(nn.Module):
    """The queries of self-attention."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.to_q = layer


class Level(nn.Module):
    """One level of an encoder, as far as its names tell where it is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attn1 = Attention(layer)


class Encoder(nn.Module):
    """Names of a UNet's encoder, with one layer at each of its levels; each is given tokens of its own."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(
            nn.ModuleDict({"attentions": Level(layer), "downsamplers": nn.Identity()}) for layer in layers
        )

    def forward(self, *tokens: Tensor) -> list[Tensor]:
        levels: Any = self.down_blocks
        return [level["attentions"].attn1.to_q(x) for level, x in zip(levels, tokens, strict=True)]


@against("authors", "controlnet_lllite", **AUTHORS)
def test_outputs_and_gradients_are_those_of_the_authors() -> None:
    theirs, made = frozen(NUMBERS), MADE
    layers = [nn.Linear(made.WIDTH, made.OUT).double() for _ in made.DEPTHS]
    for layer in layers:
        made.filled(layer, 0.0)
    model = Encoder(layers).eval().requires_grad_(False)
    options = {"condition_dim": made.CONDITION, "hidden": made.HIDDEN, "scale": made.SCALE}
    injection = peftcore.apply(model, "controlnet_lllite", dtype="float64", **options)
    operators = list(injection.operators.values())
    for operator in operators:
        made.filled(operator, 13.0)  # theirs come in the same order
    given = [made.tokens(depth).requires_grad_() for depth in made.DEPTHS]
    with peftcore.call(model, condition=made.image()):
        outputs = model(*given)
    for output in outputs:
        (output * made.wave(*output.shape, phase=2.0)).sum().backward()
    for depth, output, x, operator in zip(made.DEPTHS, outputs, given, operators, strict=True):
        expected = theirs[str(depth)]
        gradients = [each.grad for each in operator.parameters()]
        found = [output.detach(), x.grad, *gradients]
        assert len(found) == len(expected)
        for one, other in zip(found, expected.values(), strict=True):
            wanted = torch.tensor(other, dtype=torch.float64)
            assert wanted.abs().max() > 1e-6
            torch.testing.assert_close(one.flatten(), wanted, rtol=1e-10, atol=1e-12)
        assert (output - nn.functional.linear(x, layers[0].weight, layers[0].bias)).abs().max() > 1e-2


@against("authors", "controlnet_lllite", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    """Tensors of the same name in all layers together, which the authors' code drew as many of."""
    layers = nn.ModuleList(nn.Linear(MADE.WIDE, 1) for _ in range(MADE.LAYERS))
    model = Encoder([nn.Identity(), nn.Identity(), layers])
    options = {"target": r"re:.*\.to_q\.\d+", "condition_dim": MADE.WIDE, "hidden": MADE.WIDE}
    operators = list(peftcore.apply(model, "controlnet_lllite", **options).operators.values())
    told = frozen(NUMBERS, "start")
    assert told.keys() == {name for name, _ in operators[0].named_parameters()}
    for name, start in told.items():
        same_start(torch.cat([each.get_parameter(name).flatten() for each in operators]), start)


SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "reverse_transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
}


@pytest.fixture
def sdxl() -> Any:
    """A UNet as wide and deep as SDXL's, but for one transformer in each attention of the decoder; without values."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(**SDXL)


def theirs(path: str) -> str:
    """The authors' name of a layer in SDXL: their encoder counts its levels' blocks, and what halves, in one row."""
    place, _, inside = path.partition(".transformer_blocks.")
    _, level, *_, number = place.split(".")
    block = "middle_block_1" if level == "attentions" else f"input_blocks_{3 * int(level) + int(number) + 1}_1"
    return f"lllite_unet_{block}_transformer_blocks_{inside}".replace(".", "_")


@against("authors", "controlnet_lllite", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train(sdxl: Any) -> None:
    """In SDXL, how many numbers for each layer, which tell the depths too."""
    operators = peftcore.apply(sdxl, "controlnet_lllite").operators
    counts = {theirs(path): sum(each.numel() for each in own.parameters()) for path, own in operators.items()}
    assert counts == frozen(NUMBERS, "trains")


@against("authors", "controlnet_lllite", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(Encoder([nn.Linear(2, 2)]), "controlnet_lllite")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def unet() -> tuple[Any, dict[str, Tensor]]:
    pytest.importorskip("diffusers")
    model, inputs = HOSTS["unet"].build()
    return model.eval().requires_grad_(False), inputs


def test_what_it_adapts_by_default_and_what_the_call_says() -> None:
    model, inputs = unet()
    base = model(**inputs).sample
    injection = peftcore.apply(model, "controlnet_lllite")
    assert {path.rpartition("attn")[2] for path in injection.operators} == {"1.to_q", "1.to_k", "1.to_v", "2.to_q"}
    assert {path.partition(".")[0] for path in injection.operators} == {"down_blocks", "mid_block"}
    assert all(not operator.up.weight.any() and operator.up.bias.any() for operator in injection.operators.values())
    with peftcore.call(model, condition=torch.randn(1, 3, 64, 64)):
        moved = model(**inputs).sample
        with peftcore.call(model, condition_scale=0.0):
            assert torch.equal(model(**inputs).sample, base)
    assert (moved - base).abs().max() > 1e-4


def test_what_it_needs() -> None:
    model, inputs = unet()
    with pytest.raises(UnsupportedSite, match="not a matrix in the encoder"):
        peftcore.plan(model, "controlnet_lllite", target="conv_in")
    deep = Encoder([nn.Linear(2, 2) for _ in range(4)])
    with pytest.raises(UnsupportedSite, match="halved 3 times"):
        peftcore.plan(deep, "controlnet_lllite")
    peftcore.apply(model, "controlnet_lllite")
    with pytest.raises(MissingContext, match="condition"):
        model(**inputs)
    with peftcore.call(model, condition=torch.randn(1, 3, 32, 32)), pytest.raises(ConfigError, match="resize"):
        model(**inputs)
