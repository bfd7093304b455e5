"""Tiny hosts of transformers, three small edits, and the attention with these edits written a second time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

import peftcore
from peftcore.author import Attend, AttentionOperator, AttentionSite, Method, MethodConfig, Surgeon, Tags

WORDS, WIDTH = 40, 16
DECODER = {
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**DECODER, "sliding_window": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**DECODER, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**DECODER, "sliding_window": 4}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **{key: value for key, value in DECODER.items() if key != "head_dim"},
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "first_k_dense_replace": 2,
        },
    ),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"d_model": WIDTH, "d_kv": 12, "d_ff": 24, "num_layers": 2, "num_heads": 2},
    ),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        {
            "d_model": WIDTH,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "forced_eos_token_id": None,
        },
    ),
}
TWO_STACKS = ("t5", "bart")


def host(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    """A seeded host in evaluation mode, with weights large enough that attention matters."""
    config, model, sizes = FAMILIES[name]
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    special["tie_word_embeddings"] = False  # tied, tiny hosts only repeat the last word
    built = getattr(transformers, model)(getattr(transformers, config)(vocab_size=WORDS, **special, **sizes))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    if built.can_generate():
        built.generation_config.eos_token_id = None  # texts of one length compare token by token
    built.set_attn_implementation(implementation)
    return built.to(dtype).eval().requires_grad_(False)


def inputs(name: str, length: int = 9) -> dict[str, Tensor]:
    """Two rows, the first padded on the left."""
    torch.manual_seed(1)
    words = {"input_ids": torch.randint(3, WORDS, (2, length)), "attention_mask": torch.ones(2, length).long()}
    words["attention_mask"][0, :3] = 0
    words["input_ids"][0, :3] = 0
    if name in TWO_STACKS:
        words["decoder_input_ids"] = torch.randint(3, WORDS, (2, 5))
    return words


def seen(name: str, output: Tensor, given: Mapping[str, Tensor]) -> Tensor:
    """The positions of the output that are no padding."""
    return output.flatten(0, 1) if name in TWO_STACKS else output[given["attention_mask"].bool()]


class InFrontConfig(MethodConfig):
    method: Literal["in_front"] = "in_front"
    length: int = 3


class InFront(AttentionOperator):
    """Keys and values in the same softmax."""

    def __init__(self, site: AttentionSite, config: InFrontConfig) -> None:
        super().__init__(site)
        sizes = site.geometry
        self.key = nn.Parameter(torch.randn(sizes.kv_heads, config.length, sizes.head_dim))
        self.value = nn.Parameter(torch.randn(sizes.kv_heads, config.length, sizes.value_dim))

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        front, value_front = self.key.to(key.dtype), self.value.to(value.dtype)
        key = torch.cat([front.expand(len(key), -1, -1, -1), key], 2)
        return attend(query, key, torch.cat([value_front.expand(len(value), -1, -1, -1), value], 2))


class BesideConfig(MethodConfig):
    method: Literal["beside"] = "beside"


class Beside(AttentionOperator):
    """A second softmax, over keys that the attention's own matrices make where they can."""

    def __init__(self, site: AttentionSite, config: BesideConfig) -> None:
        super().__init__(site)
        sizes = site.geometry
        self.key = nn.Parameter(torch.randn(sizes.kv_heads, 3, sizes.head_dim))
        self.prompt = nn.Parameter(torch.randn(3, site.projections["v"].in_features))

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = attend.project("v", self.prompt).to(value.dtype)
        batch = len(key)
        other = attend.apart(query, self.key.to(key.dtype).expand(batch, -1, -1, -1), made.expand(batch, -1, -1, -1))
        return attend(query, key, value) + 0.5 * other


class TurnedConfig(MethodConfig):
    method: Literal["turned"] = "turned"


class Turned(AttentionOperator):
    """Other queries."""

    def __init__(self, site: AttentionSite, config: TurnedConfig) -> None:
        super().__init__(site)
        self.by = nn.Parameter(torch.randn(site.geometry.heads, 1, site.geometry.head_dim))

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend(query + self.by.to(query.dtype), key, value)


