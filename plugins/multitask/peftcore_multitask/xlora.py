"""X-LoRA: a classifier of hidden states scales LoRAs, token by token.   Buehler and Buehler 2024, arXiv 2402.07148.

Equation:
    y = W x + b + g sum_e c_e s_e B_e A_e x,   c = softmax(classifier(h) / temperature) over the parts e

h [tokens, d] is the output of the stack of blocks with X-LoRA off, so each forward runs the stack twice, the first time
without gradients; generation keeps a second cache for the first pass. The classifier is one linear layer, or `depth` of
them with ReLU and dropout between. c is the same at all target modules; with `layerwise` each module has a separate c.
`top_k` keeps only the largest shares. g is `scale`. Parts act as in evaluation: their dropout, for example, is off.
Parts are LoRAs of linear layers, and the model must have exactly one stack of blocks that processes tokens.

Parameters: those of the parts, and (d + 1) N of the classifier, times the number of target modules with `layerwise`; at
more depth (d + 1) w + (depth - 2) (w + 1) w + (w + 1) N for N parts and width w.

Start: The classifier as torch's linear layers; fresh LoRAs change nothing.

Differs from the authors' code: peft refuses caches; here generation keeps a second one for the first pass.

Use it: `peftcore.apply(model, "xlora")`, with `peftcore_multitask.gather` to blend LoRAs that were trained separately.
train_parts=False trains only the classifier, as in the paper.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    AppliedMethod,
    Method,
    Operator,
    PassCache,
    Router,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStacks,
    forward_context,
    stream_width,
)
from peftcore.errors import MissingContext, SequenceError
from peftcore_multitask._chosen import add_shares, first_of
from peftcore_multitask._merging import Members, OfMergedParts, PartsConfig, collected


class XLoRAConfig(PartsConfig):
    """Options of X-LoRA."""

    method: Literal["xlora"] = "xlora"
    train_parts: bool = True
    """Train the parts too. In the paper they are trained separately beforehand, and then frozen."""
    layerwise: bool = False
    """Compute separate shares for each target module."""
    softmax: bool = True
    """Apply a softmax to the shares of a token, so that they are positive and their sum is one."""
    temperature: PositiveFloat = 1.0
    """Divisor of the softmax's logits."""
    top_k: PositiveInt | None = None
    """The largest number of parts that act on a token; None: all parts."""
    softmax_top_k: bool = False
    """Apply another softmax to the shares that `top_k` keeps."""
    depth: Annotated[int, Field(ge=1, le=100)] = 1
    """Number of linear layers of the classifier."""
    width: PositiveInt = 2048
    """Width between the layers of the classifier."""
    dropout: Share = 0.2
    """Dropout probability between the layers of the classifier."""
    scale: float = 1.0
    """The factor g of the sum of all parts."""


def classifier(inputs: int, outputs: int, config: XLoRAConfig) -> nn.Sequential:
    """Return the layers that map hidden states ``[..., inputs]`` to shares ``[..., outputs]``."""
    widths = [inputs, *[config.width] * (config.depth - 1)]
    between: list[nn.Module] = []
    for one, other in itertools.pairwise(widths):
        between += [nn.Linear(one, other), nn.ReLU(), nn.Dropout(config.dropout)]
    return nn.Sequential(*between, nn.Linear(widths[-1], outputs))


