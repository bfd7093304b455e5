"""CoDA, conditional adapters: only some tokens pass through a block, and all pass through an adapter in parallel.   Lei
et al. 2023, arXiv 2304.04947.

Equation:
    y_i = x_i + W_up f(W_down n(x_i) + b_down) + b_up + lambda_i (F(x)_i - x_i),   W_down [r, d],  W_up [d, r]
    lambda = argmax_l l . s + epsilon H(l),   0 <= l_i <= 1,   sum_i l_i = k,   s = x w,   w [d]

F is the frozen block, which processes only the k tokens with the largest lambda. The remaining tokens skip its
attention and its feed-forward, and their lambda counts as zero. This makes the model faster, in training as well. k is
the number of tokens divided by `reduction`, rounded up. Padding is never chosen, and does not count. H is the entropy.
lambda is computed by 20 steps of coordinate descent, in which epsilon falls from 4 to `temperature`; the error is a few
percent. n subtracts the mean and divides by the standard deviation.

The method supports encoders: in causal models later tokens would influence the choice of earlier ones. Blocks that
compute positions themselves (T5, whose first block counts tokens) or attend within windows are refused.

Parameters: 2 d r + r + 2 d a block.

Start: W_up and b_up start at zero, W_down and w as torch's layers do. Since tokens skip blocks, the outputs change from
the start; with ``reduction=1`` a fresh adapter is an exact identity.

Differs from the authors' code: The authors' code is not public; the selection is that of lucidrains/CoLT5-attention.
Here n does not have a gain and a shift, while the paper uses the block's own norm. Attention of the chosen tokens to
all tokens (k-to-all in the paper) is not implemented. The paper first trains on unlabelled text.

Use it: `peftcore.apply(model, "coda")`, to make an encoder faster on long inputs; not where inputs have few tokens, or
where each token has a label. `parallel_adapter` adapts all tokens without a choice, and `adapterdrop` skips adapters
instead of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from peftcore.author import (
    ACTIVATIONS,
    BlockSite,
    Method,
    MethodConfig,
    Operator,
    Surgeon,
    Tags,
    TokenStacks,
    VisibleTokens,
    block_sites,
    cache_in,
    full_precision,
    on_first,
)
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore_additive._bottleneck import cast_linear


class CoDAConfig(MethodConfig):
    """Options of conditional adapters."""

    method: Literal["coda"] = "coda"
    reduction: Annotated[float, Field(ge=1.0)] = 3.0
    """The number of tokens, divided by the number of tokens that a block processes."""
    bottleneck: PositiveInt = 64
    """Width r of the adapter."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "relu"
    """The non-linearity f."""
    steps: Annotated[int, Field(ge=1, le=1000)] = 20
    """Number of steps of coordinate descent."""
    temperature: PositiveFloat = 0.1
    """The last epsilon of coordinate descent. With smaller values lambda is nearer to zero or one, but more steps are
    needed."""


PADDING = ("src_key_padding_mask", "attention_mask")
"""Names of arguments that are masks of padding or of attention. In the first mask, that of torch's layers, True means
padding."""
PLACES = ("position_embeddings", "position_ids")
"""Names of arguments that contain an entry for each token."""
START, DECAY = 4.0, 0.7
"""The temperature of the first step, and the factor by which each step multiplies it."""


