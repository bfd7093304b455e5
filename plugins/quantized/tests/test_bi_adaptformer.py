"""Bi-AdaptFormer: the conformance kit; numbers of the authors' code; and its equation on transformers, written a second
time as hooks on a copy of the host, in float64."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from dropped_hosts import assert_same, filled, image_model, rewrite
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths
from peftcore_quantized.bi_adaptformer import normal_codes

NUMBERS = Path(__file__).parent / "numbers" / "bi_adaptformer.json"
CODE: Any = {"repository": "JieShibo/PETL-ViT", "commit": "026e4f1", "script": "binary_adapter/adaptformer.py"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
# A host: of timm, with its options, or of the kit; what its operators' paths end with inside of a block; the modules
# there that read the stream in front of the norm, and that return what the feed-forward returns.
HOSTED: dict[str, tuple[dict[str, Any] | None, str, str, str]] = {
    "vit_tiny_patch16_224": (VIT, "mlp.fc2", "norm2", "mlp"),
    "vit": (None, "mlp.fc2", "layernorm_after", "mlp"),
    "llama": (None, "mlp.down_proj", "post_attention_layernorm", "mlp"),
    "bert": (None, "output.dense", "attention.output.LayerNorm", "output.dense"),
    "encoder": (None, "linear2", "norm1", "linear2"),
}


# The default width is that of a host's feed-forward: the rounded matrices would have the shape of weights.
@conformance("bi_adaptformer", options={"*": {"bottleneck": 5}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_codes_of_the_authors_code(bits: int) -> None:
    codes = normal_codes(bits)
    assert len(codes) == 2**bits
    torch.testing.assert_close(codes, -codes.flip(0), rtol=0, atol=1e-12)
    expected = torch.tensor(frozen(NUMBERS)["codes"][str(bits)], dtype=torch.float64)  # in float32
    torch.testing.assert_close(codes, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bits", [1, 2])
@against("authors", "bi_adaptformer", **CODE)
def test_numbers_of_the_authors_code(bits: int) -> None:
    host = nn.Sequential(nn.Linear(6, 6)).double().eval()
    injection = peftcore.apply(host, "bi_adaptformer", target="0", bottleneck=4, bits=bits, dtype="float64")
    (operator,) = injection.operators.values()
    with torch.no_grad():
        operator.down.copy_(wave(4, 6, step=1.1))
        operator.up.copy_(wave(6, 4, step=0.7))
    x = 5 * wave(1, 2, 6, step=2.1)
    with injection.disabled():
        base = host(x)
    added = host(x) - base
    (added * wave(1, 2, 6, step=2.9)).sum().backward()
    numbers = frozen(NUMBERS)["adapter"][str(bits)]
    for name, ours in {"added": added[0], "up": operator.up.grad, "down": operator.down.grad}.items():
        expected = torch.tensor(numbers[name], dtype=torch.float64)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-9)


@against("authors", "bi_adaptformer", **CODE, part="start")
def test_start_is_the_authors() -> None:
    host, told = nn.Sequential(nn.Linear(768, 768)), frozen(NUMBERS, "start")
    (operator,) = peftcore.apply(host, "bi_adaptformer", target="0", bottleneck=64).operators.values()
    same_start(operator.down, told["down"])
    same_start(operator.up, told["up"])


@against("authors", "bi_adaptformer", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """Both matrices beside each feed-forward; and the head, which `train` names here."""
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 768, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = timm.models.VisionTransformer(**sizes)
    head = {name: each.numel() for name, each in model.named_parameters() if name.startswith("head")}
    injection = peftcore.apply(model, "bi_adaptformer", bottleneck=5, train=["head"])
    trained = {
        f"{path.removesuffix('.mlp.fc2')}.adapter_mlp.adapter_{name}.weight": value.numel()
        for path, operator in injection.operators.items()
        if path.startswith("blocks")
        for name, value in operator.named_parameters()
    }
    assert {**trained, **head} == frozen(NUMBERS, "trains")
    assert sum({**trained, **head}.values()) == sum(each.numel() for each in injection.parameters())


@against("authors", "bi_adaptformer", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(6, 6)), "bi_adaptformer", target="0")
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    if options := HOSTED[name][0]:
        timm = pytest.importorskip("timm")
        model, inputs = timm.create_model(name, num_classes=5, **options), {"x": torch.randn(2, 3, 32, 32)}
    else:
        model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    output = HOSTS[name].output if name in HOSTS else lambda y: y
    return model.double().eval().requires_grad_(False), lambda each: output(each(**inputs))


def rounded(weight: Tensor, bits: int) -> Tensor:
    """The nearest code by its distance; what is added to have it is no affair of gradients."""
    mean = weight.sum() / weight.numel()
    spread = ((weight - mean).square().sum() / (weight.numel() - 1)).sqrt()
    unit, codes = (weight - mean) / (spread + 1e-5), normal_codes(bits)
    nearest = codes[(unit.detach()[..., None] - codes).abs().argmin(-1)]
    return mean + spread * unit + spread * (nearest - unit.detach())


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("name", HOSTED)
def test_equation(name: str, bits: int) -> None:
    """Outputs and gradients, with hooks outside of the matrices at which the operator stands."""
    _, suffix, stream, end = HOSTED[name]
    base, run = host(name)
    model = deepcopy(base)
    options = {"bottleneck": 5, "bits": bits, "scale": 0.7, "dtype": "float64"}
    injection = peftcore.apply(model, "bi_adaptformer", **options)
    for parameter in injection.parameters():
        parameter.data.normal_(0, 0.1)
    with without_fast_paths():
        unchanged = run(base)
        copies = {}
        for path, operator in injection.operators.items():
            tensors = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
            copies[path], read = tensors, []
            block = base.get_submodule(path.removesuffix(f".{suffix}"))
            block.get_submodule(stream).register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))

            def after(module: nn.Module, args: Any, y: Tensor, read: list[Tensor] = read, t: dict = tensors) -> Tensor:
                inner = (read.pop() @ rounded(t["down"], bits).T).clamp(min=0)
                return y + 0.7 * inner @ rounded(t["up"], bits).T

            block.get_submodule(end).register_forward_hook(after)
        ours, expected = run(model), run(base)
    assert len(copies) == 2
    assert difference(expected, unchanged) > 1e-3
    assert difference(ours, expected) <= 1e-10
    for output in (ours, expected):
        output.square().sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            assert difference(p.grad, tensors[key].grad) <= 1e-8


def block_of_the_authors(self: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """binary_adapter/adaptformer.py: neither layer scale nor stochastic depth acts on the adapter."""
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
    adapted = torch.relu(x @ rounded(t["down"], 1).T) @ rounded(t["up"], 1).T
    return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + adapted * 0.7


def test_training_with_dropout_layer_scale_and_stochastic_depth() -> None:
    model, twin, bare = image_model(), image_model(), image_model()
    injection = peftcore.apply(model, "bi_adaptformer", dropout=0.0, bottleneck=3, scale=0.7, dtype="float64")
    copies = filled(injection)
    rewrite(twin, block_of_the_authors, {path.removesuffix(".mlp.fc2"): [each] for path, each in copies.items()})
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


def test_a_fresh_adapter_is_near_the_identity() -> None:
    """Up is rounded to +-0.67 of its deviation: the output changes, by as much as the deviation is small."""
    model, run = host("vit")
    before = run(model)
    injection = peftcore.apply(model, "bi_adaptformer", dtype="float64")
    assert 0 < difference(run(model), before) < 0.05
    for operator in injection.operators.values():
        assert 0.0005 < operator.up.std() < 0.001
        assert operator.up.abs().max() <= 0.002


@pytest.mark.parametrize("scheme", ["nf4", "bnb-nf4", "int8", "torchao-int8"])
def test_beside_packed_matrices(scheme: str) -> None:
    """It acts on activations alone: it reads and adds the same there, and trains."""
    if "-" in scheme:
        pytest.importorskip({"bnb": "bitsandbytes"}.get(scheme.split("-")[0], "torchao"))
    torch.manual_seed(0)
    model, inputs = HOSTS["vit"].build()
    peftcore.quantize(model, scheme)
    injection = peftcore.apply(model, "bi_adaptformer", bottleneck=4, dropout=0.0)
    for parameter in injection.parameters():
        parameter.data.normal_(0, 0.1)
    (path, operator), *_ = injection.operators.items()
    seen: dict[str, Tensor] = {}
    block = model.get_submodule(path.removesuffix(".mlp.fc2"))
    block.layernorm_after.register_forward_pre_hook(lambda module, args: seen.update(stream=args[0]))
    block.mlp.register_forward_hook(lambda module, args, y: seen.update(inner=args[0]))
    block.register_forward_hook(lambda module, args, y: seen.update(y=y))
    HOSTS["vit"].output(model(**inputs)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in injection.parameters())
    with torch.no_grad(), injection.disabled():
        y, stream, inner = seen["y"], seen["stream"], seen["inner"]  # before the hooks see more
        base = stream + block.mlp(inner)
        down, up = rounded(operator.down.double(), 1).float(), rounded(operator.up.double(), 1).float()
        expected = base + torch.relu(stream @ down.T) @ up.T
    assert difference(y, base) > 0.01
    assert difference(y, expected) <= 1e-5


def test_dropout_is_in_the_bottleneck() -> None:
    layer = nn.Sequential(nn.Linear(6, 7)).double().requires_grad_(False)
    options = {"bottleneck": 5, "dropout": 0.5, "dtype": "float64"}
    injection = peftcore.apply(layer, "bi_adaptformer", target="0", **options)
    (operator,) = injection.operators.values()
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones(4, 5, dtype=torch.float64), 0.5)
    inner = torch.relu(x @ rounded(operator.down, 1).T) * kept
    with injection.disabled():
        expected = layer(x) + inner @ rounded(operator.up, 1).T
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="returns as many tokens as it gets"):
        peftcore.plan(nn.Sequential(nn.Conv2d(3, 4, 3)), "bi_adaptformer", target="0")
    with pytest.raises(ConfigError, match="bits"):
        peftcore.apply(nn.Sequential(nn.Linear(3, 3)), "bi_adaptformer", target="0", bits=8)
    with pytest.raises(NotMergeable):
        peftcore.apply(nn.Sequential(nn.Linear(3, 3)), "bi_adaptformer", target="0").merge()
