"""Sites that no other library adapts: grouped and transposed convolutions, factors for each expert, rows of fused
projections. The methods' equations are written a second time, plainly and in float64, and a host with the resulting
weight in place of its own gives the expected outputs and gradients.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import transformers
from peft_pairs import difference
from torch import Tensor, nn
from torch.func import functional_call

import peftcore
from peftcore.testing.hosts import HOSTS

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

RANK, ALPHA = 3, 5.0
EXACT = 1e-10
"""Accepted difference in float64."""
Equation = Callable[[Tensor, dict[str, Tensor]], Tensor]
"""An effective weight [out, in, *kernel] from a weight and the tensors of an operator."""


def lora(weight: Tensor, operator: dict[str, Tensor]) -> Tensor:
    return weight + ALPHA / RANK * torch.einsum("or,ri...->oi...", operator["B"], operator["A"])


def dora(weight: Tensor, operator: dict[str, Tensor]) -> Tensor:
    direction = lora(weight, operator)
    rows = [
        m * row / row.detach().square().sum().sqrt() for m, row in zip(operator["magnitude"], direction, strict=True)
    ]
    return torch.stack(rows)


def ia3(weight: Tensor, operator: dict[str, Tensor]) -> Tensor:
    return torch.stack([gain * row for gain, row in zip(operator["gain"], weight, strict=True)])


EQUATIONS: dict[str, Equation] = {"lora": lora, "dora": dora, "ia3": ia3}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": RANK, "alpha": ALPHA},
    "dora": {"rank": RANK, "alpha": ALPHA},
    "ia3": {},
}


class Twice(nn.Module):
    """A layer whose output is no linear function of its input, so that gradients depend on values."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x)) * 2


def same(stored: Tensor) -> Tensor:
    return stored


def transposed(groups: int) -> Callable[[Tensor], Tensor]:
    """From [in, out / groups, *kernel] to [out, in / groups, *kernel] and, the other way round, back."""

    def swap(stored: Tensor) -> Tensor:
        size, width = stored.shape[0] // groups, stored.shape[1]
        rows = [
            torch.stack([stored[group * size + i, j] for i in range(size)])
            for group in range(groups)
            for j in range(width)
        ]
        return torch.stack(rows)

    return swap


@dataclass(frozen=True)
class Kind:
    """A kind of layer: how it is made, an input, and how its stored weight becomes [out, in, *kernel] and back."""

    build: Callable[[], tuple[nn.Module, Tensor]]
    logical: Callable[[Tensor], Tensor] = same
    stored: Callable[[Tensor], Tensor] = same


KINDS = {
    "grouped-1d": Kind(lambda: (nn.Conv1d(6, 4, 3, groups=2, stride=2), torch.randn(2, 6, 9))),
    "grouped-2d": Kind(lambda: (nn.Conv2d(6, 9, (3, 2), groups=3, padding=1), torch.randn(2, 6, 5, 4))),
    "depthwise": Kind(lambda: (nn.Conv2d(5, 5, 3, groups=5, dilation=2, bias=False), torch.randn(2, 5, 6, 6))),
    "circular": Kind(lambda: (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), torch.randn(2, 4, 5, 5))),
    "transposed-1d": Kind(
        lambda: (nn.ConvTranspose1d(4, 6, 3, stride=2), torch.randn(2, 4, 5)), transposed(1), transposed(1)
    ),
    "transposed-2d": Kind(
        lambda: (nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=1), torch.randn(2, 4, 3, 3)),
        transposed(1),
        transposed(1),
    ),
    "transposed-grouped": Kind(
        lambda: (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), torch.randn(2, 4, 3, 3)),
        transposed(2),
        transposed(2),
    ),
    "embedding-max-norm": Kind(
        lambda: (nn.Embedding(9, 5, max_norm=1e3), torch.randint(9, (2, 4))), lambda t: t.T, lambda t: t.T
    ),
}


