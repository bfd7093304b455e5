"""Where the rows of the batch are in what blocks are given, and how often a forward runs them: what the code says,
beside forwards that are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from peftcore.layers.layer import plain_class
from peftcore.roles import derive
from peftcore.roles.block_calls import CodeReader, alike

ROWS, TOKENS = 3, 5
SMALL = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3,
    "max_position_embeddings": 32,
}  # fmt: skip
XLNET = {"vocab_size": 50, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}
FSMT = {
    "langs": ["en", "de"], "src_vocab_size": 50, "tgt_vocab_size": 50, "d_model": 16, "encoder_layers": 2,
    "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {"vocab_size": 50, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
PERCEIVER = {
    "vocab_size": 50, "d_model": 16, "d_latents": 16, "num_latents": 4, "num_self_attends_per_block": 2,
    "num_self_attention_heads": 2, "num_cross_attention_heads": 2, "max_position_embeddings": TOKENS,
}  # fmt: skip
FUNNEL = {"vocab_size": 50, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24, "block_sizes": [1, 1]}
ZAMBA2 = {
    **SMALL, "num_mem_blocks": 1, "layers_block_type": ["mamba", "hybrid", "hybrid"], "mamba_d_state": 8,
    "n_mamba_heads": 2, "mamba_expand": 2, "use_mamba_kernels": False, "num_key_value_heads": 2, "adapter_rank": 4,
}  # fmt: skip
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], bool, bool]] = {
    "bert": ("Bert", SMALL, False, False),
    "llama": ("Llama", SMALL, False, False),
    "t5": ("T5", T5, False, False),
    "xlnet": ("XLNet", XLNET, True, False),
    "fsmt": ("FSMT", FSMT, True, False),
    "albert": ("Albert", {**SMALL, "embedding_size": 8}, False, True),
    "albert_of_two_groups": ("Albert", {**SMALL, "num_hidden_layers": 4, "num_hidden_groups": 2}, False, True),
    "albert_of_its_own_layers": ("Albert", {**SMALL, "num_hidden_groups": 3}, False, False),
    "perceiver": ("PerceiverForMaskedLM", {**PERCEIVER, "num_blocks": 1}, False, False),
    "perceiver_of_two_rounds": ("PerceiverForMaskedLM", {**PERCEIVER, "num_blocks": 2}, False, True),
    "funnel": ("Funnel", {**FUNNEL, "block_repeats": [1, 1]}, False, False),
    "funnel_that_repeats": ("Funnel", {**FUNNEL, "block_repeats": [2, 2]}, False, True),
    "zamba2": ("Zamba2", ZAMBA2, False, False),
}
"""By name: the family, its sizes, whether its blocks have tokens first, whether a forward runs one several times."""


def built(family: str, sizes: dict[str, Any]) -> nn.Module:
    config = getattr(transformers, f"{family.partition('For')[0]}Config")(**sizes)
    cls = getattr(transformers, family if "For" in family else f"{family}Model")
    return cls(config).eval()


def read(model: nn.Module) -> dict[str, tuple[bool, str]]:
    """By block, one of each kind: whether it has tokens first, and how often it runs."""
    reader = CodeReader(dict(model.named_modules()), plain_class)
    blocks = {alike(entry.path): entry.path for entry in reversed(derive(model).entries) if entry.role == "block"}
    return {path: (reader.tokens_first(path), reader.of(path).runs) for path in blocks.values()}


def counted(model: nn.Module, paths: Any, inputs: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """The same, in one forward of three rows of five tokens."""
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    for path, module in model.named_modules():
        if path in seen:

            def look(_: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
                seen[path].append(next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)))

            module.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    runs = {path: "once" if len(given) == 1 else "several" for path, given in seen.items()}
    return {path: (given[0].shape[1] == ROWS, runs[path]) for path, given in seen.items()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_code_says_what_a_forward_does(name: str) -> None:
    family, sizes, tokens_first, several = TRANSFORMERS[name]
    model = built(family, sizes)
    said = read(model)
    assert said and all(turned is tokens_first for turned, _ in said.values()), said
    assert ("several" in {runs for _, runs in said.values()}) is several, said
    ids = torch.randint(3, 50, (ROWS, TOKENS))
    more = {"decoder_input_ids": ids} if family in ("T5", "FSMT") else {}
    assert counted(model, said, {"input_ids": ids, **more}) == said


class Block(nn.Module):
    """A block of attention and a feed-forward."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x, x, x)[0]
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Turning(Block):
    def __init__(self) -> None:
        super().__init__(batch_first=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        x = x + self.attn(y, y, y)[0].transpose(0, 1)
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Fairseq(nn.Module):
    """A host that turns what it is given, as those of fairseq do."""

    def __init__(self, block: type[Block] = Block) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block() for _ in range(2)])
        self.rounds, self.turns = 2, True

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = layer(x)
        return x.transpose(0, 1)


