"""AdaptFormer: the conformance kit; numbers of the authors' code; and its equation on image transformers, written a
second time as hooks on a copy of the host, in float64."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from dropped_hosts import assert_same, filled, image_model, rewrite
from torch import Tensor, nn

import peftcore
from peftcore.errors import NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths

timm = pytest.importorskip("timm")
NUMBERS = Path(__file__).parent / "numbers" / "adaptformer.json"
CODE: Any = {"repository": "ShoufaChen/AdaptFormer", "commit": "6967d67", "script": "models/adapter.py"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
# A host: of timm, with its options, or of the kit; what its operators' paths end with inside of a block; the modules
# there that read the stream in front of the norm, that read what the feed-forward reads, that return what it returns.
HOSTED: dict[str, tuple[dict[str, Any] | None, str, str, str, str]] = {
    "vit_tiny_patch16_224": (VIT, "mlp.fc2", "norm2", "mlp", "mlp"),
    "beit_base_patch16_224": (VIT, "mlp.fc2", "norm2", "mlp", "drop_path2"),  # behind a parameter that scales
    "swin_tiny_patch4_window7_224": (SWIN, "mlp.fc2", "norm2", "mlp", "mlp"),
    "swinv2_tiny_window8_256": (SWIN, "mlp.fc2", "mlp", "mlp", "norm2"),  # the norm stands behind the feed-forward
    "vit": (None, "mlp.fc2", "layernorm_after", "mlp", "mlp"),
    "bert": (None, "output.dense", "attention.output.LayerNorm", "intermediate", "output.dense"),
    "encoder": (None, "linear2", "norm1", "linear1", "linear2"),
}


@conformance("adaptformer")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


@torch.no_grad()
def fill(injection: peftcore.Injection) -> peftcore.Injection:
    for parameter in injection.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def host(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    if options := HOSTED[name][0]:
        model, inputs = timm.create_model(name, num_classes=5, **options), {"x": torch.randn(2, 3, 32, 32)}
        for parameter in model.parameters():  # away from the zeros at which some norms start
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    else:
        model, inputs = HOSTS[name].build()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    output = HOSTS[name].output if name in HOSTS else lambda y: y
    return model.double().eval().requires_grad_(False), lambda each: output(each(**inputs))


@pytest.mark.parametrize("layer_norm", ["none", "in", "out"])
@against("authors", "adaptformer", **CODE)
def test_numbers_of_the_authors_code(layer_norm: str) -> None:
    host = nn.Sequential(nn.Linear(6, 6)).double().eval()
    options = {"bottleneck": 4, "layer_norm": layer_norm, "dtype": "float64"}
    injection = peftcore.apply(host, "adaptformer", target="0", **options)
    operator = injection.operators["0"]
    steps = {"down.weight": 1.1, "down.bias": 1.3, "up.weight": 1.7, "up.bias": 1.9}
    steps |= {"layer_norm.weight": 2.3, "layer_norm.bias": 2.9}
    with torch.no_grad():
        for name, parameter in operator.named_parameters():
            parameter.copy_(wave(*parameter.shape, step=steps[name]) + (name == "layer_norm.weight"))
    x = 5 * wave(1, 2, 6, step=2.1)
    added = host(x)
    with injection.disabled():
        added = added - host(x)
    torch.testing.assert_close(
        added[0], torch.tensor(frozen(NUMBERS)[layer_norm], dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


def block_of_the_authors(self: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    """models/custom_modules.py: the adapter stands beside all that is done to the feed-forward's output."""
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
    adapted = 0.7 * (torch.relu(x @ t["down.weight"].T + t["down.bias"]) @ t["up.weight"].T + t["up.bias"])
    return x + (self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + adapted)


def block_of_before(self: nn.Module, x: Tensor, t: dict[str, Tensor]) -> Tensor:
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
    adapted = 0.7 * (torch.relu(x @ t["down.weight"].T + t["down.bias"]) @ t["up.weight"].T + t["up.bias"])
    inside = self.mlp.fc2(self.mlp.drop1(self.mlp.act(self.mlp.fc1(self.norm2(x)))))
    return x + self.drop_path2(self.ls2(self.mlp.drop2(inside + adapted)))