def method(operator: type[AttentionOperator], config: type[MethodConfig], called: str) -> type[Method]:
    """A method that puts the operator into every attention."""

    def inject(self: Method, model: nn.Module, options: Any, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.attention(site, operator, options)

    members = {
        "name": called,
        "Config": config,
        "tags": Tags(category="additive", paper="none", identity_at_init=False),
        "target": ("attn.core", "cross.core"),
        "inject": inject,
        "parameter_count": staticmethod(lambda site, options: 0),
        "__module__": __name__,
    }
    return type(f"{operator.__name__}Method", (Method,), members)


InFrontMethod = method(InFront, InFrontConfig, "in_front")
BesideMethod = method(Beside, BesideConfig, "beside")
TurnedMethod = method(Turned, TurnedConfig, "turned")
METHODS: dict[str, type[Method]] = {"in_front": InFrontMethod, "beside": BesideMethod, "turned": TurnedMethod}


def copies(injection: peftcore.Injection) -> dict[str, dict[str, Tensor]]:
    """The operators' tensors by the path of the attention, as leaves of their own."""
    return {
        path.removesuffix(":attention"): {
            name: value.detach().clone().requires_grad_() for name, value in operator.named_parameters()
        }
        for path, operator in injection.operators.items()
    }


def _softmax(module: Any, query: Tensor, key: Tensor, value: Tensor, options: Mapping[str, Any], added: Any) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = options.get("scaling")
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if options.get("softcap"):
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    for each, front in added:
        if each is not None:
            zeros = each.new_zeros(*each.shape[:-1], front)
            scores = scores + torch.cat([zeros, each], -1)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.einsum("bhqk,bhkd->bqhd", weights / weights.sum(-1, keepdim=True), value)


@contextmanager
def rewritten(model: Any, tensors: Mapping[str, dict[str, Tensor]]) -> Iterator[None]:
    """The host computes the edited attention by the equations here: its file's own function is replaced meanwhile. The
    host is plain and its implementation is "eager"."""
    file = sys.modules[type(model).__module__]
    paths = {id(module): path for path, module in model.named_modules()}
    before = file.eager_attention_forward

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any = None, **options: Any) -> Any:
        mask = options.pop("attention_mask", mask)
        own = tensors[paths[id(module)]]
        batch = (len(key), -1, -1, -1)
        front = 0
        if "value" in own:  # in front
            front = own["key"].shape[1]
            key = torch.cat([own["key"].expand(batch), key], 2)
            value = torch.cat([own["value"].expand(batch), value], 2)
        if "by" in own:
            query = query + own["by"]
        output = _softmax(module, query, key, value, options, [(mask, front), (options.get("position_bias"), front)])
        if "prompt" in own:
            made = VALUES[type(model).__name__](module, own["prompt"])
            made = made.unflatten(-1, (key.shape[1], -1)).transpose(0, 1).expand(batch)
            output = output + 0.5 * _softmax(module, query, own["key"].expand(batch), made, options, [])
        return output, None

    file.eager_attention_forward = attention
    try:
        yield
    finally:
        file.eager_attention_forward = before


def _linear(name: str) -> Callable[[Any, Tensor], Tensor]:
    return lambda module, x: module._modules[name](x)


def _neox(module: Any, x: Tensor) -> Tensor:
    fused = module.query_key_value(x).unflatten(-1, (2, 3, -1))  # heads, (q, k, v)
    return fused[:, :, 2].flatten(1)


VALUES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "LlamaForCausalLM": _linear("v_proj"),
    "GPT2LMHeadModel": lambda module, x: module.c_attn(x)[:, 2 * WIDTH :],
    "GPTNeoXForCausalLM": _neox,
    "BertForMaskedLM": _linear("value"),
    "T5ForConditionalGeneration": _linear("v"),
}
"""The attention's values of given inputs, by host."""
