"""AIM: the conformance kit; the transformer of the authors' code, with its gradients; its equation in training mode,
written a second time in float64; where the frames' positions are; and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clip_equations import openai_clip
from dropped_hosts import assert_same, filled, image_model, rewrite
from torch import Tensor, nn
from vpt_equations import transformers, wave

import peftcore
from peftcore.errors import RouteError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "aim.json"
AUTHORS: Any = {"repository": "taoyang1122/adapt-image-models", "commit": "b3580d2"}
AUTHORS["script"] = "mmaction/models/backbones/vit_clip.py"
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
PARTS = {"before": "T_Adapter_in", "temporal": "T_Adapter", "spatial": "S_Adapter", "joint": "MLP_Adapter"}


@conformance(
    "aim",
    telling=["vit"],
    options={"*": {"frames": 2}, "task": {"frames": 1}},
    expected_failures={"rows_stay_apart-vit": "rows are frames of one clip, which see each other"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def by_their_names(injection: peftcore.Injection, blocks: int) -> dict[str, Tensor]:
    """What trains, by the names of the authors' code."""
    attentions = [each for path, each in injection.operators.items() if path.endswith("self_attn")]
    joints = [each for path, each in injection.operators.items() if path.endswith("fc2")]
    assert len(attentions) == len(joints) == blocks
    found = {}
    for number, operators in enumerate(zip(attentions, joints, strict=True)):
        for operator in operators:
            for name, parameter in operator.named_parameters():
                part, layer, kind = name.split(".")
                theirs = f"{PARTS[part]}.D_fc{1 if layer == 'down' else 2}.{kind}"
                found[f"transformer.resblocks.{number}.{theirs}"] = parameter
    found["temporal_embedding"] = injection.operators["pre_layrnorm"].times
    found |= {f"ln_post.{k}": injection.operators[p].value for k, p in NORM.items()}
    return found


NORM = {"weight": "post_layernorm", "bias": "post_layernorm.bias"}


@pytest.mark.parametrize(("adapters", "scale"), [(1, 0.5), (2, 1.0)])
@against("authors", "aim", **AUTHORS)
def test_numbers_of_the_authors_code(adapters: int, scale: float) -> None:
    numbers, model = frozen(NUMBERS)[str(adapters)], openai_clip().vision_model
    options = {"frames": 3, "temporal_adapters": adapters, "scale": scale, "dtype": "float64"}
    injection = peftcore.apply(model, "aim", **options)
    trained = by_their_names(injection, 3)
    for name, parameter in trained.items():
        if not name.startswith("ln_post"):  # it starts as the host's
            parameter.data.copy_(wave(parameter.shape, f"visual.{name}"))
    clips = wave((2, 3, 3, 8, 8), "clips").requires_grad_()  # [clips, 3, frames, rows, columns]
    output = model(clips.transpose(1, 2).flatten(0, 1))
    y, features = output.last_hidden_state, output.pooler_output.unflatten(0, (2, 3))
    torch.testing.assert_close(y[:, ::2, ::5], torch.tensor(numbers["y"], dtype=torch.float64), **CLOSE)
    torch.testing.assert_close(features, torch.tensor(numbers["features"], dtype=torch.float64), **CLOSE)
    sums = (y * wave(y.shape, "direction")).sum() + (features * wave(features.shape, "features")).sum()
    found = torch.autograd.grad(sums, [clips, *trained.values()])
    gradients = dict(zip(("pixels", *trained), found, strict=True))
    assert gradients.keys() == numbers["gradients"].keys()
    for name, expected in numbers["gradients"].items():
        mine = gradients[name].flatten()[::7]
        torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9, msg=name)


def adapter(u: Tensor, t: dict[str, Tensor], part: str) -> Tensor:
    inner = u @ t[f"{part}.down.weight"].T + t[f"{part}.down.bias"]
    inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    return inner @ t[f"{part}.up.weight"].T + t[f"{part}.up.bias"]


def drop(z: Tensor, p: float) -> Tensor:
    return z * torch.empty(1, z.shape[1], 1, dtype=z.dtype).bernoulli_(1 - p) / (1 - p) if p else z


def block(self: nn.Module, x: Tensor, times: Tensor | None, t: dict[str, Tensor], p: float) -> Tensor:
    """Of two clips of three frames."""
    _, n, d = x.shape
    if times is not None:
        x = x + times.repeat(2, 1)[:, None]
    y = self.norm1(x).view(2, 3, n, d).permute(0, 2, 1, 3).reshape(2 * n, 3, d)
    y = y + adapter(y, t, "before") if "before.up.bias" in t else y
    z = adapter(self.attn(y), t, "temporal").view(2, n, 3, d).permute(0, 2, 1, 3).reshape(6, n, d)
    x = x + drop(z, p)
    a = self.attn(self.norm1(x))
    x = x + self.drop_path1(self.ls1(a + adapter(a, t, "spatial")))
    y = self.norm2(x)
    return x + self.drop_path2(self.ls2(self.mlp(y))) + drop(0.7 * adapter(y, t, "joint"), p)