class Straight(Fairseq):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class ByAttribute(Fairseq):
    """The host turns what it is given where an attribute says so, in a method."""

    def _turned(self, x: Tensor) -> Tensor:
        return torch.transpose(x, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.turns:
            x = self._turned(x)
        for number in range(len(self.layers)):
            x = self.layers[number](x)
        return x


class Rounds(Fairseq):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.rounds):
            for layer in self.layers:
                x = layer(x)
        return x


class Twice(Fairseq):
    def forward(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        for layer in self.layers:
            x = layer(x)
        for layer in self.layers:
            x = layer(x)
        return first(x)


class OneOrTheOther(Fairseq):
    """Two calls, of which a forward comes to one."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and x.requires_grad:
                x = torch.utils.checkpoint.checkpoint(layer.__call__, x, use_reentrant=False)
            else:
                x = layer(x)
        return x


class UntilItSettles(Fairseq):
    def forward(self, x: Tensor) -> Tensor:
        while x.norm() > 1:
            for layer in self.layers:
                x = layer(x)
        return x


class Regrouped(Fairseq):
    """What the host regroups has its rows anywhere."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1).reshape(x.shape[0], -1, x.shape[-1])
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "tokens_first", "runs"),
    [
        (Straight(), False, "once"),
        (Straight(lambda: Block(batch_first=False)), True, "once"),  # the user gives tokens first
        (Straight(Turning), False, "once"),
        (Fairseq(), True, "once"),
        (Fairseq(lambda: Block(batch_first=False)), True, "once"),
        (ByAttribute(), True, "once"),
        (Regrouped(), False, "once"),
        (Rounds(), False, "several"),
        (Twice(), False, "several"),
        (OneOrTheOther(), False, "once"),
        (UntilItSettles(), False, "unknown"),
        (nn.Sequential(*[Block()] * 2), False, "several"),
        (nn.Sequential(Block(), Block()), False, "once"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_each_way_in_which_code_can_say_it(model: nn.Module, tokens_first: bool, runs: str) -> None:
    path = next(path for path, module in model.named_modules() if isinstance(module, Block))
    reader = CodeReader(dict(model.named_modules()), plain_class)
    assert (reader.tokens_first(path), reader.of(path).runs) == (tokens_first, runs)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_layers(batch_first: bool) -> None:
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first), 2, enable_nested_tensor=False
    )
    reader = CodeReader(dict(model.named_modules()), plain_class)
    assert reader.tokens_first("layers.0") is not batch_first and reader.of("layers.0").runs == "once"


def test_one_block_in_several_places_of_a_list() -> None:
    model = Straight()
    model.layers = nn.ModuleList([model.layers[0]] * 3)
    assert CodeReader(dict(model.named_modules()), plain_class).of("layers.0").runs == "several"


def test_what_has_no_source_is_unknown() -> None:
    made: dict[str, Any] = {"Fairseq": Fairseq}
    exec("class Host(Fairseq):\n    def forward(self, x): return self.layers[1](self.layers[0](x))", made)
    stream = CodeReader(dict((model := made["Host"]()).named_modules()), plain_class).of("layers.0")
    assert stream.runs == "unknown" and isinstance(model, Fairseq)


class TurnsTheMask(Fairseq):
    """What else a block is given may be turned."""

    def forward(self, x: Tensor) -> Tensor:
        mask, made = x.transpose(0, 1), [x, x]
        for layer in self.layers:
            made.append(layer(made.pop(), mask))
        return made[-1]


def test_the_first_argument_is_the_stream() -> None:
    model = TurnsTheMask()
    assert not CodeReader(dict(model.named_modules()), plain_class).tokens_first("layers.0")


def test_a_module_whose_output_is_reshaped_in_the_same_line_runs_once() -> None:
    """``self.q_proj(x).view(...)`` is one call."""
    model = built(
        "Bart", {key: FSMT[key] for key in FSMT if not key.startswith(("langs", "src", "tgt"))} | {"vocab_size": 50}
    )
    reader = CodeReader(dict(model.named_modules()), plain_class)
    assert reader.of("decoder.layers.0.self_attn.q_proj").runs == "once"
