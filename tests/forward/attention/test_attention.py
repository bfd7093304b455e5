"""Edited attention equals its equation, written a second time, on whole hosts in float64: outputs and gradients."""

from copy import deepcopy
from itertools import pairwise
from typing import Any, Literal

import pytest
import torch
from attention_hosts import FAMILIES, METHODS, VALUES, copies, host, inputs, method, rewritten, seen
from torch import Tensor

import peftcore
from peftcore.author import Attend, AttentionOperator, AttentionSite, MethodConfig

ONLY_EAGER = {"gemma2"}
"""Their scores are capped, which sdpa cannot do."""
NARROW = {"llama", "qwen3", "mistral", "gemma2", "gemma3", "deepseek_v3", "gpt_neox"}
"""Their own eager function computes the softmax in float32, in a host of any dtype: no comparison can be closer."""
CASES = [
    (name, kind, implementation)
    for name, (_, model, _) in FAMILIES.items()
    for kind in METHODS
    for implementation in ("eager", "sdpa")
    if not (implementation == "sdpa" and name in ONLY_EAGER) and (kind != "beside" or model in VALUES)
]


def step(model: Any, name: str, leaves: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    given = inputs(name)
    output = seen(name, model(**given).logits, given)
    torch.manual_seed(3)
    gradients = torch.autograd.grad((output * torch.randn_like(output)).sum(), leaves)
    return output.detach(), list(gradients)


@pytest.mark.share(3)
@pytest.mark.parametrize(("name", "kind", "implementation"), CASES)
def test_outputs_and_gradients(name: str, kind: str, implementation: str) -> None:
    """Grouped queries, latent attention, sliding windows, fused and transposed projections, relative biases,
    cross-attention, padding on the left."""
    narrow = implementation == "eager" and name in NARROW
    base = host(name, "eager", torch.float32 if narrow else torch.float64)
    model = deepcopy(base)
    model.set_attn_implementation(implementation)
    given = inputs(name)
    injection = peftcore.apply(model, METHODS[kind], dtype=base.dtype)
    tensors = copies(injection)
    with rewritten(base, {path: {} for path in tensors}):
        plain = seen(name, base(**given).logits, given)
    ours, our_gradients = step(model, name, list(injection.parameters()))
    with rewritten(base, tensors):
        expected, gradients = step(base, name, [leaf for each in tensors.values() for leaf in each.values()])
    assert (expected - plain).abs().max() > 1e-3 * plain.abs().max()
    torch.testing.assert_close(ours, expected, rtol=1e-5 if narrow else 1e-10, atol=1e-5 if narrow else 1e-10)
    assert len(gradients) == len(our_gradients) > 0
    for mine, other in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4 if narrow else 1e-8, atol=1e-4 if narrow else 1e-9)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_causality_without_a_mask() -> None:
    """Nothing padded: no mask is made, and sdpa goes by its causal flag, which keys in front would shift."""
    base = host("llama", "eager", torch.float64)
    model = deepcopy(base)
    model.set_attn_implementation("sdpa")
    words = inputs("llama")["input_ids"]
    injection = peftcore.apply(model, METHODS["in_front"], dtype="float64")
    with rewritten(base, copies(injection)):
        expected = base(words).logits
    torch.testing.assert_close(model(words).logits, expected, rtol=1e-10, atol=1e-10)
    later = words.clone()
    later[:, -1] = 7
    assert torch.equal(model(later).logits[:, :-1], model(words).logits[:, :-1])


def test_weights_are_those_of_the_own_keys() -> None:
    """What `output_attentions` hands out has the shape that consumers know; the rest of the mass is on the prefix."""
    model = host("bart", "eager")
    given = inputs("bart")
    before = model(**given, output_attentions=True)
    peftcore.apply(model, METHODS["in_front"])
    after = model(**given, output_attentions=True)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for old, new in zip(getattr(before, kind), getattr(after, kind), strict=True):
            assert new.shape == old.shape
            assert (new.sum(-1) < 1 - 1e-4).all() and (old.sum(-1) > 1 - 1e-4).all()


@pytest.mark.parametrize("kinds", [("in_front", "turned"), ("beside", "turned")])
def test_edits_nest_in_the_order_of_application(kinds: tuple[str, str]) -> None:
    """The first applied is innermost: it gets the queries that the second has turned."""
    base = host("llama", "eager", torch.float64)
    given = inputs("llama")
    model = deepcopy(base)
    model.set_attn_implementation("sdpa")
    first, second = (peftcore.apply(model, METHODS[kind], dtype="float64") for kind in kinds)
    both = {path: {**own, **copies(second)[path]} for path, own in copies(first).items()}
    for tensors in (both, copies(first)):
        with rewritten(base, tensors):
            expected = seen("llama", base(**given).logits, given)
        torch.testing.assert_close(seen("llama", model(**given).logits, given), expected, rtol=1e-10, atol=1e-10)
        peftcore.activate(model, kinds[0])


def test_the_other_order_is_another_attention() -> None:
    base, given = host("llama", "sdpa", torch.float64), inputs("llama")
    found = []
    for kinds in (("beside", "turned"), ("turned", "beside")):
        model = deepcopy(base)
        for kind in kinds:
            peftcore.apply(model, METHODS[kind], dtype="float64", seed=0)
        found.append(seen("llama", model(**given).logits, given))
    assert (found[0] - found[1]).abs().max() > 1e-3


class GroupsConfig(MethodConfig):
    method: Literal["groups"] = "groups"


class Groups(AttentionOperator):
    """Tokens see those of their own group."""

    def __init__(self, site: AttentionSite, config: GroupsConfig) -> None:
        super().__init__(site)

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        bounds = [*(bound for bound in (0, 4, 7) if bound < attend.keys), attend.keys]
        return torch.cat([attend.among(*each, query, key, value) for each in pairwise(bounds)], dim=2)


GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["qwen3", "bert", "t5"])
def test_groups_see_nothing_of_each_other(name: str, implementation: str) -> None:
    """Beside keys that another edit puts in front, padding, causality, and biases of positions; then all is as
    before."""
    model, given = host(name, implementation), inputs(name)
    groups = peftcore.apply(model, method(Groups, GroupsConfig, "groups"), target="attn.core")
    peftcore.apply(model, METHODS["in_front"], target="attn.core")
    peftcore.activate(model, "groups", "in_front")
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(operator: Any, args: tuple[Any, ...], output: Tensor) -> None:
        attend, query, key, value = args
        if query.shape[2] == 9:
            apart = (GROUPS[:, None] != GROUPS).expand(2, 1, 9, 9)
            calls.append((output, attend.hiding(apart, query, key, value), key))

    for operator in groups.operators.values():
        operator.register_forward_hook(keep)
    seen(name, model(**given).logits, given)
    assert len(calls) >= 2
    for output, expected, key in calls:
        assert key.shape[2] == 12
        rows = given["attention_mask"].bool()[:, None, :, None].expand_as(output[..., :1]).squeeze(-1)
        torch.testing.assert_close(output[rows], expected[rows], rtol=1e-5, atol=1e-6)
