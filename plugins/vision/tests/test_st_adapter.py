"""ST-Adapter: the conformance kit; the transformer of the authors' code, with its gradients; its equation in training
mode and in windows, written a second time; how frames are told; and what is refused."""

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
from peftcore.errors import ConfigError, RouteError, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.kit import fill

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "st_adapter.json"
AUTHORS = {"repository": "linziyi96/st-adapter", "commit": "b914b38", "script": "models_adapter.py"}
PARTS = {"down": "fc1", "up": "fc2"}
KERNELS = {"both": (3, 3, 1), "attention": (3, 1, 1), "feed-forward": (1, 3, 5)}
CLOSE = {"rtol": 1e-9, "atol": 1e-11}
FRAMES = "rows are frames of one clip, which see each other"


@conformance(
    "st_adapter",
    telling=["vit", "encoder"],
    options={"*": {"frames": 2}, "encoder": {"frames": 2, "grid": (1, 1)}, "task": {"frames": 1}},
    expected_failures={
        "rows_stay_apart-vit": FRAMES,
        "rows_stay_apart-encoder": FRAMES,
        "every_trainable_tensor_learns-vit": "what joins patches in front of the last feed-forward reaches no class "
        "token, which alone the head reads",
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def of_theirs(name: str) -> str:
    """The name of a tensor of a block's adapters in the authors' code."""
    place, layer, kind = name.split(".")
    names = {"attention": "adapter_pre_attn", "feed_forward": "adapter_pre_mlp"}
    return f"{names[place]}.{PARTS.get(layer, layer)}.{kind}"


@pytest.mark.parametrize("before", KERNELS)
@against("authors", "st_adapter", **AUTHORS)
def test_numbers_of_the_authors_code(before: str) -> None:
    numbers, model = frozen(NUMBERS)[before], openai_clip().vision_model
    options = {"before": before, "kernel": KERNELS[before], "frames": 3, "bottleneck": 6, "dtype": "float64"}
    injection = peftcore.apply(model, "st_adapter", **options)
    adapters: dict[str, Tensor] = {}
    for number, operator in enumerate(injection.operators.values()):
        for name, parameter in operator.named_parameters():
            theirs = f"transformer.resblocks.{number}.{of_theirs(name)}"
            adapters[theirs] = parameter
            parameter.data.copy_(wave(parameter.shape, f"visual.{theirs}"))
    clips = wave((2, 3, 3, 8, 8), "clips").requires_grad_()  # [clips, 3, frames, rows, columns]
    y = model(clips.transpose(1, 2).flatten(0, 1)).last_hidden_state
    torch.testing.assert_close(y[:, ::2, ::5], torch.tensor(numbers["y"], dtype=torch.float64), **CLOSE)
    found = torch.autograd.grad((y * wave(y.shape, "direction")).sum(), [clips, *adapters.values()])
    gradients = dict(zip(("pixels", *adapters), found, strict=True))
    assert gradients.keys() == numbers["gradients"].keys()
    for name, expected in numbers["gradients"].items():
        mine = gradients[name].flatten()[::7]
        torch.testing.assert_close(mine, torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9, msg=name)


def small(**options: Any) -> Any:
    """Returns an injection in a transformer of three blocks, 16 wide."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    return peftcore.apply(timm.models.VisionTransformer(**sizes), "st_adapter", **options)


@against("authors", "st_adapter", **AUTHORS, part="start")
def test_start_is_the_authors() -> None:
    told, operator = frozen(NUMBERS, "start"), small(bottleneck=2500).operators["blocks.0"]
    ours = {of_theirs(name): each for name, each in operator.named_parameters()}
    for name, start in told.items():
        for place in ("adapter_pre_attn", "adapter_pre_mlp"):
            same_start(ours.pop(f"{place}.{name}"), start)
    assert not ours


@against("authors", "st_adapter", **AUTHORS, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head, which is another one there, and which `train` names here."""
    injection = small(train=["head"])
    found = {f"fc.{name}": each.numel() for name, each in injection.model.head.named_parameters()}
    for number in range(3):
        for name, each in injection.operators[f"blocks.{number}"].named_parameters():
            found[f"transformer.resblocks.{number}.{of_theirs(name)}"] = each.numel()
    assert found == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "st_adapter", **AUTHORS, part="defaults")
def test_defaults_are_the_authors() -> None:
    same_defaults(small().config, frozen(NUMBERS, "defaults"))


def added(x: Tensor, t: dict[str, Tensor], name: str, frames: int, prefix: int) -> Tensor:
    """What one adapter adds to [rows, tokens, features] of square pictures: the convolution as a sum over places."""
    t = {key.removeprefix(f"{name}."): value for key, value in t.items() if key.startswith(f"{name}.")}
    side = round((x.shape[1] - prefix) ** 0.5)
    u = (x[:, prefix:] @ t["down.weight"].T + t["down.bias"]).reshape(-1, frames, side, side, len(t["conv.bias"]))
    seen = torch.zeros_like(u) + t["conv.bias"]
    kernel = t["conv.weight"][:, 0]  # [h, frames, rows, columns]
    for place in torch.cartesian_prod(*(torch.arange(size) for size in kernel.shape[1:])):
        moved = u
        for dim, (step, size) in enumerate(zip(place.tolist(), kernel.shape[1:], strict=True), start=1):
            shift = step - size // 2
            index = torch.arange(u.shape[dim]) + shift
            inside = (index >= 0) & (index < u.shape[dim])
            mask = inside.to(u.dtype).view([-1 if d == dim else 1 for d in range(5)])
            moved = moved.index_select(dim, index.clamp(0, u.shape[dim] - 1)) * mask
        seen = seen + moved * kernel[(slice(None), *place.tolist())]
    patches = seen.reshape(len(x), -1, len(t["conv.bias"])) @ t["up.weight"].T + t["up.bias"]
    return torch.cat([torch.zeros_like(x[:, :prefix]), patches], 1)


def block(self: nn.Module, x: Tensor, t: dict[str, Tensor], before: str) -> Tensor:
    x = x + (added(x, t, "attention", 3, 1) if before != "feed-forward" else 0)
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
    x = x + (added(x, t, "feed_forward", 3, 1) if before != "attention" else 0)
    return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


@pytest.mark.parametrize("before", KERNELS)
def test_equation_in_training(before: str) -> None:
    """With dropout, layer scale and stochastic depth of the host, which the adapters are in front of."""
    model, twin, bare = (image_model(global_pool="avg") for _ in range(3))
    options = {"frames": 3, "bottleneck": 4, "kernel": (3, 1, 3), "before": before, "dtype": "float64"}
    injection = peftcore.apply(model, "st_adapter", **options)
    copies = filled(injection)
    rewrite(twin, block, {path: [tensors, before] for path, tensors in copies.items()})
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


def test_stream_of_windows_is_whole() -> None:
    """What an adapter adds in Swin is seen by whole frames, not by windows."""
    torch.manual_seed(0)
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "num_classes": 5}
    model = timm.create_model("swin_tiny_patch4_window7_224", **sizes).double().eval()
    options = {"frames": 2, "bottleneck": 3, "kernel": (3, 3, 3), "dtype": "float64"}
    injection = peftcore.apply(model, "st_adapter", **options)
    t, own = filled(injection)["layers.0.blocks.1"], model.layers[0].blocks[1]
    x = torch.randn(4, 8, 8, 16, dtype=torch.float64)
    ours = own(x)
    with injection.disabled():
        stream = x + added(x.flatten(1, 2), t, "attention", 2, 0).view_as(x)
        stream = stream + own._attn(own.norm1(stream))
        stream = stream + added(stream.flatten(1, 2), t, "feed_forward", 2, 0).view_as(x)
        expected = stream + own.mlp(own.norm2(stream))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def test_frames_are_an_option_or_told() -> None:
    model, inputs = HOSTS["vit"].build()
    pixels = torch.randn(6, *inputs["pixel_values"].shape[1:])
    injection = peftcore.apply(model, "st_adapter", frames=3, bottleneck=4)
    fill(injection)
    with torch.no_grad():
        three = model(pixels).logits
        clip = model(pixels[3:]).logits
        with peftcore.call(model, frames=2):
            told = model(pixels).logits
        injection.remove()
        fill(peftcore.apply(model, "st_adapter", frames=2, bottleneck=4))
        two = model(pixels).logits
    torch.testing.assert_close(three[3:], clip)
    torch.testing.assert_close(told, two)
    assert not torch.allclose(two, three, atol=1e-4)