class ClassifierOperator(Operator):
    """Runs the stack once with X-LoRA off, computes the shares from the output, and stores them for the second run."""

    def __init__(self, site: Site, config: XLoRAConfig, classifier: Shared, shares: Tap) -> None:
        super().__init__(site)
        self.config, self.classifier, self.shares = config, classifier, shares
        self.cache, self.names = PassCache(), site.arguments

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        with torch.no_grad():
            first = forward_context().without(self, call, caches=self.cache.beside, **given)
        hidden = first if isinstance(first, Tensor) else first[0]  # [batch, tokens, d]
        layers = self.classifier.module
        self.shares.put(self.chosen(layers(hidden.to(next(layers.parameters()).dtype))))
        output = call(**given)
        self.cache.keep(given, output, first)
        return output

    def chosen(self, logits: Tensor) -> Tensor:
        """Return the shares ``[batch, tokens, modules or 1, parts]``, from the classifier's output."""
        config, count = self.config, len(self.config.parts)
        shares = logits.unflatten(-1, (-1, count))
        if config.softmax:
            shares = (shares / config.temperature).softmax(-1)
        if config.top_k is not None and config.top_k < count:
            largest = torch.zeros_like(shares, dtype=torch.bool).scatter(-1, shares.topk(config.top_k).indices, True)
            shares = shares * largest
        if config.softmax_top_k:
            kept = shares != 0
            shares = shares.masked_fill(~kept, -torch.inf).softmax(-1).masked_fill(~kept, 0.0)
        return shares


class XLoRAOperator(Router):
    """The parts of one module, each weighted by its share for each token."""

    def __init__(self, site: Site, config: XLoRAConfig, members: Members, shares: Tap, number: int) -> None:
        super().__init__(site)
        self.parts = nn.ModuleDict({str(index): graft.operator for index, graft in members.items()})
        self.members, self.shares, self.number = list(members), shares, number if config.layerwise else 0
        weights = [1.0] * len(config.parts) if config.weights is None else config.weights
        self.scales = [config.scale * weights[index] for index in members]

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        every = self.shares.get()
        if every is None:
            raise MissingContext(
                "a part of the model was called by itself, so its tokens were not classified; call the whole model"
            )
        shares = every[..., self.number, self.members]
        parts: Any = self.parts.values()
        factors = [(A, B, own * s) for own, (A, B, s) in zip(self.scales, [p.factors() for p in parts], strict=True)]
        if shares.shape[:-1].numel() != x.shape[:-1].numel():
            raise SequenceError(
                f"a module got {tuple(x.shape)}, which are other tokens than those of the stack of blocks; exclude it"
            )
        shares = shares.view(*x.shape[:-1], -1)
        self.noted(shares)
        return add_shares(self, call(x), x, factors, shares)


class XLoRA(OfMergedParts, Method):
    """LoRAs weighted for each token by shares that a classifier computes from a first pass of the model."""

    name = "xlora"
    Config = XLoRAConfig
    tags = Tags(
        category="multitask", paper="2402.07148", per_row=False, routes="token", reentrant=False, whole_graph=False
    )
    target = ()

    def inject(self, model: nn.Module, config: XLoRAConfig, surgeon: Surgeon) -> None:
        order = {path: number for number, (path, _) in enumerate(model.named_modules())}
        groups = [(first_of(members, "X-LoRA"), members) for members in collected(surgeon, config).values()]
        groups.sort(key=lambda group: order[group[0].site.module_path])
        stack = TokenStacks(surgeon).around([graft.site for graft, _ in groups])
        outputs = len(config.parts) * (len(groups) if config.layerwise else 1)
        width = stream_width(surgeon, stack)
        layers = surgeon.own("classifier", lambda: classifier(width, outputs, config))
        shares = Tap(until_backward=True)
        surgeon.graft(stack, ClassifierOperator, config, classifier=layers, shares=shares)
        for number, (graft, members) in enumerate(groups):
            surgeon.graft(graft.site, XLoRAOperator, config, members=members, shares=shares, number=number)

    def trainable(self, model: nn.Module, config: XLoRAConfig, injection: AppliedMethod) -> None:
        if config.train_parts:
            super().trainable(model, config, injection)
        for operator in injection.operators.values():
            if isinstance(operator, ClassifierOperator):
                operator.classifier.module.requires_grad_(True)

    @staticmethod
    def parameter_count(site: Site, config: XLoRAConfig) -> int:
        return 0 if site.role == "stack" else OfMergedParts.parameter_count(site, config)  # the classifier is shared
