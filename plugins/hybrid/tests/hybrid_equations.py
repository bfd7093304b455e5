"""Hosts in float64, and their attention with a prefix, adapters and low-rank updates written a second time: as hooks,
and in the place of the attention function of the host's file; and what the authors' code gave, to compare with."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.testing.hosts import HOSTS

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Attention:
    """Where an attention's parts are, written down by hand: paths below it, and the columns of a fused output."""

    path: str
    q: str
    v: str
    rows: tuple[slice, slice] = (slice(None), slice(None))
    suffixes: tuple[str, str] = ("", "")
    """What follows the matrices' paths in the names of operators."""

    def at(self, layer: int) -> Attention:
        return Attention(self.path.format(layer), self.q, self.v, self.rows, self.suffixes)

    @property
    def operators(self) -> tuple[str, str, str]:
        """The names of the operators: the attention's, the queries', the values'."""
        q, v = (f"{self.path}.{name}{end}" for name, end in zip((self.q, self.v), self.suffixes, strict=True))
        return f"{self.path}:attention", q, v


ATTENTIONS: dict[str, list[Attention]] = {
    "llama": [Attention("model.layers.{}.self_attn", "q_proj", "v_proj")],
    "bert": [Attention("bert.encoder.layer.{}.attention.self", "query", "value")],
    "gpt2": [
        Attention("transformer.h.{}.attn", "c_attn", "c_attn", (slice(0, 16), slice(32, 48)), (":attn.q", ":attn.v"))
    ],
    "t5": [
        Attention(path, "q", "v")
        for path in (
            "encoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.0.SelfAttention",
            "decoder.block.{}.layer.1.EncDecAttention",
        )
    ],
}
FEED_FORWARDS: dict[str, list[tuple[str, str]]] = {
    # what reads the feed-forward's input, and its last matrix
    "llama": [("model.layers.{}.mlp", "model.layers.{}.mlp.down_proj")],
    "bert": [("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense")],
    "gpt2": [("transformer.h.{}.mlp", "transformer.h.{}.mlp.c_proj")],
    "t5": [
        (f"{stack}.DenseReluDense", f"{stack}.DenseReluDense.wo")
        for stack in ("encoder.block.{}.layer.1", "decoder.block.{}.layer.2")
    ],
}
LAYERS = (0, 1)


