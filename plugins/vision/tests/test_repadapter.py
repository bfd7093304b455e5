"""RepAdapter: the conformance kit; numbers of the authors' code, merged ones too; and its equation on image
transformers, written a second time as hooks on a copy of the host, in float64."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.roles import derive, probe
from peftcore.testing import against, conformance, frozen, same_defaults, same_start
from peftcore.testing.hosts import HOSTS

timm = pytest.importorskip("timm")

NUMBERS = Path(__file__).parent / "numbers" / "repadapter.json"
CODE: Any = {"repository": "luogen1996/RepAdapter", "commit": "360992f", "script": "repadapter.py"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
NEXT = {"dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}
# A host and its options; the modules in front of whose whole input an adapter stands, by the ends of operators' paths.
HOSTED: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "vit_tiny_patch16_224": (VIT, {"attn.qkv": "attn", "mlp.fc1": "mlp"}),
    "eva02_base_patch14_224": (VIT, {"attn.q_proj": "attn", "mlp.fc1_g": "mlp"}),
    "swin_tiny_patch4_window7_224": (SWIN, {"attn.qkv": "attn", "mlp.fc1": "mlp"}),
    "convnext_atto": (NEXT, {"mlp.fc1": "mlp"}),  # 1x1 convolutions
    "vit": ({}, {"attention.q_proj": "attention", "mlp.fc1": "mlp"}),  # of transformers
}
SHARED = "queries, keys and values share one adapter, which has the path of the first of them that is targeted"
SEPARATE = ("llama", "bert", "t5", "moe", "mistral", "vit", "unet", "dit")


@conformance(
    "repadapter", expected_failures={f"the_start_depends_on_seed_and_path-{host}": SHARED for host in SEPARATE}
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def image_model(name: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(0)
    if name in HOSTS:
        model, inputs = HOSTS[name].build()
    else:
        model = timm.create_model(name, num_classes=5, **HOSTED.get(name, (VIT, {}))[0])
        inputs = {"x": torch.randn(2, 3, 32, 32)}
        for parameter in model.parameters():  # away from the zeros and the tiny scales at which some start
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {key: value.double() for key, value in inputs.items()}
    output = HOSTS[name].output if name in HOSTS else lambda y: y
    return model.double().eval().requires_grad_(False), lambda each: output(each(**inputs))


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    options = {"bottleneck": 4, "scale": 0.7, "dtype": "float64", **options}
    injection = peftcore.apply(model, "repadapter", **options)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def adapted(x: Tensor, t: dict[str, Tensor], groups: int = 2) -> Tensor:
    """s (G (A x + a) + b) + x over the last dimension, G written out."""
    G = torch.block_diag(*t["B"].chunk(groups))
    return x + 0.7 * ((x @ t["A"].T + t["a"]) @ G.T + t["b"])


@against("authors", "repadapter", **CODE)
def test_numbers_of_the_authors_code() -> None:
    """Behind the adapter, and what merging writes into the matrix."""
    numbers = {name: torch.tensor(value, dtype=torch.float64) for name, value in frozen(NUMBERS).items()}
    host = nn.Sequential(nn.Linear(6, 5)).double().eval()
    injection = peftcore.apply(host, "repadapter", target="0", bottleneck=4, scale=0.7, dtype="float64")
    steps = {"A": 1.1, "a": 1.3, "B": 1.7, "b": 1.9}
    with torch.no_grad():
        for name, parameter in injection.operators["0"].named_parameters():
            parameter.copy_(wave(*parameter.shape, step=steps[name]))
        for name, step in (("weight", 2.3), ("bias", 2.9)):
            getattr(host[0], name).copy_(wave(*getattr(host[0], name).shape, step=step))
    x = 5 * wave(1, 2, 6, step=2.1)
    exact = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(host(x)[0], numbers["output"], **exact)
    injection.merge()
    torch.testing.assert_close(host[0].weight, numbers["weight"], **exact)
    torch.testing.assert_close(host[0].bias, numbers["bias"], **exact)


@against("authors", "repadapter", **CODE, part="start")
def test_start_is_the_authors() -> None:
    (operator,) = peftcore.apply(nn.Sequential(nn.Linear(40_000, 2)), "repadapter", target="0").operators.values()
    told, ours = frozen(NUMBERS, "start"), dict(operator.named_parameters())
    assert ours.keys() == told.keys()
    for name, tensor in ours.items():
        same_start(tensor, told[name])


def one_block() -> Any:
    """Returns a transformer as wide as the authors' adapters."""
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 768, "depth": 1, "num_heads": 1, "mlp_ratio": 0.1}
    return timm.models.VisionTransformer(**sizes, num_classes=3)


