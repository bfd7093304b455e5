"""(IA)^3: where its vectors stand, what they do to biases, and that they multiply. Its numbers beside peft's are in the
repository's side-by-side tests."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import conformance
from peftcore.testing.hosts import HOSTS
from peftcore.testing.tools import without_fast_paths


@conformance("ia3")
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.fixture(autouse=True)
def plain_attention(request: pytest.FixtureRequest) -> Iterator[None]:
    """Without gradients torch's encoder takes a path of its own, with other roundings. The kit has its own ways."""
    with nullcontext() if "check" in request.fixturenames else without_fast_paths():
        yield


class One(nn.Module):
    """A host of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def scaled(layer: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection, Any]:
    model = One(layer)
    injection = peftcore.apply(model, "ia3", target="layer", **options)
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.gain)
    return model, injection, operator


def logits(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize(
    ("host", "vectors"),
    [
        # keys and values of one head of eight, the inner width of the feed-forward, in two layers
        ("llama", {"k_proj": 8, "v_proj": 8, "down_proj": 24}),
        ("bert", {"key": 16, "value": 16, "output.dense": 24}),
        (
            "t5",
            {"SelfAttention.k": 16, "SelfAttention.v": 16, "EncDecAttention.k": 16, "EncDecAttention.v": 16, "wo": 24},
        ),
        ("gpt2", {"c_attn:attn.k": 16, "c_attn:attn.v": 16, "mlp.c_proj": 64}),
    ],
)
def test_vectors_stand_at_keys_values_and_inner_activations(host: str, vectors: dict[str, int]) -> None:
    model, _ = HOSTS[host].build()
    operators = peftcore.apply(model, "ia3").operators
    for path, operator in operators.items():
        (width,) = [width for end, width in vectors.items() if path.endswith(end)]
        assert operator.gain.shape == (width,)
    found = {end for path in operators for end in vectors if path.endswith(end)}
    assert found == vectors.keys()
    attentions = sum(path.endswith(("k_proj", "key", ".k", "attn.k")) for path in operators)
    assert len(operators) == 2 * attentions + (4 if host == "t5" else 2)


@pytest.mark.parametrize("host", ["llama", "bert", "gpt2", "t5", "moe", "encoder"])
def test_start_is_the_identity_to_the_bit(host: str) -> None:
    model, inputs = HOSTS[host].build()
    model.eval().requires_grad_(False)  # torch picks other kernels for what needs gradients
    with torch.no_grad():
        before = HOSTS[host].output(model(**inputs))
        peftcore.apply(model, "ia3")
        assert torch.equal(HOSTS[host].output(model(**inputs)), before)


def test_outputs_are_scaled_bias_included() -> None:
    layer = nn.Linear(6, 4)
    x, base = torch.randn(3, 6), nn.Linear(6, 4)
    base.load_state_dict(layer.state_dict())
    model, injection, operator = scaled(layer)
    expected = base(x) * operator.gain
    torch.testing.assert_close(model(x), expected)
    injection.merge()
    assert torch.equal(layer.bias, base.bias * operator.gain)
    assert torch.equal(layer.weight, base.weight * operator.gain[:, None])
    torch.testing.assert_close(model(x), expected)
    injection.unmerge()
    assert torch.equal(layer.bias, base.bias)


def test_scaled_inputs_leave_the_bias_alone() -> None:
    layer = nn.Linear(6, 4)
    x, base = torch.randn(3, 6), nn.Linear(6, 4)
    base.load_state_dict(layer.state_dict())
    model, injection, operator = scaled(layer, scale_inputs=["layer"])
    expected = base(x * operator.gain)
    torch.testing.assert_close(model(x), expected)
    injection.merge()
    assert torch.equal(layer.bias, base.bias)
    assert torch.equal(layer.weight, base.weight * operator.gain)
    torch.testing.assert_close(model(x), expected)


def test_feed_forward_is_scaled_after_the_activation() -> None:
    """W_2 (l * f(W_1 x)): the same as scaling what the second matrix is given."""
    model, inputs = HOSTS["llama"].build()
    model.eval()
    injection = peftcore.apply(model, "ia3", target="mlp.down")
    gains = [nn.init.normal_(operator.gain) for operator in injection.operators.values()]
    ours = logits(model, inputs)
    injection.remove()
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda module, args, gain=gain: (args[0] * gain,))
        for layer, gain in zip(model.model.layers, gains, strict=True)
    ]
    torch.testing.assert_close(ours, logits(model, inputs))
    for hook in hooks:
        hook.remove()
    assert (ours - logits(model, inputs)).abs().max() > 0.01


def test_rows_of_fused_projections_keep_queries() -> None:
    model, _ = HOSTS["gpt2"].build()
    base = {name: p.clone() for name, p in model.named_parameters()}
    injection = peftcore.apply(model, "ia3", target=["attn.k", "attn.v"])
    for operator in injection.operators.values():
        nn.init.normal_(operator.gain)
    injection.merge()
    weight, bias = "transformer.h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.bias"
    k = injection.operators["transformer.h.0.attn.c_attn:attn.k"].gain
    v = injection.operators["transformer.h.0.attn.c_attn:attn.v"].gain
    gain = torch.cat([torch.ones(16), k, v])
    assert torch.equal(model.get_parameter(weight), base[weight] * gain)
    assert torch.equal(model.get_parameter(bias), base[bias] * gain)


def test_several_multiply() -> None:
    layer = nn.Linear(6, 4)
    x, base = torch.randn(3, 6), nn.Linear(6, 4)
    base.load_state_dict(layer.state_dict())
    model, _, first = scaled(layer)
    second = peftcore.apply(model, "ia3", target="layer", name="second").operators["layer"]
    nn.init.normal_(second.gain)
    torch.testing.assert_close(model(x), base(x) * first.gain * second.gain)


def test_a_gain_of_zero_can_be_unmerged() -> None:
    layer = nn.Linear(6, 4)
    before = layer.weight.detach().clone()
    _, injection, operator = scaled(layer)
    nn.init.zeros_(operator.gain)
    injection.merge()
    assert not layer.weight.any()
    injection.unmerge()
    assert torch.equal(layer.weight, before)


def test_experts_have_vectors_of_their_own() -> None:
    model, _ = HOSTS["moe"].build()
    operators = peftcore.apply(model, "ia3").operators
    assert operators["model.layers.0.mlp.experts.down_proj"].gain.shape == (3, 24)
    assert not any("gate_up" in path for path in operators)


def test_number_of_parameters() -> None:
    """T-Few's formula: 2 * width of keys and values + inner width, for each layer."""
    model, _ = HOSTS["llama"].build()
    assert peftcore.plan(model, "ia3").trainable == 2 * (8 + 8 + 24)
    injection = peftcore.apply(model, "ia3")
    assert sum(p.numel() for p in injection.parameters()) == 2 * (8 + 8 + 24)


