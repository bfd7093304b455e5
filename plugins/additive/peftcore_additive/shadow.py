"""ShadowPEFT: a small network in parallel with the model corrects the inputs of the model's blocks.   arXiv 2604.19254
(in peft).

Equation:
    s_0 = P guest(tokens)
    x_l = h_{l-1} + a W_up W_down dropout(h_{l-1} - s_{l-1}),   h_l = block_l(x_l)
    s_l = (1 - g_l) s_{l-1} + g_l T_l(h_l),   g_l = sigmoid(G_l(h_l))

x_l is the corrected input of block l, and h_l its output. s_l is the shadow, which starts as the output of the guest
network. The guest has the model's own class and config, with `layers` layers and other `sizes`, and trains. P [d,
guest's width] is used only if the widths differ. If the widths are equal the guest shares the model's token table,
otherwise it has a separate table. T_l and G_l are two linear layers of inner width u, with GELU between them.

In training with labels the guest has a separate loss, which is added to the model's loss with the weight w,
`guest_weight`:

    L = L_model + w CE(head(s_0), labels)

For a language model, head is the model's own head. A classification head is copied; the copy trains, and reads the last
token.

Reentrant checkpoints are refused.

Parameters: those of the guest, 2 d r a block, and 2 (2 d u + u + d) for each block except the model's last one, after
which the shadow is not read. In peft the last block has them too.

Start: W_up at zero: the identity. The guest starts from random weights.

Differs from the authors' code: As in peft 0.21, every block has both steps (correction and update); if blocks are left
out, h_l is the input of the next target block. The authors' own code leaves the first block out, puts a LayerNorm in
front of T and G, uses SiLU, no biases, and dropout at other places. In generation peft stores the guest's cache under
the name `past_key_values`, which newer versions of transformers do not use. Here the guest's cache works with any
version. If a peft file names a checkpoint as the guest, set `sizes` to those of the checkpoint, and load its weights by
``injection.shared["guest"].take(network)``. In peft the guest's loss is added in evaluation too.

Use it: `peftcore.apply(model, "shadow")`, where the small network should also be usable by itself, or train separately
from the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    GuestOperator,
    InputOperator,
    LearningRate,
    Method,
    MethodConfig,
    Mine,
    Operator,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    block_sites,
    forward_context,
    guest_network,
    head_sites,
)
from peftcore.errors import MissingContext, SequenceError, UnsupportedSite

OF_THE_GUEST = ("layers", "sizes", "own_table", "guest_weight")


class ShadowConfig(MethodConfig):
    """Options of ShadowPEFT."""

    overridable = ("rank", "scale", "dropout", "update_width")

    method: Literal["shadow"] = "shadow"
    rank: PositiveInt = 8
    """Rank r of the correction."""
    scale: float = 0.1
    """The factor on the correction."""
    dropout: Share = 0.2
    """Probability with which an entry of the correction's input is dropped in training."""
    update_width: PositiveInt | None = None
    """Inner width of the two networks that update the shadow. If None, it equals `rank`."""
    layers: PositiveInt = 1
    """Number of layers of the guest."""
    sizes: dict[str, PositiveInt] = Field(default_factory=dict)
    """Sizes of the guest that differ from the model's, by the names in the model's config: ``{"intermediate_size":
    256}``."""
    own_table: bool = False
    """Give the guest a separate, trained token table. The guest always has one if its width differs from the
    model's."""
    guest_weight: NonNegativeFloat = 0.05
    """Weight w of the guest's own loss."""


IGNORED = -100
"""The label that the loss ignores."""


