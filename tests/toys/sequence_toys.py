"""What the tests of sequence edits share: a method that only puts rows in front, and hosts in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, Literal

import torch
from host_zoo import VOCABULARY, build
from torch import Tensor, nn

import peftcore
from peftcore import Method, MethodConfig, SequenceOperator, SequenceSite, Site, Surgeon, Tags

torch.set_num_threads(1)
LENGTH = 3


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
