"""Edits in `nn.MultiheadAttention`: torch's own bias of keys and values is a prefix of one, so numbers are torch's."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from attention_hosts import METHODS
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing.tools import differences, trace

WIDTH, HEADS = 12, 3


class Host(nn.Module):
    """One attention, self or cross."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = self.attention(*args, **kwargs)
        return output


def pair(**options: Any) -> tuple[Host, Host, Any]:
    """A host with a prefix of one in front, and the same with torch's bias of keys and values."""
    torch.manual_seed(0)
    theirs = Host(add_bias_kv=True, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = Host(**options)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "bias_k" not in k and "bias_v" not in k})
    injection = peftcore.apply(ours, METHODS["in_front"], target="attention", length=1, dtype="float64")
    (operator,) = injection.operators.values()
    with torch.no_grad():
        operator.key.copy_(theirs.attention.bias_k.view(HEADS, 1, -1))
        operator.value.copy_(theirs.attention.bias_v.view(HEADS, 1, -1))
    return ours, theirs, operator


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
    "added_padding": {"key_padding_mask": torch.randn(2, 5, dtype=torch.float64)},
    "hidden": {"attn_mask": torch.ones(4, 5).triu(1).bool()},
    "added": {"attn_mask": torch.randn(4, 5, dtype=torch.float64)},
    "each_head": {"attn_mask": torch.randn(2 * HEADS, 4, 5, dtype=torch.float64)},
    "both": {
        "attn_mask": torch.ones(4, 5).triu(1).bool(),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    },
    "mixed": {
        "attn_mask": torch.randn(4, 5, dtype=torch.float64),
        "key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
    },
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"kdim": 7, "vdim": 9}, {"bias": False}], ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_torchs_bias_of_keys_and_values(mask: str, options: Any, training: bool, need_weights: bool) -> None:
    """Outputs, gradients of the prefix, of inputs, of frozen weights; weights are those of the inputs' own keys, and
    the rest of their mass is on the prefix."""
    ours, theirs, operator = pair(**options)
    torch.manual_seed(1)
    shapes = [(2, 4, WIDTH), (2, 5, options.get("kdim", WIDTH)), (2, 5, options.get("vdim", WIDTH))]
    states = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    found = []
    for model, leaves in (
        (ours, [operator.key, operator.value]),
        (theirs, [theirs.attention.bias_k, theirs.attention.bias_v]),
    ):
        given = [each.clone().requires_grad_() for each in states]
        turned = given if options.get("batch_first") else [each.transpose(0, 1) for each in given]
        output, weights = model.train(training)(*turned, **MASKS[mask], need_weights=need_weights)
        gradients = torch.autograd.grad(output.square().sum(), [*leaves, *given])
        found.append((output, weights, gradients))
    (output, weights, gradients), (expected, full, wanted) = found
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one.flatten(), other.flatten(), rtol=1e-9, atol=1e-9)
    assert (weights is None) == (full is None) == (not need_weights)
    if full is not None:
        torch.testing.assert_close(weights, full[..., :-1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("average", [False, True])
def test_without_a_batch(average: bool) -> None:
    ours, theirs, _ = pair()
    x = torch.randn(4, WIDTH, dtype=torch.float64)
    output, weights = ours(x, x, x, average_attn_weights=average)
    expected, full = theirs(x, x, x, average_attn_weights=average)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, full[..., :-1])


@pytest.mark.parametrize("norm_first", [False, True])
def test_whole_encoders_and_decoders(norm_first: bool) -> None:
    """Evaluated, torch's fused layers would pass the attention by: the same numbers as in training mode without
    dropout. A decoder has self- and cross-attention, and its causal mask."""
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 16, "dropout": 0.0, "batch_first": True}
    model = nn.Transformer(
        num_encoder_layers=2, num_decoder_layers=2, norm_first=norm_first, dtype=torch.float64, **sizes
    )
    before = trace(model)
    source, aim = torch.randn(2, 5, WIDTH, dtype=torch.float64), torch.randn(2, 4, WIDTH, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    given = {"tgt_mask": causal, "src_key_padding_mask": padding, "memory_key_padding_mask": padding}
    base = model.eval()(source, aim, **given)
    injection = peftcore.apply(model, METHODS["in_front"], dtype="float64")
    assert len(injection.operators) == 6
    with torch.no_grad():
        evaluated = model.eval()(source, aim, **given)
    trained = model.train()(source, aim, **given)
    torch.testing.assert_close(evaluated, trained, rtol=1e-10, atol=1e-10)
    assert (trained - base).abs().max() > 1e-2
    later = aim.clone()
    later[:, -1] += 1.0
    torch.testing.assert_close(model(source, later, **given)[:, :-1], trained[:, :-1])
    injection.remove()
    assert differences(before, trace(model.train())) == ""
    torch.testing.assert_close(model.eval()(source, aim, **given), base)


def test_the_matrices_that_other_adapters_change_are_used() -> None:
    """A LoRA on the fused projection and on the output beside a prefix: as merged."""
    ours, _, _ = pair()
    lora = peftcore.apply(ours, "lora", name="lora", target="all-linear", dtype="float64")
    with torch.no_grad():
        for parameter in lora.parameters():
            parameter.normal_()
    peftcore.activate(ours, *peftcore.injections(ours))
    x = torch.randn(4, 2, WIDTH, dtype=torch.float64)
    expected = ours(x, x, x)[0]
    lora.merge()
    torch.testing.assert_close(ours(x, x, x)[0], expected)
    lora.unmerge()
    with lora.disabled():
        assert not torch.allclose(ours(x, x, x)[0], expected)


@pytest.mark.parametrize("training", [False, True])
def test_rows_of_adapters_that_change_matrices_and_attention(training: bool) -> None:
    """In a route rows are those of their own adapter, whose matrices and keys both act in the one module."""
    torch.manual_seed(0)
    host = Host(batch_first=True).train(training)
    x = torch.randn(4, 5, WIDTH, dtype=torch.float64)
    parts = [
        {"method": "lora", "rank": 2, "target": "attention.in_proj_weight"},
        {"method": "p_tuning_v2", "length": 2, "dropout": 0.0, "target": "attention"},
    ]
    names = ["both", "other", "matrix"]
    for name in names:
        chosen = parts if name != "matrix" else parts[:1]
        injection = peftcore.apply(host, "config_union", parts=chosen, name=name, dtype="float64")
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter.normal_(std=0.3)
    alone = {}
    for name in [*names, None]:
        with peftcore.activate(host, *([] if name is None else [name])):
            alone[name] = host(x, x, x)[0]
    rows = ["both", None, "other", "matrix"]
    with peftcore.route(host, rows):
        together = host(x, x, x)[0]
    for row, name in enumerate(rows):
        torch.testing.assert_close(together[row], alone[name][row], rtol=1e-10, atol=1e-12)
    assert (alone["both"] - alone["other"]).abs().max() > 1e-2


def test_dropout_drops_weights() -> None:
    torch.manual_seed(0)
    ours = Host(dropout=0.5)
    peftcore.apply(ours, METHODS["in_front"], target="attention", dtype="float64")
    x = torch.randn(4, 2, WIDTH, dtype=torch.float64)
    evaluated = ours.eval()(x, x, x)[0]
    drawn = [ours.train()(x, x, x, need_weights=need)[0] for need in (False, True)]
    assert all(not torch.allclose(each, evaluated) for each in drawn)
    _, weights = ours(x, x, x, average_attn_weights=False)
    assert 0.3 < float((weights == 0).double().mean()) < 0.7


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_keys_of_its_own_are_refused(options: Any) -> None:
    model = Host(**options)
    before = trace(model)
    with pytest.raises(UnsupportedSite, match="keys of its own"):
        peftcore.apply(model, METHODS["in_front"], target="attention")
    assert differences(before, trace(model)) == ""


def test_a_copy_goes_its_own_way() -> None:
    ours, _, operator = pair()
    x = torch.randn(4, 2, WIDTH, dtype=torch.float64)
    expected, copy = ours(x, x, x)[0], deepcopy(ours)
    with torch.no_grad():
        operator.key.zero_()
    assert torch.equal(copy(x, x, x)[0], expected)
    assert not torch.allclose(ours(x, x, x)[0], expected)