def test_start_is_the_base_model_and_its_size_that_of_the_authors() -> None:
    model, inputs = HOSTS["vit"].build()
    before = model(**inputs).logits
    peftcore.apply(model, "st_adapter", frames=2)
    assert torch.equal(model(**inputs).logits, before)
    with torch.device("meta"):
        large = timm.create_model("vit_base_patch16_224", num_classes=0)
    assert peftcore.plan(large, "st_adapter").trainable == 24 * 592_512


def test_what_is_refused() -> None:
    model, inputs = HOSTS["vit"].build()
    injection = peftcore.apply(model, "st_adapter")
    with pytest.raises(UnsupportedSite, match="2 rows are not a multiple of frames=8"):
        model(**inputs)
    with peftcore.call(model, frames="two"), pytest.raises(ConfigError, match="not a number of frames"):
        model(**inputs)
    with pytest.raises(RouteError, match="whole batch"):
        peftcore.route(model, [injection.name, None])
    with pytest.raises(ConfigError, match="no centre"):
        peftcore.plan(model, "st_adapter", kernel=(2, 1, 1))
    with pytest.raises(UnsupportedSite, match="no grid"):
        peftcore.plan(HOSTS["bert"].build()[0], "st_adapter")


def test_rows_that_are_no_frames_are_refused() -> None:
    """TimeSformer puts the frames of a clip into one row behind the convolution."""
    sizes = {"image_size": 8, "patch_size": 4, "num_frames": 2, "hidden_size": 16, "num_hidden_layers": 1}
    config = transformers.TimesformerConfig(**sizes, num_attention_heads=2, intermediate_size=24)
    model = transformers.TimesformerModel(config).eval()
    peftcore.apply(model, "st_adapter", frames=2, before="attention")
    with pytest.raises(UnsupportedSite, match="one whole frame"):
        model(torch.randn(2, 2, 3, 8, 8))
