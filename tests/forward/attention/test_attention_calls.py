"""Edits in attentions of timm and diffusers equal their equation, written a second time: outputs and gradients."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from attention_hosts import METHODS, copies
from torch import Tensor, nn
from torch_attention_hosts import NAMES, VALUES, host, logits, rewritten

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.forward.attention.attention_calls import TorchCalls, calls_of
from peftcore.testing.tools import differences, trace


def step(model: Any, given: dict[str, Any], leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    output = logits(model, given)
    torch.manual_seed(3)
    return output.detach(), list(torch.autograd.grad((output * torch.randn_like(output)).sum(), leaves))


@pytest.mark.parametrize("kind", ["in_front", "turned"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients(name: str, kind: str) -> None:
    """Fused projections, rotations, windows with biases and masks, cross-attention, streams that join."""
    base, given = host(name)
    model = deepcopy(base)
    injection = peftcore.apply(model, METHODS[kind], dtype="float64")
    tensors = copies(injection)
    plain = logits(base, given)
    ours, gradients = step(model, given, list(injection.parameters()))
    with rewritten(base, tensors):
        leaves = [leaf for each in tensors.values() for leaf in each.values()]
        expected, wanted = step(base, given, leaves)
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    assert len(gradients) == len(wanted) > 0
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", VALUES)
def test_a_softmax_beside(name: str) -> None:
    """The attention's own matrix makes values of a prompt, for a softmax of their own."""
    model, given = host(name)
    injection = peftcore.apply(model, METHODS["beside"], dtype="float64")
    found: list[tuple[Any, Tensor, Tensor, Tensor]] = []

    def keep(operator: Any, args: tuple[Any, ...], output: Tensor) -> None:
        attend, query, key, value = args
        prompt = VALUES[name](model.get_submodule(operator_path[operator]), operator.prompt)
        made = prompt.unflatten(-1, (value.shape[1], -1)).transpose(0, 1)
        scores = torch.einsum("bhqd,hkd->bhqk", query, operator.key) * query.shape[-1] ** -0.5
        other = torch.einsum("bhqk,hkd->bhqd", scores.exp() / scores.exp().sum(-1, keepdim=True), made)
        found.append((operator, output, attend(query, key, value) + 0.5 * other, other))

    operator_path = {operator: path.removesuffix(":attention") for path, operator in injection.operators.items()}
    for operator in injection.operators.values():
        operator.register_forward_hook(keep)
    logits(model, given)
    assert {each for each, *_ in found} == set(operator_path)
    for _, output, expected, other in found:
        torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
        assert other.abs().max() > 1e-3


def test_an_attention_that_would_compute_by_itself_is_edited_too() -> None:
    """timm's modules have products of their own for a softmax that is not fused."""
    model, given = host("timm_vit")
    peftcore.apply(model, METHODS["in_front"], dtype="float64")
    expected = logits(model, given)
    for module in model.modules():
        if "fused_attn" in vars(module):
            module.fused_attn = False
    torch.testing.assert_close(logits(model, given), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["timm_vit", "timm_swin", "sd15_unet", "flux"])
def test_rows_have_their_own_edits(name: str) -> None:
    """Swin's windows are rows of the attention, several for each row of the batch."""
    model, given = host(name)
    for called, kind in (("one", "in_front"), ("other", "in_front"), ("turned", "turned")):
        peftcore.apply(
            model, METHODS[kind], name=called, dtype="float64", **({} if kind == "turned" else {"length": 2})
        )
    alone = {}
    for called in ("one", "turned"):
        with peftcore.activate(model, called):
            alone[called] = logits(model, given)
    with peftcore.route(model, ["turned", "one"]):
        routed = logits(model, given)
    torch.testing.assert_close(routed, torch.stack([alone["turned"][0], alone["one"][1]]), rtol=1e-9, atol=1e-9)
    with peftcore.route(model, ["one", None]), peftcore.activate(model):
        pass
    with peftcore.activate(model):
        base = logits(model, given)
    with peftcore.route(model, ["one", None]):
        torch.testing.assert_close(logits(model, given), torch.stack([alone["one"][0], base[1]]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["timm_vit", "sd15_unet", "sd3"])
def test_removal_leaves_no_trace(name: str) -> None:
    model, given = host(name)
    before, base = trace(model), logits(model, given)
    injection = peftcore.apply(model, METHODS["in_front"])
    moved = logits(model, given)
    copy = deepcopy(model)
    with injection.disabled():
        assert torch.equal(logits(model, given), base)
    injection.remove()
    assert differences(before, trace(model)) == ""
    assert torch.equal(logits(model, given), base)
    assert torch.equal(logits(copy, given), moved) and not torch.equal(moved, base)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["timm_vit", "sd15_unet", "flux"])
