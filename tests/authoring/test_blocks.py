"""The blocks of a model as target modules: their numbers, their stacks, the width of their streams."""

from typing import Any, Literal

import pytest
import torch
import transformers
from torch import nn

import peftcore
from peftcore import (
    BlockSite,
    Method,
    MethodConfig,
    Operator,
    Tags,
    block_around,
    block_depths,
    block_sites,
    stack_path,
)
from peftcore.errors import UnsupportedSite

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}
T5 = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4, "vocab_size": 64}


class NoOptions(MethodConfig):
    method: Literal["looks_at_blocks"] = "looks_at_blocks"


class Nothing(Operator):
    """Adds a vector to what a block returns."""

    def __init__(self, site: BlockSite, config: Any) -> None:
        super().__init__(site)
        self.shift = nn.Parameter(torch.zeros(site.width))

    def forward(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        return peftcore.on_first(call(*args, **kwargs), lambda h: h + self.shift)


def found(model: nn.Module, target: Any = None) -> tuple[list[BlockSite], dict[Any, int]]:
    """The block sites that a method finds, and the numbers of all blocks."""
    seen: dict[str, Any] = {}

    class Looks(Method):
        name = "looks_at_blocks"
        Config = NoOptions
        tags = Tags(category="additive", paper="none")
        target = ("block",)

        def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
            seen["sites"], seen["depths"] = block_sites(surgeon), block_depths(surgeon)
            for site in seen["sites"]:
                surgeon.graft(site, Nothing, config)

        @staticmethod
        def parameter_count(site: BlockSite, config: Any) -> int:
            return site.width

    options = {} if target is None else {"target": target}
    peftcore.apply(model, Looks, **options)
    return seen["sites"], seen["depths"]


def test_blocks_know_their_number_their_stack_and_their_width() -> None:
    sites, depths = found(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)))
    assert [site.path for site in sites] == [f"model.layers.{n}" for n in range(3)]
    assert [(site.depth, site.blocks, site.width, site.stack) for site in sites] == [
        (n, 3, 32, "model.layers.*") for n in range(3)
    ]
    assert sites[0].weight_shape == torch.Size([32])
    assert depths == {f"model.layers.{n}": n for n in range(3)}


def test_each_stack_counts_by_itself() -> None:
    sites, _ = found(transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)))
    assert [(site.stack, site.depth, site.blocks) for site in sites] == [
        *(("encoder.block.*", n, 2) for n in range(2)),
        *(("decoder.block.*", n, 3) for n in range(3)),
    ]


def test_what_is_no_block_is_refused() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    with pytest.raises(UnsupportedSite, match="no block of this host; target the role block"):
        found(model, "model.layers.0.mlp.up_proj")


def test_a_path_without_numbers_is_that_of_the_stack() -> None:
    assert stack_path("h.12.attn.0.q") == "h.*.attn.*.q"


def around(model: nn.Module, target: str) -> list[tuple[str, int, int, int]]:
    """The blocks around target modules: paths, numbers, how many there are, and widths."""
    seen: list[BlockSite] = []

    class Looks(Method):
        name = "looks_at_blocks"
        Config = NoOptions
        tags = Tags(category="additive", paper="none")
        target = ("block",)

        def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
            seen.extend(block_around(surgeon, site) for site in surgeon.sites())
            surgeon.graft(seen[0], Nothing, config)

        @staticmethod
        def parameter_count(site: BlockSite, config: Any) -> int:
            return site.width

    peftcore.apply(model, Looks, target=target)
    return [(site.path, site.depth, site.blocks, site.width) for site in seen]


def test_the_block_around_a_module() -> None:
    """The innermost one; a block is around itself, and what is outside of all blocks is in none."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    found = [(f"model.layers.{n}", n, 3, 32) for n in range(3)]
    assert around(llama, "mlp.down") == found
    peftcore.injections(llama)["looks_at_blocks"].remove()
    assert around(llama, "block") == found
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    assert around(t5, "cross.q") == [(f"decoder.block.{n}", n, 3, 32) for n in range(3)]
    with pytest.raises(UnsupportedSite, match="in no block"):
        around(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), "norm.final")