def test_inputs_that_are_no_channels_are_refused() -> None:
    with pytest.raises(UnsupportedSite, match="scale_inputs"):
        peftcore.apply(One(nn.Embedding(9, 5)), "ia3", target="layer", scale_inputs=["*"])
    assert peftcore.apply(One(nn.Embedding(9, 5)), "ia3", target="layer").operators


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(4, 6, 3, groups=2), nn.Conv1d(4, 4, 3, groups=4, bias=False)],
    ids=["grouped", "transposed", "depthwise"],
)
def test_inputs_of_groups_are_scaled_channel_by_channel(layer: nn.Module) -> None:
    base = deepcopy(layer)
    x = torch.randn(2, 4, 7, *([7] if isinstance(layer, nn.Conv2d) else []))
    model = One(layer)
    injection = peftcore.apply(model, "ia3", target="layer", scale_inputs=["*"])
    (operator,) = injection.operators.values()
    assert operator.gain.shape == (4,) and peftcore.plan(One(base), "ia3", target="layer").trainable in (4, 6)
    nn.init.normal_(operator.gain)
    expected = base(x * operator.gain.view(4, *[1] * (x.dim() - 2)))
    torch.testing.assert_close(model(x), expected)
    injection.merge()
    torch.testing.assert_close(layer(x), expected)