def test_one_graph_with_the_same_numbers(name: str) -> None:
    """Also where diffusers lets the compiler take whole attentions for operations."""
    model, given = host(name, torch.float32)
    injection = peftcore.apply(model, METHODS["in_front"])
    output, gradients = step(model, given, list(injection.parameters()))
    torch.compiler.reset()
    compiled, again = step(
        torch.compile(model, fullgraph=True, backend="aot_eager"), given, list(injection.parameters())
    )
    torch.testing.assert_close(compiled, output, rtol=1e-4, atol=1e-4)
    for one, other in zip(again, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_another_processor_later_is_an_error() -> None:
    """It computes its softmax by itself, so no edit would come to it."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import AttnProcessor

    model, given = host("sd15_unet")
    injection = peftcore.apply(model, METHODS["in_front"], dtype="float64")
    logits(model, given)
    kept = model.attn_processors
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(UnsupportedSite, match="attention 0 times"):
        logits(model, given)
    model.set_attn_processor(kept)
    assert logits(model, given).isfinite().all()
    injection.remove()


class Twice(nn.Module):
    """Two attentions in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values ``[batch, heads, length, width]``."""
        return tuple(each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        z: Tensor = self.o_proj(nn.functional.scaled_dot_product_attention(y, k, v).transpose(1, 2).flatten(2))
        return z


def test_two_attentions_in_one_forward_are_an_error() -> None:
    model = nn.Sequential(Twice())
    peftcore.apply(model, METHODS["in_front"], target="0")
    with pytest.raises(UnsupportedSite, match="2 times"):
        model(torch.randn(2, 3, 8))


def test_causality_is_torchs() -> None:
    class Causal(Twice):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
            )
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            z: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
            return z

    model, x = nn.Sequential(Causal()), torch.randn(2, 5, 8)
    peftcore.apply(model, METHODS["in_front"], target="0")
    later = x.clone()
    later[:, -1] += 1.0
    assert torch.equal(model(later)[:, :-1], model(x)[:, :-1])
    assert not torch.equal(model(later)[:, -1], model(x)[:, -1])


def test_scale_and_masks_are_those_of_the_call() -> None:
    """A scale of the module's own, and a mask ``[queries, keys]`` for all rows and heads."""

    class Scaled(Twice):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (
                each(x).unflatten(-1, (2, 4)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj)
            )
            found.append((q, k, v))
            y: Tensor = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=0.3)
            return y

    found: list[tuple[Tensor, ...]] = []
    mask = torch.randn(5, 5)
    model, x = nn.Sequential(Scaled()), torch.randn(2, 5, 8)
    injection = peftcore.apply(model, METHODS["in_front"], target="0")
    (operator,) = injection.operators.values()
    output, (q, k, v) = model(x), found[-1]
    front = 0.3 * torch.einsum("bhqd,hkd->bhqk", q, operator.key)
    weights = torch.cat([front, 0.3 * q @ k.mT + mask], -1).softmax(-1)
    values = torch.cat([operator.value.expand(2, -1, -1, -1), v], 2)
    torch.testing.assert_close(output, weights @ values)


def test_modules_are_told_by_their_code() -> None:
    assert isinstance(calls_of(Twice()), TorchCalls)
    assert calls_of(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("name", ["timm_vit", "sd15_unet"])
def test_another_adapters_values_take_the_place(name: str) -> None:
    """The same way of calling is equal, whichever site it was found for, so values can be swapped."""
    model, given = host(name)
    peftcore.apply(model, METHODS["in_front"], name="one", dtype="float64")
    other = peftcore.apply(model, METHODS["in_front"], name="other", dtype="float64", seed=5)
    ways = [[operator.calls for operator in each.operators.values()] for each in peftcore.injections(model).values()]
    assert ways[0] == ways[1] and deepcopy(ways[0]) == ways[0]
    assert other.operators and logits(model, given).isfinite().all()