@against("authors", "repadapter", **CODE, part="trains")
def test_what_trains_is_what_the_authors_train() -> None:
    """With the head, which `train` names here."""
    injection, found = peftcore.apply(one_block(), "repadapter", train=["head"]), {}
    for place, path in (("attn", "blocks.0.attn.qkv"), ("mlp", "blocks.0.mlp.fc1")):
        found |= {name: each.numel() for name, each in injection.operators[path].named_parameters(place)}
    found |= {f"head.{name}": each.numel() for name, each in injection.model.head.named_parameters()}
    assert found == frozen(NUMBERS, "trains")
    assert sum(each.numel() for each in injection.parameters()) == sum(found.values())


@against("authors", "repadapter", **CODE, part="defaults")
def test_defaults_are_the_authors() -> None:
    config = peftcore.apply(one_block(), "repadapter").config
    why = "None stands for theirs, and for 0 where a weight is read and nothing can drop"
    same_defaults(config, frozen(NUMBERS, "defaults"), otherwise={"dropout": why})


@pytest.mark.parametrize("name", HOSTED)
def test_equation_on_image_models(name: str) -> None:
    """Outputs, gradients and the merged host's outputs, against hooks in front of whole attentions and feed-forwards:
    queries, keys and values read the same adapted tokens."""
    base, run = image_model(name)
    model = deepcopy(base)
    injection = apply(model)
    unchanged, copies = run(base), {}
    for path, operator in injection.operators.items():
        t = {key: p.detach().clone().requires_grad_() for key, p in operator.named_parameters()}
        end = next(end for end in HOSTED[name][1] if path.endswith(f".{end}"))
        branch = base.get_submodule(path.removesuffix(end) + HOSTED[name][1][end])
        copies[path], dim = t, 1 if name == "convnext_atto" else -1

        def before(m: nn.Module, args: Any, kwargs: dict[str, Any], t: dict = t, dim: int = dim) -> Any:
            x, *rest = args or (kwargs.pop("hidden_states"),)
            return (adapted(x.movedim(dim, -1), t).movedim(-1, dim), *rest), kwargs

        branch.register_forward_pre_hook(before, with_kwargs=True)
    ours, expected = run(model), run(base)
    assert len(copies) == (8 if "swin" in name else 4)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    for output in (ours, expected):
        output.square().sum().backward()
    for path, tensors in copies.items():
        for key, p in injection.operators[path].named_parameters():
            assert tensors[key].grad.abs().max() > 1e-6
            torch.testing.assert_close(p.grad, tensors[key].grad, rtol=1e-8, atol=1e-10)
    injection.merge()
    torch.testing.assert_close(run(model), expected, rtol=1e-10, atol=1e-10)


def test_one_part_of_a_fused_projection_is_adapted_alone() -> None:
    base, run = image_model("vit_tiny_patch16_224")
    model = deepcopy(base)
    for path, operator in apply(model, target=["attn.q", "attn.v"]).operators.items():
        t, qkv = dict(operator.named_parameters()), base.get_submodule(path.removesuffix(":attn.q"))
        shift = adapted(torch.zeros(24).double(), t)
        dense = adapted(torch.eye(24).double(), t) - shift
        for rows in (slice(0, 24), slice(48, 72)):
            qkv.bias.data[rows] += qkv.weight[rows] @ shift
            qkv.weight.data[rows] = qkv.weight[rows] @ dense.T
    torch.testing.assert_close(run(model), run(base), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 4])