def soft_top_k(scores: Tensor, k: Tensor, real: Tensor, temperature: float, steps: int) -> Tensor:
    """Return shares of tokens in 0 .. 1 that add up to k, and approximately maximize ``shares . scores`` plus the
    temperature times their entropy. They are computed by `steps` steps of coordinate descent, each with a lower
    temperature.

    Args:
        scores: ``[batch, tokens]``.
        k: the number of tokens to choose, ``[batch or 1, 1]``.
        real: True for tokens that are not padding, ``[batch or 1, tokens]``; the share of padding is 0.
        temperature: the lower bound of the temperature, which the last steps use.
        steps: the number of steps.
    """
    scores = scores.masked_fill(~real, 0.0)
    a, b, epsilon = torch.zeros_like(scores[:, :1]), -scores, temperature
    for step in range(steps):
        epsilon = max(START * DECAY**step, temperature)
        logits = ((scores + b) / epsilon).masked_fill(~real, -torch.inf)
        a = epsilon * (k.to(scores.dtype).log() - logits.logsumexp(-1, keepdim=True))
        b = -(scores + a).relu()
    shares = ((scores + a + b) / epsilon).exp()
    everyone = k >= real.sum(-1, keepdim=True)  # no step needs to be taken, and none would get there
    return torch.where(everyone, torch.ones_like(shares), shares).masked_fill(~real, 0.0)


def arguments_of(given: Mapping[str, Any], chosen: Tensor, count: int, idle: Tensor | None) -> dict[str, Any]:
    """Return a block's arguments for the chosen tokens.

    Args:
        given: the block's arguments by name, without the states.
        chosen: the indices of the chosen tokens, ``[batch, chosen]``.
        count: the number of all tokens.
        idle: True for chosen tokens that only fill up a text with fewer tokens than the others, ``[batch, chosen]``;
            they are hidden from all tokens. None if padding is not known for each text.

    Raises:
        SequenceError: an argument cannot be restricted to the chosen tokens, or padding cannot be masked.
    """
    if cache_in(given) is not None or given.get("is_causal") or given.get("src_mask") is not None:
        raise SequenceError(
            "this block is called with a cache or an attention mask that hides tokens: later tokens would influence "
            "which earlier ones are chosen; use coda in encoders without a cache"
        )
    found = {name: _cut(name, value, chosen, count) for name, value in given.items()}
    if idle is not None:
        name = next((name for name in PADDING if found.get(name) is not None), None)
        if name is not None:
            found[name] = _hiding(found[name], idle, padding=name == PADDING[0])
        elif not torch.compiler.is_compiling() and idle.any():  # hosts leave a mask out that hides nothing
            raise SequenceError(
                "the batch has padding, but the block receives no mask for it; pass batches without padding, or "
                "exclude the block"
            )
    return found


