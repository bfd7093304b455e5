"""FacT-TT: the conformance kit; numbers of the authors' code; and its equation on image transformers, written a second
time slice by slice, in float64."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS

timm = pytest.importorskip("timm")

# FacT/fact_tt.py of JieShibo/PETL-ViT at 026e4f1, on the tensors of `wave`: what is added to queries, keys and values
# of a token, to the output of an attention that reads those values, and by both matrices of the feed-forward.
AUTHORS = {
    "q": [0.046637634, -0.0398316338, 0.0111925054, 0.0235816313, -0.0454298413, 0.0423763474],
    "k": [-0.137830997, 0.106071441, -0.0161703741, -0.0825942473, 0.136086039, -0.114984256],
    "v": [0.124269967, -0.215877806, 0.189155379, -0.058750194, -0.103858051, 0.209538023],
    "out": [-0.0892892603, 0.00432942099, 0.0830035272, -0.124839305, 0.0982462408, -0.0178009353],
    "up": [
        -0.0711753694,
        -0.091490834,
        0.204007673,
        -0.204700687,
        0.093190009,
        0.0694014107,
        0.180215709,
        -0.037009763,
        -0.126482544,
        0.220645292,
        -0.193864546,
        0.060819782,
        -0.259675723,
        0.159435635,
        0.0281967668,
        -0.200373523,
        0.26271846,
        -0.181058111,
        0.296512969,
        -0.255691991,
        0.0747171833,
        0.147212757,
        -0.288450175,
        0.271577844,
    ],
    "down": [-0.402785647, 0.476616374, -0.289196799, -0.0567417775, 0.371578177, -0.482739427],
}
PATHS = {"q": "attn.qkv:attn.q", "k": "attn.qkv:attn.k", "v": "attn.qkv:attn.v"}
PATHS |= {"out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
# A host and its options; the width of its slices, and how many it has.
HOSTED: dict[str, tuple[dict[str, Any], int, int]] = {
    "vit_tiny_patch16_224": (VIT, 24, 2 * 12),
    "swin_tiny_patch4_window7_224": (SWIN, 16, 2 * 12 + 2 * 4 * 12),
    "vit": ({}, 8, 2 * (4 * 4 + 2 * 6)),  # of transformers: widths of 16 and 24
}


@conformance(
    "fact_tt",
    options={"*": {"rank": 3}, "mlp": {"rank": 2}},  # at rank 3 its factors have the shapes of weights there
    expected_failures={
        "the_start_depends_on_seed_and_path-mlp": "slices are as wide as all targets allow: without the first, wider"
    },
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def wave(*shape: int, step: float) -> Tensor:
    return 0.3 * torch.sin(step * torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).view(shape)


def image_model(name: str, **changes: Any) -> tuple[nn.Module, Callable[[nn.Module, Any], Tensor]]:
    torch.manual_seed(0)
    if name in HOSTS:
        model, inputs = HOSTS[name].build()
    else:
        model = timm.create_model(name, num_classes=5, **{**HOSTED[name][0], **changes})
        inputs = {"x": torch.randn(2, 3, 32, 32)}
        for parameter in model.parameters():  # away from the zeros and the tiny scales at which some start
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    inputs = {key: value.double() for key, value in inputs.items()}
    output = HOSTS[name].output if name in HOSTS else lambda y: y
    model = model.double().eval().requires_grad_(False)
    return model, lambda each, tensors=None: output(functional_call(each, tensors or {}, (), inputs))


def apply(model: nn.Module, **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(model, "fact_tt", dtype="float64", **{"rank": 3, "scale": 0.7, **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def update(weight: Tensor, U: Tensor, V: Tensor, sigma: Tensor) -> Tensor:
    """0.7 V Sigma U in each place of a matrix."""
    rows, columns, rank = weight.shape[0] // len(V), weight.shape[1] // len(V), len(U)
    sigma = sigma.reshape(rows, rank, columns, rank)
    return torch.cat([torch.cat([0.7 * V @ sigma[i, :, j] @ U for j in range(columns)], 1) for i in range(rows)])


def test_numbers_of_the_authors_code() -> None:
    model, _ = image_model("vit_tiny_patch16_224", embed_dim=6, depth=1, num_heads=1)
    injection = apply(model, scale=50.0)
    operators = {name: injection.operators[f"blocks.0.{path}"] for name, path in PATHS.items()}
    steps = {"up": 1.7, "down": 1.9, "q": 3.1, "k": 3.3, "v": 3.7, "out": 3.9}
    with torch.no_grad():
        for name, operator in operators.items():
            operator.sigma.copy_(wave(*operator.sigma.shape, step=steps[name]))
            operator.U.module.weight.copy_(wave(3, 6, step=1.1))
            operator.V.module.weight.copy_(wave(6, 3, step=1.3))
    added = {}
    for name, operator in operators.items():
        token = added["v"] if name == "out" else 5 * wave(24 if name == "down" else 6, step=2.1)
        zeros = torch.zeros(len(AUTHORS[name]), len(token), dtype=torch.float64)
        added[name] = operator.merged(zeros) @ token
        torch.testing.assert_close(added[name], torch.tensor(AUTHORS[name]).double(), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", HOSTED)
def test_equation_on_image_models(name: str) -> None:
    """Outputs, gradients of shared and of own tensors, and merged weights."""
    base, run = image_model(name)
    model = deepcopy(base)
    injection = apply(model)
    assert sum(p.numel() for p in injection.parameters()) == 2 * HOSTED[name][1] * 3 + HOSTED[name][2] * 3**2
    operators = list(injection.operators.items())
    shared = [operators[0][1].U.module.weight, operators[0][1].V.module.weight]
    ours = [*shared, *(operator.sigma for _, operator in operators)]
    U, V, *sigmas = theirs = [p.detach().clone().requires_grad_() for p in ours]
    weights: dict[str, Tensor] = {}
    for (path, _), sigma in zip(operators, sigmas, strict=True):
        module, _, part = path.partition(":attn.")
        weight = base.get_submodule(module).weight
        if part:  # a third of the rows
            third = "qkv".index(part)
            whole = list(weights.get(f"{module}.weight", weight).chunk(3))
            whole[third] = whole[third] + update(whole[third], U, V, sigma)
            weights[f"{module}.weight"] = torch.cat(whole)
        else:
            weights[f"{module}.weight"] = weight + update(weight, U, V, sigma)
    unchanged, expected = run(base), run(base, weights)
    assert (expected - unchanged).abs().max() > 1e-3 * unchanged.abs().max()
    output = run(model)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for each in (output, expected):
        each.square().sum().backward()
    for p, copy in zip(ours, theirs, strict=True):
        assert copy.grad.abs().max() > 0
        torch.testing.assert_close(p.grad, copy.grad, rtol=1e-8, atol=1e-10)
    injection.merge()
    for path, weight in weights.items():
        torch.testing.assert_close(model.get_parameter(path).data, weight.data, rtol=1e-12, atol=1e-12)


def test_dropout_is_between_sigma_and_v() -> None:
    """On each of the four parts of a first feed-forward matrix, and on the sum of those of a second."""
    host = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 6)).double().requires_grad_(False)
    operators = apply(host, target=["0", "1"], dropout=0.5).operators
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.manual_seed(1)
    ours = host(x)
    torch.manual_seed(1)
    for path, layer in host.named_children():
        operator = operators[path]
        parts = layer.out_features // 6
        low = torch.cat([each @ operator.U.module.weight.T for each in x.split(6, -1)], -1) @ operator.sigma[0].T
        low = low * nn.functional.dropout(torch.ones(5, 3 * parts, dtype=torch.float64), 0.5)
        added = torch.cat([each @ operator.V.module.weight.T for each in low.split(3, -1)], -1)
        x = x @ layer.weight.T + layer.bias + 0.7 * added
    torch.testing.assert_close(ours, x, rtol=1e-12, atol=1e-12)


def test_start_is_that_of_linear_layers() -> None:
    model, run = image_model("vit_tiny_patch16_224")
    before = run(model)
    operators = peftcore.apply(model, "fact_tt", dtype="float64").operators
    assert torch.equal(run(model), before)
    U, V = (getattr(operators["blocks.0.mlp.fc2"], each).module.weight for each in "UV")
    assert all(operator.U.module.weight is U and operator.V.module.weight is V for operator in operators.values())
    assert 0.9 < U.abs().max() * math.sqrt(24) <= 1
    assert not V.any()
    for end, inputs in (("fc1", 16), ("fc2", 4 * 16)):
        assert 0.9 < operators[f"blocks.0.mlp.{end}"].sigma.abs().max() * math.sqrt(inputs) <= 1


def test_what_has_no_slices_is_refused() -> None:
    host = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 10))
    with pytest.raises(UnsupportedSite, match=r"divisor 2 .* such as 1"):
        peftcore.plan(host, "fact_tt", target=["0", "1"], rank=3)
    with pytest.raises(ConfigError, match="rank"):
        peftcore.apply(host, "fact_tt", target="0", rank=3, overrides={"0": {"rank": 2}})