@pytest.mark.parametrize("joins", ["stream", "matrix"])
def test_training_with_dropout_layer_scale_and_stochastic_depth(joins: str) -> None:
    model, twin, bare = image_model(), image_model(), image_model()
    options = {"bottleneck": 3, "scale": 0.7, "joins": joins, "dtype": "float64"}
    injection = peftcore.apply(model, "adaptformer", dropout=0.0, **options)
    copies = filled(injection)
    block = block_of_the_authors if joins == "stream" else block_of_before
    rewrite(twin, block, {path.removesuffix(".mlp.fc2"): [tensors] for path, tensors in copies.items()})
    if joins == "matrix":  # which layer scale makes small
        for tensors, operator in zip(copies.values(), injection.operators.values(), strict=True):
            for key, p in operator.named_parameters():
                p.data *= 10 if "up" in key else 1
                tensors[key].data *= 10 if "up" in key else 1
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)).double()
    assert_same(injection, copies, (model, twin), lambda each: each(x), bare)


@pytest.mark.parametrize("reads", ["stream", "branch"])
@pytest.mark.parametrize("name", HOSTED)
def test_equation(name: str, reads: str) -> None:
    """Outputs and gradients, with hooks outside of the matrices at which the operator stands."""
    _, suffix, stream, branch, end = HOSTED[name]
    base, run = host(name)
    model = deepcopy(base)
    injection = fill(peftcore.apply(model, "adaptformer", bottleneck=3, scale=0.7, reads=reads, dtype="float64"))
    with without_fast_paths():
        unchanged = run(base)
        copies = {}
        for path, operator in injection.operators.items():
            tensors = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
            copies[path], read = tensors, []
            block = base.get_submodule(path.removesuffix(f".{suffix}"))
            reader = block.get_submodule(stream if reads == "stream" else branch)
            reader.register_forward_pre_hook(lambda module, args, read=read: read.append(args[0]))

            def after(module: nn.Module, args: Any, y: Tensor, read: list[Tensor] = read, t: dict = tensors) -> Tensor:
                inner = (read.pop() @ t["down.weight"].T + t["down.bias"]).clamp(min=0)
                return y + 0.7 * (inner @ t["up.weight"].T + t["up.bias"])

            block.get_submodule(end).register_forward_hook(after)
        ours, expected = run(model), run(base)
    assert len(copies) == (4 if "swin" in name else 2)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for output in (ours, expected):
        output.square().sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 0
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-10)


@against("authors", "adaptformer", **CODE, part="start")
def test_start() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(768, 768)), "adaptformer", target="0")
    told, ours = frozen(NUMBERS, "start"), dict(injection.operators["0"].named_parameters())
    assert ours.keys() == told.keys()
    for name, parameter in ours.items():
        same_start(parameter, told[name])


@against("authors", "adaptformer", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """The adapters, and the head, which `train` names here."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT)
    injection = peftcore.apply(model, "adaptformer", train=["head"])
    *adapters, weight, bias = injection.operators.items()
    ours = {
        f"{path.replace('mlp.fc2', 'adaptmlp')}.{name.replace('.', '_proj.')}": parameter.numel()
        for path, operator in adapters
        for name, parameter in operator.named_parameters()
        if parameter.requires_grad
    }
    ours |= {"head.weight": weight[1].value.numel(), "head.bias": bias[1].value.numel()}
    assert ours == frozen(NUMBERS, "trains")


@against("authors", "adaptformer", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    injection = peftcore.apply(nn.Sequential(nn.Linear(6, 6)), "adaptformer", target="0")
    assert injection.operators["0"].dropout.p == injection.config.dropout
    same_defaults(injection.config, frozen(NUMBERS, "defaults"))


def test_dropout_is_in_the_bottleneck_and_a_learned_scale_starts_at_one() -> None:
    layer = nn.Sequential(nn.Linear(6, 7)).double().requires_grad_(False)
    options = {"bottleneck": 5, "dropout": 0.5, "scale": "learned", "dtype": "float64"}
    injection = peftcore.apply(layer, "adaptformer", target="0", **options)
    (operator,) = injection.operators.values()
    assert operator.scale.tolist() == [1.0]
    fill(injection)
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = layer(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones(4, 5, dtype=torch.float64), 0.5)
    inner = torch.relu(x @ operator.down.weight.T + operator.down.bias) * kept
    with injection.disabled():
        expected = layer(x) + operator.scale * (inner @ operator.up.weight.T + operator.up.bias)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_what_cannot_be_done_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="as many tokens"):
        peftcore.apply(nn.Sequential(nn.Conv2d(3, 4, 3)), "adaptformer", target="0")
    with pytest.raises(UnsupportedSite):
        peftcore.plan(nn.Sequential(nn.Embedding(5, 4)), "adaptformer", target="0")
    with pytest.raises(NotMergeable, match="adaptformer"):
        peftcore.apply(host("vit")[0], "adaptformer").merge()