def test_convolution_without_padding_merges(groups: int) -> None:
    host = nn.Sequential(nn.Conv2d(8, 6, 3, stride=2)).double().requires_grad_(False)
    x = torch.randn(2, 8, 7, 7, dtype=torch.float64)
    injection = apply(host, target="0", groups=groups, dropout=0.0)
    t = dict(injection.operators["0"].named_parameters())
    expected = nn.functional.conv2d(
        adapted(x.movedim(1, -1), t, groups).movedim(-1, 1), host[0].weight, host[0].bias, stride=2
    )
    torch.testing.assert_close(host(x), expected, rtol=1e-12, atol=1e-12)
    injection.merge()
    torch.testing.assert_close(host(x), expected, rtol=1e-12, atol=1e-12)


def test_dropout_is_that_of_the_authors_by_default() -> None:
    """`nn.Dropout(0.1)`, repadapter.py of luogen1996/RepAdapter at 360992f; none at a weight that is read, where one
    that is asked for is refused."""
    (called,) = peftcore.apply(nn.Sequential(nn.Linear(6, 5)), "repadapter", target="0").operators.values()
    assert called.dropout.p == 0.1
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    (read,) = peftcore.apply(attention, "repadapter", target="self_attn.in_proj_weight").operators.values()
    assert read.dropout.p == 0
    with pytest.raises(UnsupportedSite, match="dropout=0"):
        peftcore.apply(attention, "repadapter", target="self_attn.in_proj_weight", name="other", dropout=0.1)


def test_dropout_is_in_the_bottleneck() -> None:
    host = nn.Sequential(nn.Linear(6, 5)).double().requires_grad_(False)
    t = dict(apply(host, target="0", dropout=0.5).operators["0"].named_parameters())
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = host(x)
    torch.manual_seed(1)
    kept = nn.functional.dropout(torch.ones(3, 4, dtype=torch.float64), 0.5)
    read = x + 0.7 * ((kept * (x @ t["A"].T + t["a"])) @ torch.block_diag(*t["B"].chunk(2)).T + t["b"])
    torch.testing.assert_close(ours, read @ host[0].weight.T + host[0].bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "options", "reason"),
    [
        (nn.Conv2d(4, 4, 3, padding=1), {}, "pads"),
        (nn.Conv2d(4, 4, 1, groups=2), {}, "channels"),
        (nn.Embedding(4, 4), {}, "channels"),
        (nn.Linear(6, 4), {"bottleneck": 3}, "divide"),
        (nn.Linear(5, 4), {}, "divide"),
    ],
)
def test_what_cannot_be_adapted_is_refused(layer: nn.Module, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedSite, match=reason):
        peftcore.plan(nn.Sequential(layer), "repadapter", target="0", **options)


def test_weight_whose_bias_is_elsewhere_is_refused() -> None:
    """BEiT reads the weight of qkv together with biases of its own."""
    model, _ = image_model("beit_base_patch16_224")
    host = probe(model, {"x": torch.randn(1, 3, 32, 32).double()}, derive(model))
    with pytest.raises(UnsupportedSite, match="has no bias to which the adapter's shift"):
        peftcore.apply(model, "repadapter", host=host)


def test_numbers_in_a_vit_are_those_of_the_authors_defaults() -> None:
    """`RepAdapter(hidden_dim=8, groups=2, scale=1)`, repadapter.py of luogen1996/RepAdapter at 360992f, whose train.py
    has `--dim 8`: in ViT-B/16 two a block, 0.22 million as the paper says, without biases."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    one, biases = 768 * 8 + 768 * 8 // 2, 8 + 768
    assert peftcore.plan(model, "repadapter").trainable == 24 * (one + biases) == 239_808
    assert 24 * one == 221_184
    (operator,) = peftcore.apply(nn.Sequential(nn.Linear(16, 5)), "repadapter", target="0").operators.values()
    assert (operator.A.shape, operator.groups, operator.scale) == ((8, 16), 2, 1.0)