@pytest.mark.parametrize("adapters", [1, 2])
def test_equation_in_training(adapters: int) -> None:
    """With dropout, layer scale and stochastic depth of the host, and with that of AIM."""
    model, twin, bare = (image_model(global_pool="avg") for _ in range(3))
    options = {"frames": 3, "scale": 0.7, "drop_path": 0.3, "train_norm": False, "temporal_adapters": adapters}
    injection = peftcore.apply(model, "aim", dtype="float64", **options)
    copies = filled(injection)
    of_block = [copies[f"blocks.{i}.attn"] | copies[f"blocks.{i}.mlp.fc2"] for i in (0, 1)]
    parts = {"blocks.0": [copies["blocks.0"]["times"], of_block[0], 0.0], "blocks.1": [None, of_block[1], 0.3]}
    rewrite(twin, block, parts)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


def test_frames_have_an_order_by_their_positions_alone() -> None:
    model, inputs = HOSTS["vit"].build()
    pixels = torch.randn(6, *inputs["pixel_values"].shape[1:])
    injection = peftcore.apply(model.eval(), "aim", frames=3)
    fill(injection)
    times, turned = injection.operators["vit.layers.0"].times, torch.tensor([2, 0, 1, 3, 4, 5])
    with torch.no_grad():
        ordered = model(pixels[turned]).logits - model(pixels).logits[turned]
        torch.testing.assert_close(model(pixels[3:]).logits, model(pixels).logits[3:])
        times.zero_()
        torch.testing.assert_close(model(pixels[turned]).logits, model(pixels).logits[turned])
    assert ordered[:3].abs().max() > 1e-4


def test_start_is_the_base_model_and_its_size_that_of_the_authors() -> None:
    model, inputs = HOSTS["vit"].build()
    before = model(**inputs).logits
    peftcore.apply(model, "aim", frames=2)
    assert torch.equal(model(**inputs).logits, before)
    with torch.device("meta"):
        large = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert peftcore.plan(large, "aim", frames=32).trainable == 36 * 295_872 + 32 * 768 + 2 * 768


def test_what_is_refused() -> None:
    model, inputs = HOSTS["vit"].build()
    injection = peftcore.apply(model, "aim")
    with pytest.raises(UnsupportedSite, match="2 rows are not a multiple of frames=8"):
        model(**inputs)
    with pytest.raises(RouteError, match="whole batch"):
        peftcore.route(model, [injection.name, None])
    swin: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    with pytest.raises(UnsupportedSite, match="a position for each of its tokens"):
        peftcore.plan(timm.create_model("swin_tiny_patch4_window7_224", **swin), "aim")
    sizes = {"image_size": 8, "patch_size": 4, "num_frames": 2, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 24}
    videos = transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes))
    with pytest.raises(UnsupportedSite, match="patches of single pictures"):
        peftcore.plan(videos, "aim")
    videos = transformers.TimesformerModel(transformers.TimesformerConfig(**sizes))
    with pytest.raises(UnsupportedSite, match="not a norm in front of one attention"):
        peftcore.plan(videos, "aim")


@against("authors", "aim", **AUTHORS, part="start")
def test_start() -> None:
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 640, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.models.vision_transformer.VisionTransformer(**sizes)
    operators = peftcore.apply(model, "aim", frames=3, temporal_adapters=2, train_norm=False).operators
    found = {"temporal_embedding": operators["blocks.0"].times}
    for path in ("blocks.0.attn", "blocks.0.mlp.fc2"):
        for name, parameter in operators[path].named_parameters():
            part, layer, kind = name.split(".")
            number = 1 if layer == "down" else 2
            found[f"transformer.resblocks.0.{PARTS[part]}.D_fc{number}.{kind}"] = parameter
    told = frozen(NUMBERS, "start")
    assert found.keys() == told.keys()
    for name, parameter in found.items():
        same_start(parameter, told[name])


@against("authors", "aim", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    injection = peftcore.apply(openai_clip().vision_model, "aim", frames=3)
    trained = by_their_names(injection, 3)
    assert {id(each) for each in trained.values()} == {id(each) for each in injection.parameters()}
    ours = {name: parameter.numel() for name, parameter in trained.items() if parameter.requires_grad}
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "aim", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(openai_clip().vision_model, "aim").config
    frames = "8, the default of the authors' block; this configuration has 32"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"frames": frames})
