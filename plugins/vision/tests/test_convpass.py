"""Convpass: the conformance kit; numbers of the authors' code; its equation on image models, written a second time as
hooks on a copy of the host, in float64; and where the patches lie."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from dropped_hosts import assert_same, filled, rewrite
from dropped_hosts import image_model as dropped_model
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

timm = pytest.importorskip("timm")
SQUARE = {"grid": (1, 1)}

NUMBERS = Path(__file__).parent / "numbers" / "convpass.json"
CODE: Any = {"repository": "JieShibo/PETL-ViT", "commit": "026e4f1", "script": "convpass/vtab/convpass.py"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
NEXT = {"dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}
# A host, its options, how many tokens stand in front of the patches, and how many bypasses there are.
HOSTED: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit_tiny_patch16_224": (VIT, 1, 4),
    "deit_tiny_distilled_patch16_224": (VIT, 2, 4),
    "beit_base_patch16_224": (VIT, 1, 4),  # reads the weight of qkv, which is not called
    "swin_tiny_patch4_window7_224": (SWIN, 0, 8),  # the attentions read windows of four by four
    "convnext_atto": (NEXT, 0, 4),  # [batch, channels, rows, columns] and 1x1 convolutions
    "convnextv2_atto": (NEXT, 0, 4),  # [batch, rows, columns, features]
    "vit": ({}, 1, 4),  # of transformers
}


@conformance(
    "convpass",
    telling=["vit", "unet"],
    options={"mlp": SQUARE, "encoder": SQUARE, "unet": {"bottleneck": 7}},  # 8 is the width of weights there
    expected_failures={
        "leading_dimensions_do_not_matter-mlp": "rows and columns of the patches are dimensions, and they matter"
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def image_model(name: str, **changes: Any) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    if name in HOSTS:
        model, inputs = HOSTS[name].build()
    else:
        model = timm.create_model(name, num_classes=5, **{**HOSTED[name][0], **changes})
        inputs = {"x": torch.randn(2, 3, *changes.get("img_size", (32, 32)))}
        for parameter in model.parameters():  # away from the zeros and the tiny scales at which some start
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {key: value.double() for key, value in inputs.items()}
    output = HOSTS[name].output if name in HOSTS else lambda y: y
    return model.double().eval().requires_grad_(False), lambda each: output(each(**inputs))


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "convpass", bottleneck=3, scale=0.7, dtype="float64", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def quick_gelu(u: Tensor) -> Tensor:
    return u / (1 + torch.exp(-1.702 * u))


def equation(x: Tensor, t: dict[str, Tensor], prefix: int, wide: float) -> Tensor:
    """Of [batch, tokens, features] or [batch, rows, columns, features]; the convolution as nine shifted products."""
    u = quick_gelu(x @ t["down.weight"].T + t["down.bias"])
    front, patches = (u[:, :prefix], u[:, prefix:]) if x.dim() == 3 else (u[:, :0, 0], u)
    rows = round(math.sqrt(patches.flatten(1, -2).shape[1] / wide))
    grid = patches.reshape(len(u), rows, -1, u.shape[-1])
    around = nn.functional.pad(grid, (0, 0, 1, 1, 1, 1))
    shifted = [(i, j, around[:, i : i + grid.shape[1], j : j + grid.shape[2]]) for i in range(3) for j in range(3)]
    seen = t["conv.bias"] + sum(each @ t["conv.weight"][:, :, i, j].T for i, j, each in shifted)
    alone = front @ t["conv.weight"][:, :, 1, 1].T + t["conv.bias"]
    whole = torch.cat([alone, seen.flatten(1, 2)], 1).reshape(*x.shape[:-1], -1)
    return 0.7 * (quick_gelu(whole) @ t["up.weight"].T + t["up.bias"])


# Hosts that scale the output of a branch by a parameter: where that ends, by the branch.
ENDS = {"beit_base_patch16_224": {"attn": "drop_path1", "mlp": "drop_path2"}, "convnext_atto": {"mlp": "drop_path"}}


def end_of(base: nn.Module, path: str, ends: dict[str, str]) -> nn.Module:
    block, branch, _ = path.rsplit(".", 2)
    return base.get_submodule(f"{block}.{ends[branch]}")


def compare(name: str, prefix: int, wide: float = 1.0, changes: Any = None, **options: Any) -> int:
    """Outputs and gradients of the equation beside each attention and feed-forward; how many there were."""
    base, run = image_model(name, **(changes or {}))
    model = deepcopy(base)
    injection = apply(model, **options)
    unchanged = run(base)
    copies = {}
    for path, operator in injection.operators.items():
        tensors = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
        branch, last = base.get_submodule(path.rpartition(".")[0]), base.get_submodule(path)
        first, copies[path], read = isinstance(last, nn.Conv2d), tensors, []
        behind = name == "convnext_atto"  # channels are first where the branch ends
        branch.register_forward_pre_hook(
            lambda m, args, kwargs, read=read: read.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )

        def after(module: nn.Module, args: Any, y: Tensor, read=read, t=tensors, first=first, behind=behind) -> Tensor:
            x = read.pop().movedim(1, -1) if first else read.pop()
            added = equation(x, t, prefix, wide)
            return y + (added.movedim(-1, 1) if first or behind else added)

        (last if name not in ENDS else end_of(base, path, ENDS[name])).register_forward_hook(after)
    ours, expected = run(model), run(base)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for output in (ours, expected):
        output.square().sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-10)
    return len(copies)


@pytest.mark.parametrize(
    ("shape", "channels", "places", "host"),
    [
        ((1, 197, 6), 8, [0, 1, 14, 100, 196], "vit"),
        ((2, 9, 6), 4, [0, 4, 8], "swin"),
        ((2, 3, 3, 6), 4, [0, 4, 8], "swin"),
    ],
)
@against("authors", "convpass", **CODE)
def test_numbers_of_the_authors_code(shape: tuple[int, ...], channels: int, places: list[int], host: str) -> None:
    layer = nn.Sequential(nn.Linear(6, 6)).double().eval()
    options = {"bottleneck": channels, "scale": 3.0, "dtype": "float64", **SQUARE}
    injection = peftcore.apply(layer, "convpass", target="0", **options)
    steps = {"down.weight": 1.1, "down.bias": 1.3, "up.weight": 1.7, "up.bias": 1.9}
    steps |= {"conv.weight": 2.3, "conv.bias": 2.9}
    with torch.no_grad():
        for name, parameter in injection.operators["0"].named_parameters():
            parameter.copy_(wave(*parameter.shape, step=steps[name]))
    x = 5 * wave(*shape, step=2.1)
    added = layer(x)
    with injection.disabled():
        added = (added - layer(x))[-1].flatten(0, -2)[places, :4]
    torch.testing.assert_close(added, torch.tensor(frozen(NUMBERS)[host], dtype=torch.float64), rtol=1e-10, atol=1e-12)


@against("authors", "convpass", **CODE, part="start")
def test_start() -> None:
    layer, told = nn.Sequential(nn.Linear(768, 768)), frozen(NUMBERS, "start")
    operator = peftcore.apply(layer, "convpass", target="0", bottleneck=80, conv_init="xavier", **SQUARE).operators["0"]
    ours = dict(operator.named_parameters())
    other = peftcore.apply(layer, "convpass", target="0", name="other", **SQUARE).operators["0"]
    same_start(other.conv.weight, told.pop("identity"))
    assert ours.keys() == told.keys()
    for name, parameter in ours.items():
        same_start(parameter, told[name])


@against("authors", "convpass", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The bypasses, and the head, which `train` names here."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **{**VIT, "embed_dim": 768})
    *bypasses, weight, bias = peftcore.apply(model, "convpass", train=["head"]).operators.items()
    names = {"attn.proj": "adapter_attn", "mlp.fc2": "adapter_mlp"}
    ours = {"head.weight": weight[1].value.numel(), "head.bias": bias[1].value.numel()}
    for path, operator in bypasses:
        (theirs,) = (each for end, each in names.items() if path.endswith(end))
        block = ".".join(path.split(".")[:2])
        trained = {name: each for name, each in operator.named_parameters() if each.requires_grad}
        ours |= {f"{block}.{theirs}.adapter_{name}": each.numel() for name, each in trained.items()}
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "convpass", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(image_model("vit_tiny_patch16_224")[0], "convpass")
    assert {each.dropout.p for each in injection.operators.values()} == {injection.config.dropout}
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def block_of_the_authors(self: nn.Module, x: Tensor, attn: dict[str, Tensor], mlp: dict[str, Tensor]) -> Tensor:
    """convpass/vtab/convpass.py: stochastic depth drops the bypass by a draw of its own; layer scale is not there."""
    read = self.norm1(x)
    x = x + self.drop_path1(self.ls1(self.attn(read))) + self.drop_path1(equation(read, attn, 1, 1.0))
    read = self.norm2(x)
    return x + self.drop_path2(self.ls2(self.mlp(read))) + self.drop_path2(equation(read, mlp, 1, 1.0))


def test_training_with_dropout_layer_scale_and_stochastic_depth() -> None:
    model, twin, bare = dropped_model(), dropped_model(), dropped_model()
    injection = peftcore.apply(model, "convpass", dropout=0.0, bottleneck=3, scale=0.7, dtype="float64")
    copies = filled(injection)
    parts = {f"blocks.{i}": [copies[f"blocks.{i}.{each}"] for each in ("attn.proj", "mlp.fc2")] for i in (0, 1)}
    rewrite(twin, block_of_the_authors, parts)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


@pytest.mark.parametrize("name", HOSTED)
def test_equation_on_image_models(name: str) -> None:
    _, prefix, bypasses = HOSTED[name]
    assert compare(name, prefix, prefix_tokens=2 if "distilled" in name else None) == bypasses


@pytest.mark.parametrize("options", [{}, {"prefix_tokens": 1}, {"grid": (2, 4)}])
def test_grid_has_the_proportions_of_the_image(options: dict[str, Any]) -> None:
    """Two rows of four patches behind a class token; a square would be three by three."""
    compare("vit_tiny_patch16_224", 1, 2.0, {"img_size": (16, 32)}, **options)


def test_start_is_the_identity_or_xavier() -> None:
    for start in ("identity", "xavier"):
        model, run = image_model("vit_tiny_patch16_224")
        before = run(model)
        injection = peftcore.apply(model, "convpass", conv_init=start, dtype="float64")
        assert torch.equal(run(model), before)
        operator = injection.operators["blocks.1.mlp.fc2"]
        x = torch.randn(1, 8, 4, 4, dtype=torch.float64)
        assert torch.equal(operator.conv(x), x) == (start == "identity")
        assert operator.down.weight.abs().max() <= math.sqrt(6 / (24 + 8))
        assert sum(p.numel() for p in injection.parameters()) == 4 * (2 * 24 * 8 + 8 + 24 + 9 * 8 * 8 + 8)


def test_what_has_no_grid_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="no grid"):
        peftcore.plan(HOSTS["bert"].build()[0], "convpass")
    model, run = image_model("vit_tiny_patch16_224")
    injection = apply(model, prefix_tokens=4)  # of 17 tokens
    with pytest.raises(UnsupportedSite, match="17 tokens with 4 in front"):
        run(model)
    injection.remove()
    sequence_first = nn.Sequential(nn.MultiheadAttention(6, 2))
    with pytest.raises(UnsupportedSite, match="batch_first"):
        peftcore.apply(sequence_first, "convpass", target="0", **SQUARE)


def test_rows_are_routed_where_an_attention_reads_a_weight_by_itself() -> None:
    model, run = image_model("beit_base_patch16_224")
    with torch.no_grad():
        base = run(model)
        apply(model, name="one")
        adapted = run(model)
        with peftcore.route(model, ["one", None]):
            routed = run(model)
    assert not torch.allclose(adapted, base, atol=1e-4)
    torch.testing.assert_close(routed, torch.stack([adapted[0], base[1]]))
