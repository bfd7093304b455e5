"""What the tests of sequence edits share: a method that only puts rows in front, and hosts in float64."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from host_zoo import VOCABULARY, build
from torch import Tensor, nn

import peftcore
from peftcore.author import InnerRows, Method, MethodConfig, SequenceOperator, SequenceSite, Site, Surgeon, Tags

torch.set_num_threads(1)
LENGTH = 3
NEW = 9
GREEDY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "eos_token_id": None,
    "forced_eos_token_id": None,
    "output_logits": True,
    "return_dict_in_generate": True,
}
PATHS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 4},
    "static_chunked": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


class RowsConfig(MethodConfig):
    """Options of the toy."""

    method: Literal["toy_rows"] = "toy_rows"
    length: int = LENGTH
    """Rows in front."""
    by_input: bool = False
    """Let the rows follow the tokens, so that each of the batch has its own."""


class RowsOperator(SequenceOperator):
    def __init__(self, site: SequenceSite, config: RowsConfig) -> None:
        super().__init__(site, config.length)
        self.by_input = config.by_input
        self.value = nn.Parameter(torch.randn(config.length, self.width) * 0.7)

    def rows(self, embeds: Tensor) -> Tensor:
        if not self.by_input:
            return self.value
        value: Tensor = self.value.to(embeds.dtype) * embeds[:, :1].tanh()
        return value


class Rows(Method):
    """The least method that edits the sequence."""

    name = "toy_rows"
    Config = RowsConfig
    tags = Tags(category="additive", paper="none", identity_at_init=False, per_row=False)
    target = "stack"

    def inject(self, model: nn.Module, config: RowsConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, RowsOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: RowsConfig) -> int:
        return config.length * site.out_features


@torch.no_grad()
def stirred(model: nn.Module) -> nn.Module:
    """In float64, with weights large enough that every token and every mask shows in the outputs."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.1))
    if any(name.endswith("experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # grouped products of torch have no float64
    return model.double().eval().requires_grad_(False)


WINDOWED: dict[str, tuple[str, dict[str, Any]]] = {
    "short_mistral": ("mistral", {"sliding_window": 5}),
    "hybrid": ("gemma3_text", {"layer_types": ["sliding_attention", "full_attention"]}),
    "qwen2_window": ("qwen2", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5}),
    "chunked": ("llama4", {"layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 5}),
}
"""Hosts of the zoo with other options: a window that the rows nearly fill; one layer with a window, or with attention
in chunks, and one without."""
SINGLE = ("bloom", "mpt", "gemma2")
"""Hosts whose attention takes the softmax of its mask in float32, in which the lowest float64 is infinite: places that
see nothing give nan, in the bare host too."""


def host(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A host in float64, and its inputs."""
    kind, options = WINDOWED.get(name, (name, {}))
    model, inputs = build(kind)
    if options:
        config = type(model.config)(**{**model.config.to_dict(), "use_sliding_window": True, **options})
        with torch.random.fork_rng():
            model = type(model)(config)
    floating = {key: value.double() for key, value in inputs.items() if value.is_floating_point()}
    return stirred(model), {**inputs, **floating}


def for_padding(name: str) -> nn.Module:
    """A host for sequences that begin with padding, in the precision in which it can run them."""
    model = host(name)[0]
    return model.float() if name in SINGLE else model


def adapt(model: nn.Module, **options: Any) -> tuple[nn.Module, peftcore.Injection, Tensor]:
    """The bare copy, the injection and its rows."""
    base = deepcopy(model)
    injection = peftcore.apply(model, Rows, dtype="float64", **options)
    (operator,) = injection.operators.values()
    return base, injection, operator.value


def tokens(rows: int = 2, length: int = 6, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY - 1, (rows, length), generator=generator)


def padded(mask: Tensor, left: int = 0, right: int = 0) -> Tensor:
    """The mask with padding in its last row."""
    mask = mask.clone()
    mask[-1, :left] = 0
    if right:
        mask[-1, -right:] = 0
    return mask


def in_front(rows: Tensor, embeds: Tensor) -> Tensor:
    return torch.cat([rows.to(embeds.dtype).expand(len(embeds), -1, -1), embeds], dim=1)


def ones_in_front(mask: Tensor, count: int = LENGTH) -> Tensor:
    return torch.cat([torch.ones(len(mask), count, dtype=mask.dtype), mask], dim=1)


def close(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


def by_hand(base: Any, rows: Tensor, ids: Tensor, **given: Tensor) -> Tensor:
    """The bare host's logits behind the rows."""
    embeds = in_front(rows, base.get_input_embeddings()(ids))
    logits: Tensor = base(inputs_embeds=embeds, use_cache=False, **given).logits[:, LENGTH:]
    return logits


class InnerConfig(MethodConfig):
    """Options of the toy whose rows come in further in."""

    method: Literal["toy_inner"] = "toy_inner"
    length: int = LENGTH
    """Rows."""
    blocks: list[int] = [1]  # noqa: RUF012  # pydantic copies it
    """The blocks at which they are made."""
    counted: bool = False
    """Let positions of tokens go on behind them."""


class InnerOperator(InnerRows):
    def __init__(self, site: SequenceSite, config: InnerConfig) -> None:
        super().__init__(site, config.length)
        self.value = nn.Parameter(torch.randn(len(config.blocks), config.length, self.width) * 0.7)

    def rows_at(self, depth: int, states: Tensor, rows: Tensor, given: Mapping[str, Any]) -> Tensor:
        value = self.value[self.depths.index(depth)].to(rows.dtype)
        return value if depth == self.depths[0] else value + 0.5 * rows


class Inner(Method):
    """The least method whose rows are made at blocks."""

    name = "toy_inner"
    Config = InnerConfig
    tags = Tags(category="additive", paper="none", identity_at_init=False, per_row=False)
    target = "stack"

    def inject(self, model: nn.Module, config: InnerConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.sequence(site, InnerOperator, config, blocks=config.blocks, counted=config.counted)

    @staticmethod
    def parameter_count(site: Site, config: InnerConfig) -> int:
        inside = isinstance(site, SequenceSite)
        return len(config.blocks) * config.length * site.out_features if inside else 0


def same(output: Any, ids: Tensor, scores: list[Tensor]) -> None:
    assert torch.equal(output.sequences, ids)
    assert len(output.logits) == len(scores)
    for ours, other in zip(output.logits, scores, strict=True):
        torch.testing.assert_close(ours.double(), other.double(), rtol=1e-5, atol=1e-5)  # generate keeps float32
