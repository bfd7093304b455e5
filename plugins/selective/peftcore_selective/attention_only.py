"""Attention-only tuning: the attention layers train, not the feed-forwards.   Touvron et al. 2022, arXiv 2203.09795.

Equation:
    W' for W in {W_q, W_k, W_v, W_o} of every block, and their biases,   trained, starting from the host's

As in the authors' code, the classification head and the position embeddings train too; the paper does not mention them.
If `target` is set, only the target trains. Feed-forwards, norms and other embeddings are frozen. Cross-attention, which
the image models of the paper do not have, is frozen too; to train it, set the target ("attn.*", "cross.*"). A fused
matrix of queries, keys and values trains as a whole; a target such as attn.q trains only its slice. If one matrix
contains queries, keys, values and the first matrix of the feed-forward, target the slices attn.q, attn.k and attn.v. A
common output matrix cannot be split, since attention and feed-forward share it.

Parameters: 4 d^2 + 4 d per block (about a third of a transformer), and those of the head and of the position
embeddings.

Start: Trained tensors start at the model's values. A fresh adapter is the identity.

Differs from the authors' code: No difference is known (facebookresearch/deit).

Use it: `peftcore.apply(model, "attention_only")`, instead of full fine-tuning on images: a third of the memory for
gradients, at nearly the same accuracy.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import Method, MethodConfig, Site, Surgeon, Tags, bias_name
from peftcore_selective._heads import train_classifiers


class AttentionOnlyConfig(MethodConfig):
    """Options of attention-only tuning."""

    method: Literal["attention_only"] = "attention_only"
    include_bias: bool = True
    """Train the biases too."""
    head: bool = True
    """Train the whole head too, unless it predicts tokens."""
    positions: bool = True
    """Train the position embeddings too."""


class AttentionOnly(Method):
    """Train the attention layers."""

    name = "attention_only"
    Config = AttentionOnlyConfig
    tags = Tags(category="selective", paper="2203.09795", mergeable=True)
    target = "attn.*"
    config_version = 2
    former_defaults = ({"head": False, "positions": False},)

    def inject(self, model: nn.Module, config: AttentionOnlyConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            if not site.missing(site.tensor):
                surgeon.replace(site)
            bias = bias_name(site.tensor)
            if config.include_bias and bias in site.tensors() and not site.missing(bias):
                surgeon.replace(site.at(bias))
        if surgeon.wishes.target is None and config.head:
            train_classifiers(surgeon)
        if surgeon.wishes.target is None and config.positions:
            for site in surgeon.at("embed.pos"):
                if not site.missing(site.tensor):
                    surgeon.replace(site)

    @staticmethod
    def parameter_count(site: Site, config: AttentionOnlyConfig) -> int:
        return site.numel
