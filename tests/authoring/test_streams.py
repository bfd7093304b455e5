"""A stream of rows beside the tokens of a diffusion transformer computes what its blocks compute of both in one
sequence: outputs and gradients, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from dit_hosts import IMAGE, NAMES, ROTARY, SHAPES, SIZES, TEXT, blocks_of, dit_host, grid, inputs_of, joined
from torch import Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, RowStream, StreamSite, Tags, add_stream, stream_sites
from peftcore.errors import PluginError, SequenceError, TrainingError, UnsupportedSite

ROWS = 3


class Options(MethodConfig):
    """Options of the toy."""

    method: Literal["toy_stream"] = "toy_stream"
    beside_text: bool = False
    sees_tokens: bool = True
    timestep: float | None = None


class Trained(RowStream):
    """Trained rows, or with a timestep those that the transformer makes of an input of the call."""

    def __init__(self, site: StreamSite, config: Options) -> None:
        self.beside_text, self.sees_tokens, self.timestep = config.beside_text, config.sees_tokens, config.timestep
        super().__init__(site)
        self.prompt = nn.Parameter(torch.randn(ROWS, self.width))

    def second(self, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if self.timestep is None:
            return None
        told = peftcore.author.forward_context().context
        return {**given, "timestep": torch.full_like(given["timestep"], self.timestep), **told}

    def first(self, given: Mapping[str, Any]) -> Mapping[str, Any]:
        (prompt,) = self.cast(given[IMAGE], self.prompt)
        return self.alike(given, prompt.sin().expand(len(given[IMAGE]), -1, -1))


class Streams(Method):
    """A stream in each diffusion transformer."""

    name, Config, target = "toy_stream", Options, "block"
    tags = Tags(category="diffusion", paper="none", identity_at_init=False, per_row=False)

    def inject(self, model: nn.Module, config: Any, surgeon: peftcore.author.Surgeon) -> None:
        for site in stream_sites(surgeon):
            add_stream(surgeon, site, Trained, config)

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return ROWS * site.out_features if isinstance(site, StreamSite) else 0


def adapted(name: str, **options: Any) -> tuple[Any, Any, Trained, dict[str, Any]]:
    base, given = dit_host(name)
    model = deepcopy(base)
    injection = peftcore.apply(model, Streams, dtype="float64", **options)
    stream = next(each for each in injection.operators.values() if isinstance(each, Trained))
    return base, model, stream, given


def step(model: Any, given: dict[str, Any], *leaves: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The output, and the gradients of leaves and of the image."""
    image = given[IMAGE].clone().requires_grad_()
    output: Tensor = model(**{**given, IMAGE: image}).sample
    torch.manual_seed(5)
    return output, torch.autograd.grad((output * torch.randn_like(output)).sum(), (image, *leaves))


def assert_equal(ours: Any, theirs: Any, base: Tensor) -> None:
    (output, gradients), (expected, wanted) = ours, theirs
    assert (expected - base).abs().max() > 1e-2 * base.abs().max()
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for one, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 1e-6
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # SD3's norms are in float32


CASES = [(name, IMAGE) for name in NAMES] + [("sd3", TEXT), ("flux", TEXT)]


@pytest.mark.parametrize(("name", "beside"), CASES)
def test_rows_beside_tokens_are_rows_among_them(name: str, beside: str) -> None:
    base, model, stream, given = adapted(name, beside_text=beside == TEXT)
    leaf = stream.prompt.detach().clone().requires_grad_()
    ours = step(model, given, stream.prompt)
    with joined(base, {0: leaf.sin()}, beside_text=beside == TEXT):
        theirs = step(base, given, leaf)
    assert_equal(ours, theirs, base(**given).sample)