def host(name: str) -> tuple[Any, dict[str, Tensor], Callable[[Any], Tensor]]:
    """The kit's host in float64, inputs with padding, and how to run it."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    model = model.double().eval().requires_grad_(False)
    return model, inputs, lambda each: HOSTS[name].output(each(**inputs))


@torch.no_grad()
def fill(injection: peftcore.Injection) -> None:
    for parameter in injection.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)


def copies(injection: peftcore.Injection) -> dict[str, dict[str, Tensor]]:
    """The tensors of operators and shared modules, by name, as leaves of their own."""
    return {
        path: {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
        for path, module in injection.modules()
    }


def prefix(tensors: Tensors, shared: Tensors | None, heads: int, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[heads, length, width]`` of a prefix that trains directly, or of the network that makes it."""
    if shared is None:
        flat = tensors["prefix"]
    else:
        hidden = torch.tanh(shared["embedding.weight"] @ shared["hidden.weight"].T + shared["hidden.bias"])
        flat = hidden @ tensors["out.weight"].T + tensors["out.bias"]
    key, value = flat.reshape(length, 2, heads, -1).permute(1, 2, 0, 3)
    return key, value


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, added: list[Tensor | None]) -> Tensor:
    """``[rows, tokens, heads, width]``; what is added to the scores speaks of the last keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    for each in added:
        if each is not None:
            front = key.shape[2] - each.shape[-1]
            scores = scores + torch.cat([each.new_zeros(*each.shape[:-1], front), each], -1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdim=True), value)


Edit = Callable[[str, Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]
"""``(path, attend, key, value) -> output``, where ``attend(key, value)`` is the attention with these queries."""


@contextmanager
def attention_by(model: Any, edit: Edit) -> Iterator[None]:
    """The host computes its attention by the equation here, with an edit: the function of its file is replaced."""
    file = sys.modules[type(model).__module__]
    paths = {id(module): path for path, module in model.named_modules()}
    before = file.eager_attention_forward
    model.set_attn_implementation("eager")

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Any:
        added = [options.pop("attention_mask", mask), options.get("position_bias")]

        def attend(keys: Tensor, values: Tensor) -> Tensor:
            return softmax_attention(query, keys, values, options["scaling"], added)

        return edit(paths[id(module)], attend, key, value), None

    file.eager_attention_forward = attention
    try:
        yield
    finally:
        file.eager_attention_forward = before


def in_front(front: Tensor, own: Tensor) -> Tensor:
    """``[rows, heads, keys, width]`` behind a prefix ``[heads, length, width]`` or ``[rows, heads, length, width]``."""
    return torch.cat([front.expand(len(own), -1, -1, -1), own], 2)


def compare(injection: peftcore.Injection, tensors: Mapping[str, Tensors], ours: Tensor, expected: Tensor) -> None:
    """Outputs and the gradients of every tensor."""
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    leaves = [(path, name, leaf) for path, each in tensors.items() for name, leaf in each.items()]
    theirs = torch.autograd.grad((expected * direction).sum(), [leaf for _, _, leaf in leaves])
    (ours * direction).sum().backward()
    modules = dict(injection.modules())
    assert len(leaves) == len(list(injection.parameters()))
    for (path, name, _), gradient in zip(leaves, theirs, strict=True):
        assert gradient.abs().max() > 0, f"{path}.{name} has no gradient"
        torch.testing.assert_close(modules[path].get_parameter(name).grad, gradient, rtol=1e-8, atol=1e-10)


TINY: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 2, "max_position_embeddings": 16, "type_vocab_size": 1}
TINY |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
"""Of the hosts in which the authors' code ran."""
Place = tuple[nn.Parameter, Sequence[str], slice]
"""A tensor of ours, and which tensors of the authors' have its numbers side by side, in which rows."""


def wave(shape: Sequence[int], key: str) -> Tensor:
    """The cosines that a tensor of this name has where numbers of the authors' code are made."""
    count = torch.Size(shape).numel()
    return torch.cos(torch.arange(count, dtype=torch.float64) * 1.7 + zlib.crc32(key.encode()) % 97).view(*shape) / 2


@torch.no_grad()
def waves(model: nn.Module) -> nn.Module:
    """In training, in float64."""
    for name, parameter in model.double().train().named_parameters():
        parameter.copy_(wave(parameter.shape, name))
    return model


def assert_frozen(model: nn.Module, inputs: Mapping[str, Tensor], places: Iterable[Place], numbers: Any) -> None:
    """The output, and gradients of all tensors that the authors' code trains."""
    gradients = {name: torch.tensor(each, dtype=torch.float64) for name, each in numbers["gradients"].items()}
    places = list(places)
    assert {name for _, names, _ in places for name in names} == set(gradients)

    def taken(place: Place, of: Callable[[str], Tensor]) -> Tensor:
        own, names, rows = place
        shape = (-1, own.shape[1] // len(names)) if own.dim() == 2 else (-1,)
        return torch.cat([of(name).view(shape)[rows] for name in names], -1)

    with torch.no_grad():
        for place in places:
            place[0].copy_(taken(place, lambda name: wave(gradients[name].shape, name)))
    y = model(**inputs).last_hidden_state
    (y.square() * wave(y.shape, "direction")).sum().backward()
    assert y.flatten().tolist() == pytest.approx(numbers["output"], abs=1e-8)
    for place in places:
        gradient = taken(place, gradients.__getitem__)
        assert gradient.any()
        torch.testing.assert_close(place[0].grad, gradient, rtol=0, atol=1e-8, msg=lambda m, p=place: f"{p[1]}: {m}")