def _cut(name: str, value: Any, chosen: Tensor, count: int) -> Any:
    if isinstance(value, tuple | list) and name in PLACES:
        return type(value)(_cut(name, each, chosen, count) for each in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if name in PLACES or (name in PADDING and value.dim() == 2):
            return _rows(value, chosen)
        if name in PADDING and value.dim() == 4 and value.shape[-1] == count:
            keys = _rows(value.movedim(-1, 1), chosen).movedim(1, -1)  # [batch, heads, tokens or 1, chosen]
            return keys if value.shape[-2] == 1 else _rows(keys.movedim(-2, 1), chosen).movedim(1, -2)
        if count not in value.shape[1:]:
            return value
    elif not any(isinstance(each, Tensor) for each in _inside(value)):
        return value
    raise SequenceError(
        f"coda cannot select the chosen tokens in the block's argument {name} ({type(value).__name__}); exclude the "
        "block"
    )


def _inside(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, tuple | list) else [torch.empty(0)]


def _rows(value: Tensor, chosen: Tensor) -> Tensor:
    """Return the entries of the chosen tokens of ``[batch or 1, tokens, ...]``."""
    index = chosen.view(*chosen.shape, *[1] * (value.dim() - 2))
    return value.expand(len(chosen), *value.shape[1:]).gather(1, index.expand(*chosen.shape, *value.shape[2:]))


def _hiding(mask: Tensor, idle: Tensor, padding: bool) -> Tensor:
    """Return a mask that also hides the chosen tokens marked in `idle`."""
    hidden = idle if mask.dim() == 2 else idle[:, None, None, :]
    if mask.is_floating_point():
        return mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
    return mask | hidden if padding else mask.masked_fill(hidden, 0)


class ConditionalOperator(Operator):
    """The router of one block, and the adapter in parallel with the block."""

    changes_inputs = True

    def __init__(self, site: BlockSite, config: CoDAConfig, visible: VisibleTokens) -> None:
        super().__init__(site)
        self.names, self.visible, self.width = site.arguments, visible, site.width
        self.reduction, self.steps, self.temperature = config.reduction, config.steps, config.temperature
        bound = 1 / math.sqrt(site.width)
        self.router = nn.Parameter(torch.empty(site.width).uniform_(-bound, bound))
        self.down = nn.Linear(site.width, config.bottleneck)
        self.activation = ACTIVATIONS[config.activation]()
        self.up = nn.Linear(config.bottleneck, site.width)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.dim() != 3:
            raise SequenceError(
                f"coda needs block inputs [batch, tokens, width], but this block got {list(x.shape)}; exclude the block"
            )
        given = {**dict(zip(self.names[1:], args, strict=False)), **kwargs}
        count = x.shape[1]
        real = self.visible.real(count, given, x.device)  # [batch or 1, tokens]
        k = (real.sum(-1, keepdim=True) / self.reduction).ceil().clamp(min=1)
        shares = self.shares(x, k, real)
        largest = shares.detach().topk(math.ceil(count / self.reduction), -1).indices
        idle = torch.arange(largest.shape[-1], device=x.device) >= k  # where a row has fewer tokens than the longest
        chosen, order = largest.sort(-1)
        idle = idle.expand_as(largest).gather(-1, order)
        more = arguments_of(given, chosen, count, None if len(real) < len(x) else idle)
        weights = shares.gather(-1, chosen).masked_fill(idle, 0.0).unsqueeze(-1)
        index = chosen.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        states = x.gather(1, index)

        def whole(z: Tensor) -> Tensor:
            change = weights.to(x.dtype) * (z - states)
            return (x + self.beside(x)).scatter_add(1, index, change)

        return on_first(call(states, **more), whole)

    def shares(self, x: Tensor, k: Tensor, real: Tensor) -> Tensor:
        """Return lambda ``[batch, tokens]``, in float32 at least."""
        precise = torch.promote_types(self.router.dtype, torch.float32)
        with full_precision(x):
            scores = x.to(precise) @ self.router.to(precise)
            return soft_top_k(scores, k, real, self.temperature, self.steps)

    def beside(self, x: Tensor) -> Tensor:
        """Return the adapter's output for all tokens."""
        low = self.activation(cast_linear(self, self.down, layer_norm(x, (self.width,))))
        return cast_linear(self, self.up, low)


class CoDA(Method):
    """Blocks that process only some tokens, in parallel with adapters that process all of them."""

    name = "coda"
    Config = CoDAConfig
    tags = Tags(category="additive", paper="2304.04947", identity_at_init=False, identity_options={"reduction": 1.0})
    target = ("block",)

    def inject(self, model: nn.Module, config: CoDAConfig, surgeon: Surgeon) -> None:
        stacks = TokenStacks(surgeon)
        for site in block_sites(surgeon):
            stack = stacks.of(site)
            if stack is not None and (stack.causal or stack.reads):
                raise UnsupportedSite(
                    f"{site.path} is causal: later tokens would influence which earlier ones are chosen; target the "
                    "blocks of an encoder"
                )
            inside = [each for each in surgeon.resolver.host.entries if each.block == site.path]
            makes = [each.path for each in inside if each.role == "embed.pos"]
            if makes:
                raise UnsupportedSite(
                    f"{makes[0]} computes positions inside its block, which would count only the chosen tokens; "
                    "exclude this block"
                )
            visible = VisibleTokens(stack)
            surgeon.graft(site, ConditionalOperator, config, visible=visible)

    @staticmethod
    def parameter_count(site: BlockSite, config: CoDAConfig) -> int:
        return 2 * site.width * config.bottleneck + config.bottleneck + 2 * site.width
