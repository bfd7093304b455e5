"""The blocks of a model as target modules: their numbers, their stacks, the width of their streams."""

from typing import Any, Literal

import pytest
import torch
import transformers
from torch import nn

import peftcore
from peftcore.author import (
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
from peftcore.errors import RouteError, UnsupportedSite

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
        return peftcore.author.on_first(call(*args, **kwargs), lambda h: h + self.shift)


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
    with pytest.raises(UnsupportedSite, match="not a block of this host; use target='block'"):
        found(model, "model.layers.0.mlp.up_proj")


def test_a_path_without_numbers_is_that_of_the_stack() -> None:
    assert stack_path("h.12.attn.0.q") == "h.*.attn.*.q"


ENCODER = {
    "vocab_size": 64, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "embedding_size": 24, "num_labels": 3,
}  # fmt: skip


def albert(groups: int = 1) -> nn.Module:
    """A host with one block for all of its layers, or with one each."""
    config = transformers.AlbertConfig(**ENCODER, num_hidden_groups=groups)
    return transformers.AlbertForTokenClassification(config).eval()


def xlnet() -> nn.Module:
    """A host whose blocks are given tokens in front of rows."""
    config = transformers.XLNetConfig(vocab_size=64, d_model=24, n_layer=2, n_head=4, d_inner=32)
    return transformers.XLNetForTokenClassification(config).eval()


def fsmt() -> nn.Module:
    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    vocabularies = {"langs": ["en", "de"], "src_vocab_size": 50, "tgt_vocab_size": 50}
    config = transformers.FSMTConfig(d_model=16, encoder_layers=2, decoder_layers=2, **vocabularies, **sizes)
    return transformers.FSMTForConditionalGeneration(config).eval()


def torchs_own() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False).eval()


def refused(model: nn.Module, match: str, method: str, **options: Any) -> None:
    """A method is refused when it is applied, and when it is planned, and the model stays as it was."""
    before = {name: type(module) for name, module in model.named_modules()}
    for act in (peftcore.plan, peftcore.apply):
        with pytest.raises(UnsupportedSite, match=match):
            act(model, method, **options)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("method", "host"),
    [
        *((method, host) for method in ("loreft", "lst", "k_adapter", "pal") for host in (xlnet, fsmt, torchs_own)),
        *(("tiny_attention_adapter", host) for host in (fsmt, torchs_own)),  # there is no such target in XLNet
    ],
)
def test_blocks_with_tokens_in_front_of_rows_are_refused(method: str, host: Any) -> None:
    options = {"width": 12} if method == "pal" else {}
    refused(host(), "gets tokens in front of rows of the batch", method, **options)


@pytest.mark.parametrize("method", ["lpt", "prefix_propagation", "side_tuning", "pha"])
def test_so_is_what_knows_tokens_by_their_stack(method: str) -> None:
    refused(xlnet(), "gets tokens in front of rows of the batch", method)


@pytest.mark.parametrize("method", ["lst", "k_adapter", "side_tuning", "shadow", "prefix_propagation", "ciat"])
def test_one_block_of_several_layers_is_refused_where_something_is_kept_or_joins_once(method: str) -> None:
    refused(albert(), "runs several times in one forward", method)


@pytest.mark.parametrize("method", ["lst", "k_adapter", "prefix_propagation", "ciat"])
def test_and_is_taken_where_each_layer_has_its_own(method: str) -> None:
    model, ids = albert(groups=3), torch.randint(1, 64, (2, 5))
    peftcore.apply(model, method)
    assert model(ids).logits.shape == (2, 5, 3)


@pytest.mark.parametrize(
    ("method", "options"),
    [("lora", {}), ("houlsby_adapter", {}), ("houlsby_adapter", {"target": "block"}), ("loreft", {}), ("ia3", {}),
     ("pal", {"width": 12}), ("ciat", {"embeddings": False}), ("tiny_attention_adapter", {})],
)  # fmt: skip
def test_what_acts_at_each_run_by_itself_goes_on(method: str, options: Any) -> None:
    """The same operator at each of the three runs."""
    model, ids = albert(), torch.randint(1, 64, (2, 5))
    before = model(ids).logits
    adapter = peftcore.apply(model, method, **options)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    alone = torch.cat([model(row[None]).logits for row in ids])
    assert not torch.allclose(alone, before, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "houlsby_adapter", "ia3"])
def test_what_acts_on_each_token_goes_on_with_tokens_first(method: str) -> None:
    model, ids = xlnet(), torch.randint(1, 64, (3, 3))
    adapter = peftcore.apply(model, method, target="all-linear" if method != "houlsby_adapter" else "mlp.output")
    before = model(ids).logits
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_(0, 0.3)
    alone = torch.cat([model(row[None]).logits for row in ids])
    assert not torch.allclose(alone, before, atol=1e-3)
    torch.testing.assert_close(model(ids).logits, alone, rtol=1e-4, atol=1e-4)


def test_rows_and_tasks_cannot_be_told_apart_where_tokens_are_first() -> None:
    model, ids = xlnet(), torch.randint(1, 64, (2, 4))
    peftcore.apply(model, "lora", name="a", target="mlp.up")
    with (
        pytest.raises(RouteError, match="rows of the batch cannot be distinguished"),
        peftcore.route(model, ["a", None]),
    ):
        model(ids)
    model = xlnet()
    peftcore.apply(model, "mtl_lora", tasks=2, target="mlp.up")
    with peftcore.call(model, task=0):
        model(ids)
    with pytest.raises(RouteError, match="cannot be assigned to 2 tasks"), peftcore.call(model, task=[0, 1]):
        model(ids)
    refused(xlnet(), "gets tokens in front of rows", "unipelt", target="mlp.output", gate="sequence")


SECRET = """
class Secret(Plain):
    def forward(self, x):
        for _ in range(self.rounds):
            for layer in self.layers:
                x = layer(x)
        return x
"""


class Plain(nn.Module):
    """A host whose code nobody can read, in a subclass that is made of a string."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)]
        self.layers, self.rounds = nn.ModuleList(layers), rounds


@pytest.mark.parametrize("rounds", [1, 2])
def test_where_the_code_does_not_say_it_the_first_forward_does(rounds: int) -> None:
    made: dict[str, Any] = {"Plain": Plain}
    exec(SECRET, made)
    model = made["Secret"](rounds).eval()
    peftcore.apply(model, "lst", reduction=2)
    x = torch.randn(2, 5, 8)
    if rounds == 1:
        assert model(x).shape == x.shape
        return
    for _ in range(2):
        with pytest.raises(UnsupportedSite, match=r"layers\.[01] runs several times in one forward"):
            model(x)


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
    with pytest.raises(UnsupportedSite, match="not in a block"):
        around(transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)), "norm.final")