@torch.no_grad()
def fill(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        parameter.normal_(0, 0.1)


def assert_same_gradients(ours: Tensor, expected: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Of the operators' tensors and of their copies, for one random direction."""
    direction = torch.randn_like(expected)
    for output in (ours, expected):
        (output * direction).sum().backward()
    for mine, theirs in pairs:
        assert theirs.grad.abs().max() > 0
        assert difference(mine.grad, theirs.grad) <= EXACT


def copies(operator: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in operator.named_parameters()}


@pytest.mark.parametrize("method", EQUATIONS)
@pytest.mark.parametrize("kind", [pytest.param(kind, id=name) for name, kind in KINDS.items()])
def test_layers(kind: Kind, method: str) -> None:
    layer, x = kind.build()
    base = Twice(layer).double().requires_grad_(False)
    x = x.double() if x.is_floating_point() else x
    model, before = deepcopy(base), base(x)
    injection = peftcore.apply(model, method, target="layer", dtype="float64", **OPTIONS[method])
    fill(injection)
    (operator,) = injection.operators.values()
    tensors = copies(operator)
    effective = {"layer.weight": kind.stored(EQUATIONS[method](kind.logical(layer.weight), tensors))}
    if method == "ia3" and layer._parameters.get("bias") is not None:
        effective["layer.bias"] = layer.bias * tensors["gain"]
    ours, expected = model(x), functional_call(base, effective, (x,))
    assert difference(ours, before) > 0.01
    assert difference(ours, expected) <= EXACT
    assert_same_gradients(ours, expected, [(p, tensors[name]) for name, p in operator.named_parameters()])
    injection.merge()
    for name, value in effective.items():
        assert difference(model.get_parameter(name), value) <= EXACT
    assert difference(model(x), expected) <= EXACT


# Stacked experts


def mixture(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Experts stored [experts, out, in], or [experts, in, out] with biases."""
    if name == "mixtral":
        model, inputs = HOSTS["moe"].build()
    else:
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 8}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}
        config = transformers.GptOssConfig(**sizes, **heads, initializer_range=0.3, pad_token_id=0)
        model, inputs = transformers.GptOssForCausalLM(config), {"input_ids": torch.randint(3, 40, (2, 5))}
    model.set_experts_implementation("eager")  # grouped products of torch have no float64
    return model.double().eval().requires_grad_(False), inputs


@pytest.mark.parametrize("method", EQUATIONS)
@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_experts_have_operators_of_their_own(name: str, method: str) -> None:
    base, inputs = mixture(name)
    model = deepcopy(base)
    options = OPTIONS[method] | ({"scale_inputs": []} if method == "ia3" else {})
    injection = peftcore.apply(model, method, target="*.experts.down_proj", dtype="float64", **options)
    fill(injection)
    effective: dict[str, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for path, operator in injection.operators.items():
        tensors = copies(operator)
        pairs += [(p, tensors[key]) for key, p in operator.named_parameters()]
        stack = base.get_parameter(path)
        turn = (lambda t: t.T) if name == "gpt-oss" else same
        experts = [
            turn(EQUATIONS[method](turn(matrix), {key: value[e] for key, value in tensors.items()}))
            for e, matrix in enumerate(stack)
        ]
        effective[path] = torch.stack(experts)
        if method == "ia3" and name == "gpt-oss":
            effective[f"{path}_bias"] = base.get_parameter(f"{path}_bias") * tensors["gain"]
    ours, expected = model(**inputs).logits, functional_call(base, effective, (), inputs).logits
    assert difference(ours, base(**inputs).logits) > 0.01
    assert difference(ours, expected) <= EXACT
    assert_same_gradients(ours, expected, pairs)
    injection.merge()
    for path, value in effective.items():
        assert difference(model.get_parameter(path), value) <= EXACT


# Rows of fused projections


@dataclass(frozen=True)
class Fused:
    """A host whose projection makes q, k and v in one matrix, and which rows of it are the queries."""

    build: Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]
    path: str
    """The weight of the projection, stored [out, in] unless it is GPT-2's."""
    queries: Callable[[], Iterator[int]]
    target: str = "attn.q"


def gpt2() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model, inputs = HOSTS["gpt2"].build()
    return model, lambda adapted: adapted(**inputs).logits


def vit() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    x = torch.randn(2, 3, 16, 16).double()
    return timm.models.vision_transformer.VisionTransformer(**sizes), lambda adapted: adapted(x)


def falcon(**options: Any) -> Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def build() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        config = transformers.FalconConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.3,
            bias=True,
            **options,
        )
        ids = torch.randint(3, 40, (2, 5))
        return transformers.FalconForCausalLM(config), lambda adapted: adapted(ids).logits

    return build


def encoder() -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    model, inputs = HOSTS["encoder"].build()
    x = inputs["x"].double()
    return model, lambda adapted: adapted(x, inputs["padding"])


FUSED = {
    "gpt2": Fused(gpt2, "transformer.h.{}.attn.c_attn.weight", lambda: iter(range(16))),
    "timm-vit": Fused(vit, "blocks.{}.attn.qkv.weight", lambda: iter(range(16))),
    "torch-encoder": Fused(encoder, "encoder.layers.{}.self_attn.in_proj_weight", lambda: iter(range(16))),
    # Falcon's first form: [q k v] for each head, four rows each.
    "falcon-heads": Fused(
        falcon(multi_query=False, new_decoder_architecture=False),
        "transformer.h.{}.self_attention.query_key_value.weight",
        lambda: (head * 12 + row for head in range(4) for row in range(4)),
    ),
    # Its later form: two groups, each of two query heads, then one key head and one value head.
    "falcon-groups": Fused(
        falcon(new_decoder_architecture=True, num_kv_heads=2),
        "transformer.h.{}.self_attention.query_key_value.weight",
        lambda: (group * 16 + row for group in range(2) for row in range(8)),
    ),
}


@pytest.mark.parametrize("method", EQUATIONS)
@pytest.mark.parametrize("fused", [pytest.param(each, id=name) for name, each in FUSED.items()])
def test_rows_of_queries_alone(fused: Fused, method: str) -> None:
    base, run = fused.build()
    base.double().eval().requires_grad_(False)
    model = deepcopy(base)
    injection = peftcore.apply(model, method, target="attn.q", dtype="float64", **OPTIONS[method])
    fill(injection)
    rows = list(fused.queries())
    bias_of = {path: path.removesuffix("weight") + "bias" for path in (fused.path.format(i) for i in (0, 1))}
    turn = (lambda t: t.T) if "c_attn" in fused.path else same
    effective: dict[str, Tensor] = {}
    pairs: list[tuple[Tensor, Tensor]] = []
    for path, operator in zip(bias_of, injection.operators.values(), strict=True):
        tensors = copies(operator)
        pairs += [(p, tensors[key]) for key, p in operator.named_parameters()]
        weight = turn(base.get_parameter(path))
        whole = weight.index_put((torch.tensor(rows),), EQUATIONS[method](weight[rows], tensors))
        effective[path] = turn(whole)
        if method == "ia3":
            bias = base.get_parameter(bias_of[path])
            effective[bias_of[path]] = bias.index_put((torch.tensor(rows),), bias[rows] * tensors["gain"])
    ours, expected = run(model), functional_call_run(base, effective, run)
    assert difference(ours, run(base)) > 1e-4
    assert difference(ours, expected) <= EXACT
    assert_same_gradients(ours, expected, pairs)
    injection.merge()
    others = [row for row in range(turn(base.get_parameter(path)).shape[0]) if row not in rows]
    for name, parameter in base.named_parameters():
        merged = model.get_parameter(name)
        if name not in effective:
            assert torch.equal(merged, parameter)
            continue
        assert difference(merged, effective[name]) <= EXACT
        mine, before = (turn(t) if t.dim() == 2 else t for t in (merged, parameter))
        assert torch.equal(mine[others], before[others])
        assert all(not torch.equal(mine[row], before[row]) for row in rows if before[row].any())


def functional_call_run(base: nn.Module, effective: dict[str, Tensor], run: Callable[[nn.Module], Tensor]) -> Tensor:
    """Run the base with other tensors in place of its own."""
    return run(lambda *args, **kwargs: functional_call(base, effective, args, kwargs))  # type: ignore[arg-type]
