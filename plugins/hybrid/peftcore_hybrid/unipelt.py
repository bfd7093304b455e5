"""UniPELT: LoRA, prefix and adapter, each behind a gate.   Mao et al. 2022, arXiv 2110.07577 (morningmoni/UniPELT).

Equation:
    g = sigmoid(u . x + c)                    x: what the part itself reads; each operator has a gate of its own
    queries, values   y = W x + g B A x       g stands in the place of alpha / rank
    attention         softmax over [g P_k; K], with values [g P_v; V]
    feed-forward      y = LN(x + o + g (W_up relu(W_down u + b_down) + b_up)),   u = LN(x + o)

``gate="sequence"`` is the paper's gate: g is the mean over a row's tokens, here without padding (by the model's
`attention_mask`). In a causal model this mean would include later tokens, and with a cache only the last token, so it
is refused for causal attention. By default every token has a separate gate. Since tokens share the keys of a prefix, a
token's gate scales the change that the prefix makes to its output, which needs a second softmax:

    attention         y = Attn(q, K, V) + g (Attn(q, [P_k; K], [P_v; V]) - Attn(q, K, V))

The adapter is a `pfeiffer_adapter` whose output is multiplied by a gate: x is the residual stream, o the feed-forward's
output after the host's dropout, and LN the norm that ends the block; in blocks without such a norm LN is left out. With
adapter_placement="branch" it reads o.

Gates depend on the input, so the method cannot be merged.

Parameters: a prefix as in `prefix_tuning`, rank (d + d_out) for queries and for values each, 2 d r + r + d per
feed-forward, r = d / reduction; and d + 1 for each gate.

Start: Gates start near one half. u, the adapter's W and the network that generates the prefix start from N(0, 0.02),
biases at zero, A and B as in LoRA. The start is not an identity.

Differs from the authors' code: By default each token has a separate gate. ``gate="sequence"`` is the gate of the paper;
its mean includes padding in the authors' code, but not here. In the text of the paper the adapter reads o.

Use it: `peftcore.apply(model, "unipelt")`, where you do not know which of the three methods suits the task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    Attend,
    AttentionSite,
    Method,
    MethodConfig,
    Operator,
    Site,
    Surgeon,
    Tags,
    Tap,
    forward_context,
)
from peftcore.errors import MissingContext, TargetError, UnsupportedSite
from peftcore_additive import pfeiffer_adapter, prefix_tuning
from peftcore_additive._prefix import Encoder, PrefixOperator, prefix_count, shared_encoder
from peftcore_additive.pfeiffer_adapter import PfeifferOperator, Placement, placed

QUERIES, VALUES, BLOCKS = ("attn.q", "cross.q"), ("attn.v", "cross.v"), ("mlp.output", "mlp.down")


class UniPELTConfig(MethodConfig):
    """Options of UniPELT."""

    method: Literal["unipelt"] = "unipelt"
    gate: Literal["token", "sequence"] = "token"
    """"token": a gate for each token. "sequence": the gate of the paper, one for each sequence (the mean over its
    tokens), which supports only encoders."""
    rank: PositiveInt = 8
    """Rank of the updates of queries and values."""
    prefix_length: PositiveInt = 10
    """Number of trained keys and values that are added in front of the keys and values of each attention."""
    prefix_mid_dim: PositiveInt | None = 512
    """Width of the network that generates the prefix in training; None trains the prefix directly."""
    adapter_reduction: PositiveInt = 16
    """Divisor of the hidden size; the quotient is the width of the adapter's bottleneck."""
    adapter_placement: Literal["auto", "post", "pre", "branch"] = "auto"
    """The adapter's input. "post": the residual stream after the norm that ends a block. "pre": the residual stream as
    the block returns it. "branch": the output of the feed-forward's last matrix. "auto": "post" or "pre", depending on
    the model."""

    def prefix(self) -> prefix_tuning.PrefixTuningConfig:
        """Return the options of the prefix."""
        return prefix_tuning.PrefixTuningConfig(length=self.prefix_length, projection=self.prefix_mid_dim)

    def bottleneck(self, site: Site) -> int:
        """Return the width of an adapter's bottleneck."""
        return max(site.out_features // self.adapter_reduction, 1)


Each = Literal["token", "sequence"]
"""The scope of a gate: one token, or the whole sequence."""


class Gate(nn.Module):
    """A gate sigmoid(u . x + c) for each token, ``[rows, tokens, 1]``. For gates of sequences it is averaged over the
    tokens, ``[rows, 1, 1]``."""

    def __init__(self, width: int, each: Each) -> None:
        super().__init__()
        self.linear = linear(width, 1)
        self.sequence = each == "sequence"

    def forward(self, x: Tensor) -> Tensor:
        """Return the gate of an input ``[rows, tokens, width]``."""
        weight, bias = self.linear.weight.to(x.dtype), self.linear.bias.to(x.dtype)
        gate = torch.sigmoid(nn.functional.linear(x, weight, bias))
        return mean_of_tokens(gate) if self.sequence else gate


def linear(width: int, outputs: int) -> nn.Linear:
    """Return a linear layer that is initialized as in BERT, with a bias of zeros."""
    made = nn.Linear(width, outputs)
    start_as_bert(made)
    return made


def start_as_bert(module: nn.Module) -> None:
    """Initialize a linear layer or an embedding like BERT: N(0, 0.02), with a bias of zeros."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


def mean_of_tokens(values: Tensor) -> Tensor:
    """Return the mean of values ``[rows, tokens, 1]`` over all tokens that are not padding in the model's
    `attention_mask`.

    Raises:
        MissingContext: a part of the host was called by itself, so the padding is unknown.
    """
    inputs = forward_context().inputs
    if not inputs or values.dim() != 3:
        raise MissingContext(
            'gate="sequence" needs rows of tokens and their padding mask: call the host itself, or set gate="token"'
        )
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != values.shape[:2]:
        return values.mean(1, keepdim=True)
    real = mask.to(values.dtype).unsqueeze(-1)
    return (values * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)


class GatedLoRA(Operator):
    """The gated update of queries or values. At queries it also computes the gate of the prefix, which reads the same
    input."""

    padded = frozenset({"A", "B"})

    def __init__(self, site: Site, config: UniPELTConfig, prefix: Tap | None) -> None:
        super().__init__(site)
        if config.gate == "sequence":
            site.check_rows_first()
        bound, rank = site.in_features**-0.5, config.rank
        self.A = nn.Parameter(torch.empty(rank, site.in_features).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        self.gate = Gate(site.in_features, config.gate)
        self.prefix = prefix
        self.prefix_gate = None if prefix is None else Gate(site.in_features, config.gate)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.prefix is not None and self.prefix_gate is not None:
            self.prefix.put(self.prefix_gate(x))
        y = call(x)
        A, B, gate = self.cast(y, self.A, self.B, self.gate(x))
        return self.layer.add(y, self.layer.apply(x, A) * gate, B, 1.0)


class GatedAdapter(PfeifferOperator):
    """A bottleneck whose output is multiplied by a gate: g (W_up relu(W_down u + b_down) + b_up) is added to the
    residual stream, where u is the adapter's input; with the placement "branch" it is added to the site's output."""

    def __init__(self, site: Site, config: UniPELTConfig, placement: Placement) -> None:
        plain = pfeiffer_adapter.PfeifferAdapterConfig(bottleneck=config.bottleneck(site))
        super().__init__(site, plain, placement)
        if self.layer.channel_dim != -1:
            raise UnsupportedSite(f"{site.path}: a bottleneck adapter needs features in the last dimension")
        if config.gate == "sequence":
            site.check_rows_first()
        self.gate = Gate(site.out_features, config.gate)

    def added(self, u: Tensor) -> Tensor:
        return self.gate(u).to(u.dtype) * super().added(u)


class GatedPrefix(PrefixOperator):
    """Adds trained keys and values in front of the keys and values of an attention. The gate scales their effect."""

    def __init__(self, site: AttentionSite, config: UniPELTConfig, surgeon: Surgeon, opening: Tap) -> None:
        super().__init__(site, config.prefix(), shared_encoder(surgeon, site, config.prefix(), _encoder))
        self.apply(start_as_bert)  # the matrix behind the encoder, where there is one
        self.opening, self.sequence = opening, config.gate == "sequence"

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        gate, front_key, front_value = self.cast(query, self.opening.get().unsqueeze(1), *self.made(len(key)))
        if self.sequence:
            return attend(query, torch.cat([gate * front_key, key], 2), torch.cat([gate * front_value, value], 2))
        plain = attend(query, key, value)
        edited = attend(query, torch.cat([front_key, key], 2), torch.cat([front_value, value], 2))
        return plain + gate * (edited - plain)


class UniPELT(Method):
    """LoRA, prefix and adapter, each multiplied by a gate."""

    name = "unipelt"
    Config = UniPELTConfig
    tags = Tags(category="hybrid", paper="2110.07577", identity_at_init=False)
    target = ("attn.core", "cross.core", "mlp.output")
    config_version = 2
    former_defaults = ({"adapter_placement": "branch"},)

    def inject(self, model: nn.Module, config: UniPELTConfig, surgeon: Surgeon) -> None:
        gates = {config.gate, *(changes.get("gate") for changes in config.overrides.values())}
        if "sequence" in gates and any(getattr(each, "is_causal", False) for each in surgeon.resolver.modules.values()):
            raise UnsupportedSite(
                'gate="sequence" reads later tokens, but attention in this host is causal; set gate="token"'
            )
        sites = surgeon.sites()
        attentions = [site for site in sites if site.role not in BLOCKS]
        if not attentions and surgeon.wishes.target is surgeon.wishes.exclude is None:
            raise TargetError("unipelt adds a prefix to attention, but this host has no attention; use another method")
        matrices = [site for role in QUERIES + VALUES for site in surgeon.at(role)]
        for site in attentions:
            inside = [each for each in matrices if each.module_path.startswith(f"{site.module_path}.")]
            _adapt_attention(site, inside, config, surgeon)
        blocks = [site for site in sites if site.role in BLOCKS]
        for site, placement, holders in placed(surgeon, blocks, lambda site: config.at(site.path).adapter_placement):
            surgeon.graft(site, GatedAdapter, config, holders, placement=placement)

    @staticmethod
    def parameter_count(site: Site, config: UniPELTConfig) -> int:
        if isinstance(site, AttentionSite):
            return prefix_count(site, config.prefix())
        if site.role in QUERIES + VALUES:
            gates = 2 if site.role in QUERIES else 1
            return config.rank * (site.in_features + site.out_features) + gates * (site.in_features + 1)
        return (2 * site.out_features + 1) * (config.bottleneck(site) + 1)


def _encoder(length: int, width: int, hidden: int) -> Encoder:
    """Return the half of the prefix network that layers share, initialized like the layers of BERT."""
    made = Encoder(length, width, hidden)
    made.apply(start_as_bert)
    return made


def _adapt_attention(site: Site, inside: list[Site], config: UniPELTConfig, surgeon: Surgeon) -> None:
    """Install the prefix of an attention, and the updates of its matrices for queries and values, which are `inside`
    it."""
    opening = Tap()
    queries = [each for each in inside if each.role in QUERIES]
    if queries or surgeon.wishes.exclude is None:  # where queries are excluded, the prefix goes with its gate
        surgeon.attention(site, GatedPrefix, config, surgeon=surgeon, opening=opening)
        if not queries:
            raise UnsupportedSite(
                f"{site.path}: no single matrix computes queries from the attention's input; exclude it"
            )
    for each in inside:
        tap = opening if each in queries else None
        surgeon.graft(each, GatedLoRA, config, prefix=tap)