class GuestLoss(Operator):
    """Wraps the head, and adds the guest's own loss in training if labels are passed."""

    def __init__(self, site: Site, states: Tap, weight: float, head: Shared | None) -> None:
        super().__init__(site)
        self.states, self.weight, self.head = states, weight, head

    def forward(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = forward_context()
        states, labels = self.states.get(), context.inputs.get("labels")
        if self.training and self.weight and states is not None and isinstance(labels, Tensor):
            if self.head is None:
                with context.aside():
                    logits = call(states.to(x.dtype))
                loss = next_token_loss(logits, labels)
            else:
                if labels.dim() != 2 or labels.is_floating_point():  # else there is one for each token
                    states = last_token(states, context.inputs.get("attention_mask"))
                loss = class_loss(self.head.module(states.to(next(self.head.module.parameters()).dtype)), labels)
            context.add_loss(self.weight * loss, self)
        return call(x, *args, **kwargs)


def copied(site: Site) -> nn.Linear:
    """Return a trainable copy of the head at a site."""
    biased = site.tensor == "weight" and not site.missing("bias")
    own = nn.Linear(site.in_features, site.out_features, bias=biased)
    if not site.meta and not (weight := site.weight()).is_meta:
        own.weight.data.copy_(weight.detach())
        if biased:
            own.bias.data.copy_(site.at("bias").weight().detach())
    return own


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits ``[batch, tokens, vocabulary]`` against the next token's label, for
    labels ``[batch, tokens]``."""
    precise = torch.promote_types(logits.dtype, torch.float32)
    said = labels[:, 1:].flatten().to(logits.device)
    total = F.cross_entropy(logits[:, :-1].flatten(0, 1).to(precise), said, ignore_index=IGNORED, reduction="sum")
    return total / said.ne(IGNORED).sum().clamp(min=1)


def last_token(states: Tensor, mask: Any) -> Tensor:
    """Return the states ``[batch, width]`` of the last tokens for which a mask ``[batch, tokens]`` is not zero."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return states[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = (mask.ne(0) * places).argmax(-1).to(states.device)
    return states[torch.arange(len(states), device=states.device), last]


def class_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of logits ``[..., classes]``: the mean squared error for one output, cross-entropy for integer
    labels, or binary cross-entropy for floating-point labels."""
    precise, labels = torch.promote_types(logits.dtype, torch.float32), labels.to(logits.device)
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1).to(precise), labels.to(precise).view(-1))
    if not labels.is_floating_point():
        return F.cross_entropy(logits.flatten(0, -2).to(precise), labels.flatten(), ignore_index=IGNORED)
    return F.binary_cross_entropy_with_logits(logits.to(precise), labels.to(precise))


class ShadowOperator(InputOperator):
    """Corrects the input of one block, and updates the shadow from the block's output for the next block."""

    def __init__(self, site: BlockSite, config: ShadowConfig, before: Shared | None, shadow: Tap, left: Tap) -> None:
        super().__init__(site)
        width, inner, self.scale = site.width, config.update_width or config.rank, config.scale
        self.down, self.up = nn.Linear(width, config.rank, bias=False), nn.Linear(config.rank, width, bias=False)
        nn.init.zeros_(self.up.weight)
        if not is_last(site):
            self.transform, self.gate = two_layers(width, inner), two_layers(width, inner)
        self.dropout = nn.Dropout(config.dropout)
        self.before, self.shadow, self.left = before, shadow, left

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        x, shadow = given[self._names[0]], self.shadow.get()  # [batch, tokens, d]
        if shadow is None:
            raise MissingContext(
                "a block was called by itself; call the whole model, whose tokens the guest network reads"
            )
        if shadow.shape != x.shape:
            raise SequenceError(
                f"a block got states {tuple(x.shape)}, but the guest network read tokens {tuple(shadow.shape)}; pass "
                "the same tokens to all blocks"
            )
        read = x.to(self.down.weight.dtype)
        shadow = shadow.to(read)
        if self.before is not None:
            shadow = self.before.module.learned(read, shadow)
            self.left.put(shadow)
        moved = x + (self.scale * self.up(self.down(self.dropout(read - shadow)))).to(x.dtype)
        rows = mine(x)
        return {**given, self._names[0]: moved if rows is None else torch.where(rows[:, None, None], moved, x)}

    def learned(self, h: Tensor, shadow: Tensor) -> Tensor:
        """Return the updated shadow after this block, whose output is h."""
        gate = torch.sigmoid(self.gate(h))
        return (1 - gate) * shadow + gate * self.transform(h)


def two_layers(width: int, inner: int) -> nn.Sequential:
    """Make one of the networks T and G: two linear layers with GELU between them."""
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


def is_last(site: BlockSite) -> bool:
    """Return True if the block is the model's last one, after which the shadow is not read."""
    return site.depth == site.blocks - 1


class Shadow(Method):
    """A small network of the model's own class, which runs in parallel with the model and corrects the inputs of its
    blocks."""

    name = "shadow"
    Config = ShadowConfig
    tags = Tags(category="additive", paper="2604.19254", random=True, reentrant=False)
    learning_rate = LearningRate(3e-3, "ShadowLLM/shadow-peft@665d889, experiment/best_script.md", on="Qwen3-8B, GSM8K")
    target = ("block",)

    def inject(self, model: nn.Module, config: ShadowConfig, surgeon: Surgeon) -> None:
        sites = sorted(block_sites(surgeon), key=lambda site: site.depth)
        stack = TokenStacks(surgeon).around(sites)
        if sites[0].width != stack.out_features:
            raise UnsupportedSite(
                f"{stack.path} embeds tokens with width {stack.out_features}, but its blocks have width "
                f"{sites[0].width}; shadow needs equal widths"
            )
        guest = guest_network(surgeon, stack, {**config.sizes, "num_hidden_layers": config.layers}, config.own_table)
        states = [Tap(until_backward=True) for _ in sites]  # what the shadow was at each block
        surgeon.graft(stack, GuestOperator, guest=guest, states=states[0])
        before = None
        for number, site in enumerate(sites):
            seen, left = states[max(number - 1, 0)], states[number]
            before = Shared(surgeon.graft(site, ShadowOperator, config, before=before, shadow=seen, left=left))
        labels = "labels" in inspect.signature(model.forward).parameters
        if config.guest_weight and labels and (heads := head_sites(surgeon)):
            head, own = max(heads, key=lambda each: each.out_features), None
            if head.out_features < stack.in_features:  # it classifies
                own = surgeon.own("head", lambda: copied(head))
            surgeon.graft(head, GuestLoss, states=states[0], weight=config.guest_weight, head=own)

    @staticmethod
    def parameter_count(site: Site, config: ShadowConfig) -> int:
        if not isinstance(site, BlockSite):
            return 0  # the guest belongs to no site
        width, inner = site.width, config.update_width or config.rank
        return 2 * width * config.rank + (0 if is_last(site) else 2 * (2 * width * inner + inner + width))