@pytest.mark.parametrize("timestep", [None, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_go_through_checkpoints_of_blocks(name: str, timestep: float | None) -> None:
    """Of trained rows, and of an input of which the transformer makes some."""
    _, model, stream, given = adapted(name, timestep=timestep)
    second = inputs_of(name)[IMAGE].requires_grad_()
    leaf = stream.prompt if timestep is None else second
    with peftcore.call(model, **{IMAGE: second}):
        plain = step(model, given, leaf)
        model.train().enable_gradient_checkpointing()
        again = step(model, given, leaf)
    torch.testing.assert_close(plain, again)


def made_of(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """What the first block is given by the transformer alone."""
    found: dict[str, Any] = {}

    def keep(block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(kwargs, **({IMAGE: args[0]} if args else {}))

    removed = blocks_of(model)[0].register_forward_pre_hook(keep, with_kwargs=True)
    model(**given)
    removed.remove()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_transformer_makes_rows_of_a_second_input(name: str) -> None:
    """With the places that they have there; here the timestep is that of the image."""
    base, model, _, given = adapted(name, timestep=0.0)
    given["timestep"] = torch.zeros_like(given["timestep"])
    torch.manual_seed(9)
    told: dict[str, Any] = {IMAGE: inputs_of(name)[IMAGE]}
    if name == "flux":
        told |= {"img_ids": grid(4, 4).double() + 7.0}
    made = made_of(base, {**given, **told})
    angles = None
    if name == "flux":
        cos, sin = made[ROTARY]
        angles = cos[3:], sin[3:]  # without those of the text
    with peftcore.call(model, **told):
        ours = step(model, given)
    with joined(base, {0: made[IMAGE]}, angles):
        theirs = step(base, given)
    assert_equal(ours, theirs, base(**given).sample)


def pixart_by_hand(model: Any, given: dict[str, Any], second: dict[str, Any], sees: bool) -> Tensor:
    """PixArt's blocks on [image; rows], each token modulated by its own timestep."""
    one, other = made_of(model, given), made_of(model, second)
    tokens = one[IMAGE].shape[1]
    x, text = torch.cat([one[IMAGE], other[IMAGE]], 1), one[TEXT]
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
    if not sees:
        seen[tokens:, :tokens] = False

    def attend(attention: Any, q: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        parts = (attention.to_q(q), attention.to_k(kv), attention.to_v(kv))
        query, key, value = (part.unflatten(-1, (2, 8)) for part in parts)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * 8**-0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        mixed: Tensor = attention.to_out[0](torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(2))
        return mixed

    def norm(h: Tensor) -> Tensor:
        return nn.functional.layer_norm(h, (16,), eps=1e-6)

    for block in model.transformer_blocks:
        table = block.scale_shift_table
        by_stream = [(table + each["timestep"].unflatten(-1, (6, 16)))[:, None] for each in (one, other)]
        both = [each.expand(-1, n, -1, -1) for each, n in zip(by_stream, (tokens, x.shape[1] - tokens), strict=True)]
        shift, scale, gate, shift_2, scale_2, gate_2 = torch.cat(both, 1).unbind(2)
        h = norm(x) * (1 + scale) + shift
        x = x + gate * attend(block.attn1, h, h, seen)
        x = x + attend(block.attn2, x, text, None)
        x = x + gate_2 * block.ff(norm(x) * (1 + scale_2) + shift_2)
    return x[:, :tokens]


@pytest.mark.parametrize("sees", [True, False])
def test_rows_have_a_timestep_of_their_own(sees: bool) -> None:
    base, model, _, given = adapted("pixart", timestep=700.0, sees_tokens=sees)
    torch.manual_seed(9)
    image = inputs_of("pixart")[IMAGE]
    found = []
    removed = blocks_of(model)[-1].register_forward_hook(lambda block, args, output: found.append(output))
    with peftcore.call(model, **{IMAGE: image}):
        model(**given)
    removed.remove()
    second = {**given, IMAGE: image, "timestep": torch.full_like(given["timestep"], 700)}
    expected = pixart_by_hand(base, given, second, sees)
    torch.testing.assert_close(found[-1], expected, rtol=1e-9, atol=1e-9)
    alike = pixart_by_hand(base, given, {**second, "timestep": given["timestep"]}, sees)
    assert (expected - alike).abs().max() > 1e-3


@contextmanager
def alone(*streams: int) -> Iterator[None]:
    """The last tokens of each attention are rows of streams of these lengths, which see nothing but themselves."""
    plain = F.scaled_dot_product_attention

    def masked(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        seen = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool)
        end = len(seen)
        for rows in streams[::-1]:
            seen[end - rows : end] = False
            seen[end - rows : end, end - rows : end] = True
            end -= rows
        return plain(query, key, value, **{**options, "attn_mask": seen})

    F.scaled_dot_product_attention = masked
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


@pytest.mark.parametrize("name", ["dit", "flux"])
def test_streams_do_not_see_each_other(name: str) -> None:
    """Tokens see all of them, and these rows see themselves alone."""
    base, given = dit_host(name)
    model, prompts = deepcopy(base), []
    for called, seed in (("one", 1), ("other", 2)):
        injection = peftcore.apply(model, Streams, name=called, dtype="float64", seed=seed, sees_tokens=False)
        prompts += [each.prompt.detach().sin() for each in injection.operators.values() if isinstance(each, Trained)]
    with peftcore.activate(model, "other"):
        other = model(**given).sample
        with joined(base, {0: prompts[1]}), alone(ROWS):
            torch.testing.assert_close(other, base(**given).sample, rtol=1e-9, atol=1e-9)
    peftcore.activate(model, "one", "other")
    both = model(**given).sample
    with joined(base, {0: torch.cat(prompts)}), alone(ROWS, ROWS):
        torch.testing.assert_close(both, base(**given).sample, rtol=1e-9, atol=1e-9)
    assert (both - other).abs().max() > 1e-3


@pytest.mark.slow
def test_one_graph_with_the_same_numbers() -> None:
    _, model, stream, given = adapted("dit")
    expected = step(model, given, stream.prompt)
    torch.compiler.reset()
    compiled = step(torch.compile(model, fullgraph=True, backend="aot_eager"), given, stream.prompt)
    torch.testing.assert_close(compiled, expected, rtol=1e-8, atol=1e-8)


def test_off_and_removed() -> None:
    base, model, _, given = adapted("sd3")
    expected = base(**given).sample
    (injection,) = peftcore.injections(model).values()
    with injection.disabled():
        assert torch.equal(model(**given).sample, expected)
    copied = deepcopy(model)
    assert torch.equal(copied(**given).sample, model(**given).sample)
    injection.remove()
    assert torch.equal(model(**given).sample, expected)


def test_what_it_refuses() -> None:
    diffusers = pytest.importorskip("diffusers")
    with pytest.raises(UnsupportedSite, match="the text is not a stream"):
        adapted("pixart", beside_text=True)
    with pytest.raises(UnsupportedSite, match="no diffusion transformer"):
        peftcore.apply(nn.Sequential(nn.Linear(2, 2)), Streams, target="0")
    twice = diffusers.SD3Transformer2DModel(**SIZES, **SHAPES["sd3"][1], dual_attention_layers=(0,))
    with pytest.raises(UnsupportedSite, match="not have exactly one self-attention"):
        peftcore.apply(twice, Streams)
    _, model, stream, given = adapted("pixart")
    with pytest.raises(SequenceError, match="attention_mask"):
        model(**given, attention_mask=torch.ones(2, 16, dtype=torch.float64))
    stream.prompt.data = stream.prompt.data[:, :3]
    with pytest.raises(PluginError, match="rows of"):
        model(**given)
    _, model, _, given = adapted("dit", timestep=0.0)
    with (
        pytest.raises(SequenceError, match="2 sequences of tokens, but 1 of rows"),
        peftcore.call(model, **{IMAGE: given[IMAGE][:1]}),
    ):
        model(**{**given, "timestep": torch.tensor([3, 5])})


def test_reentrant_checkpoints_are_an_error() -> None:
    _, model, _, given = adapted("dit")
    model.train().enable_gradient_checkpointing(
        lambda module, *args: torch.utils.checkpoint.checkpoint(module, *args, use_reentrant=True)
    )
    image = given[IMAGE].clone().requires_grad_()
    with pytest.raises(TrainingError, match="reentrant"):
        model(**{**given, IMAGE: image})
