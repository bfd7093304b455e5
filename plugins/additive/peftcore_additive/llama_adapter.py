"""LLaMA-Adapter: zero-init gated attention.   Zhang et al. 2023, arXiv 2303.16199 (code: OpenGVLab/LLaMA-Adapter).

Equation:
    y = Attention(q, K, V) + tanh(g) * softmax(q (W_k P)^T / sqrt(d_h)) (W_v P)   in the top layers

y is the input of the layer's output matrix. P [length, d] is a prompt of the layer. The layer's own frozen matrices
(with the changes of other active injections) compute keys and values from P, including biases, but without rotation. P
has a separate softmax, so only the gate g, one number for each head, scales the effect of the prompt.

Parameters: length * d + heads in each of the top layers.

Start: P from N(0, 1), g at zero: the identity.

Differs from the authors' code: The tanh is in the authors' training code. No other difference is known. Outputs are
compared with those of peft.

Use it: `peftcore.apply(model, "llama_adapter")`, to teach instructions to a pretrained language model without changing
it at the start. It cannot be merged, and the prompt's keys are not stored in the cache. In models that normalize their
keys (Qwen 3), the prompt's keys are not normalized.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    Attend,
    AttentionOperator,
    AttentionSite,
    LearningRate,
    Method,
    MethodConfig,
    Site,
    Surgeon,
    Tags,
    stack_path,
)
from peftcore.errors import UnsupportedSite


class LlamaAdapterConfig(MethodConfig):
    """Options of LLaMA-Adapter."""

    method: Literal["llama_adapter"] = "llama_adapter"
    length: PositiveInt = 10
    """Number of vectors of a layer's prompt."""
    layers: PositiveInt = 30
    """How many of the top layers of each stack are adapted. The authors adapt 30 of 32. If a stack has fewer, all are
    adapted."""
    tanh: bool = True
    """Apply tanh to the gate; False uses the gate itself, as peft does."""


class LlamaAdapterOperator(AttentionOperator):
    """The prompt and the gate of one layer."""

    def __init__(self, site: AttentionSite, config: LlamaAdapterConfig) -> None:
        super().__init__(site)
        sizes = site.geometry
        made = {part: projection.out_features for part, projection in site.projections.items()}
        if (made.get("k"), made.get("v")) != (sizes.kv_heads * sizes.head_dim, sizes.kv_heads * sizes.value_dim):
            raise UnsupportedSite(
                f"{site.path} does not compute its keys and values by one matrix each, which llama_adapter needs; "
                "exclude it"
            )
        self.prompt = nn.Parameter(torch.randn(config.length, site.projections["k"].in_features))
        self.gate = nn.Parameter(torch.zeros(sizes.heads))
        self.tanh = config.tanh

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        prompt, gate = self.cast(query, self.prompt, self.gate.tanh() if self.tanh else self.gate)
        prompt_key = attend.project("k", prompt).to(key.dtype).expand(len(key), -1, -1, -1)
        prompt_value = attend.project("v", prompt).to(value.dtype).expand(len(value), -1, -1, -1)
        return attend(query, key, value) + gate.view(-1, 1, 1) * attend.apart(query, prompt_key, prompt_value)


def top(sites: list[Site], layers: int) -> list[Site]:
    """Return the last `layers` sites of each stack."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        stacks.setdefault(stack_path(site.module_path), []).append(site)
    return [site for stack in stacks.values() for site in stack[-layers:]]


class LlamaAdapter(Method):
    """Gated attention to a prompt in addition to the attention to the tokens."""

    name = "llama_adapter"
    Config = LlamaAdapterConfig
    tags = Tags(category="additive", paper="2303.16199")
    learning_rate = LearningRate(
        1.125e-3,
        "OpenGVLab/LLaMA-Adapter@521a09d, alpaca_finetuning_v1/finetuning.sh",
        on="LLaMA-7B, Alpaca, batches of 32",
    )
    target = ("attn.core",)

    def inject(self, model: nn.Module, config: LlamaAdapterConfig, surgeon: Surgeon) -> None:
        for site in top(surgeon.sites(), config.layers):
            surgeon.attention(site, LlamaAdapterOperator, config)

    @staticmethod
    def parameter_count(site: AttentionSite, config: LlamaAdapterConfig) -> int:
        return config.length * site.projections["k"].in_features + site.geometry.heads
