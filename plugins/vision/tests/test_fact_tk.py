"""FacT-TK: the conformance kit; numbers of the authors' code; and its equation on image transformers, written a second
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

# FacT/fact_tk.py of JieShibo/PETL-ViT at 026e4f1, on the tensors of `wave`: what is added to queries, keys and values
# of a token, to the output of an attention that reads those values, and by both matrices of the feed-forward.
AUTHORS = {
    "q": [0.0115310775, 0.00297200479, -0.015846026, 0.0200342796, -0.0132410355, -0.000810088831],
    "k": [0.00795476443, -0.0267603709, 0.0308976709, -0.018098864, -0.00462057077, 0.0248073072],
    "v": [-0.0269785644, 0.0489943964, -0.0441546657, 0.0151122, 0.0222137973, -0.0473636262],
    "out": [-0.0108603209, -0.0019641802, 0.0137120446, -0.0179438521, 0.0123399992, 2.78440278e-05],
    "up": [
        0.0204190551,
        -0.00843477519,
        -0.00817290353,
        0.0203007246,
        -0.021301,
        0.0106254435,
        0.0605935001,
        -0.0502705769,
        0.0123925714,
        0.0322782411,
        -0.0592562073,
        0.0537537491,
        -0.0311248545,
        0.0443734776,
        -0.0332994271,
        0.00397278216,
        0.0275314853,
        -0.0439447713,
        0.0131226261,
        0.00769613398,
        -0.0242963707,
        0.0275789067,
        -0.0157444679,
        -0.00472007096,
    ],
    "down": [-0.09209011, 0.170686672, -0.155723829, 0.0554032434, 0.0752858206, -0.164708062],
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


TOGETHER = "the bound of P's draws is Xavier's for the columns of all sites together, as in the authors' code"
APPLIES = ("mlp", "encoder", "llama", "bert", "t5", "gpt2", "moe", "mistral", "vit", "unet", "dit")


@conformance(
    "fact_tk",
    options={"*": {"rank": 3}, "mlp": {"rank": 2}},  # at rank 3 its factors have the shapes of weights there
    expected_failures={f"the_start_depends_on_seed_and_path-{host}": TOGETHER for host in APPLIES},
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
    injection = peftcore.apply(model, "fact_tk", dtype="float64", **{"rank": 3, "scale": 0.7, **options})
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return injection


def middle(rows: int, columns: int, C: Tensor, P: Tensor) -> Tensor:
    """Sigma [rows * r, columns * r], number by number: the matrices C P are dealt out to the slices as the authors have
    it, along inputs where these have more slices."""
    mixed = torch.einsum("ijk,kt->ijt", C, P)
    rank, many = len(C), max(rows, columns)

    def number(whole: int, dealt: int) -> Tensor:
        """In row `whole` of the dimension that stays whole; `dealt` counts through the slices of the other."""
        few, i = divmod(whole, rank)
        return mixed[i, dealt // many, few * many + dealt % many]

    places = [[(o, i) for i in range(columns * rank)] for o in range(rows * rank)]
    return torch.stack([torch.stack([number(i, o) if rows >= columns else number(o, i) for o, i in p]) for p in places])


def update(weight: Tensor, U: Tensor, V: Tensor, C: Tensor, P: Tensor) -> Tensor:
    """0.7 V Sigma U in each place of a matrix."""
    rows, columns, rank = weight.shape[0] // len(V), weight.shape[1] // len(V), len(U)
    sigma = middle(rows, columns, C, P).reshape(rows, rank, columns, rank)
    return torch.cat([torch.cat([0.7 * V @ sigma[i, :, j] @ U for j in range(columns)], 1) for i in range(rows)])


def test_numbers_of_the_authors_code() -> None:
    model, _ = image_model("vit_tiny_patch16_224", embed_dim=6, depth=1, num_heads=1)
    injection = apply(model, scale=50.0)
    operators = {name: injection.operators[f"blocks.0.{path}"] for name, path in PATHS.items()}
    P = dict(zip(PATHS, wave(3, 12, step=2.9).split([1, 1, 1, 1, 4, 4], 1), strict=True))
    with torch.no_grad():
        for name, operator in operators.items():
            operator.P.copy_(P[name])
            operator.U.module.weight.copy_(wave(3, 6, step=1.1))
            operator.V.module.weight.copy_(wave(6, 3, step=1.3))
            operator.core.module.weight.copy_(wave(3, 3, 3, step=2.3))
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
    assert sum(p.numel() for p in injection.parameters()) == 2 * HOSTED[name][1] * 3 + 3**3 + HOSTED[name][2] * 3
    operators = list(injection.operators.items())
    shared = [getattr(operators[0][1], name).module.weight for name in ("U", "V", "core")]
    ours = [*shared, *(operator.P for _, operator in operators)]
    U, V, C, *columns = theirs = [p.detach().clone().requires_grad_() for p in ours]
    weights: dict[str, Tensor] = {}
    for (path, _), P in zip(operators, columns, strict=True):
        module, _, part = path.partition(":attn.")
        weight = base.get_submodule(module).weight
        if part:  # a third of the rows
            third = "qkv".index(part)
            whole = list(weights.get(f"{module}.weight", weight).chunk(3))
            whole[third] = whole[third] + update(whole[third], U, V, C, P)
            weights[f"{module}.weight"] = torch.cat(whole)
        else:
            weights[f"{module}.weight"] = weight + update(weight, U, V, C, P)
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


def test_start_is_xavier_for_the_core_and_for_all_columns_together() -> None:
    model, run = image_model("vit_tiny_patch16_224")
    before = run(model)
    operators = peftcore.apply(model, "fact_tk", dtype="float64").operators
    assert torch.equal(run(model), before)
    one = operators["blocks.0.mlp.fc2"]
    assert all(each.core is one.core and each.U is one.U and each.V is one.V for each in operators.values())
    assert not one.V.module.weight.any()
    assert 0.9 < one.U.module.weight.abs().max() * math.sqrt(24) <= 1
    assert 0.99 < one.core.module.weight.abs().max() / math.sqrt(6 / (2 * 16 * 16)) <= 1
    assert 0.9 < one.P.abs().max() / math.sqrt(6 / (16 + 24)) <= 1


def test_what_has_no_slices_is_refused() -> None:
    host = nn.Sequential(nn.Linear(6, 24), nn.Linear(24, 10))
    with pytest.raises(UnsupportedSite, match=r"divisor 2 .* such as 1"):
        peftcore.plan(host, "fact_tk", target=["0", "1"], rank=3)
    with pytest.raises(ConfigError, match="rank"):
        peftcore.apply(host, "fact_tk", target="0", rank=3, overrides={"0": {"rank": 2}})
