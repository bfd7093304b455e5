"""SAPT: LoRAs of tasks that come one after the other, mixed by attention to each text.   Zhao et al. 2024, arXiv
2401.08295 (circle-hit/SAPT).

Equation:
    y = W x + b + s sum_j a_j B_j A_j x,    a = softmax_j(k_j . q / sqrt(d)),    s = alpha / rank
    q = LN(silu(W_up W_down max(E)));       loss = replay * mean_rows sum_j t_j (log t_j - log a_j)

E are the embedded tokens of the text; max is the maximum of each feature over them. a is the same at all target
modules. Each task has a key k_j [d], and A_j [rank, in], B_j [out, rank] at each module. The last task is the one being
learned: its key and LoRAs train, and so do W_down [hidden, d], W_up [d, hidden] and the norm. Keys and LoRAs of earlier
tasks are frozen, and as in the code, no gradient passes through these LoRAs to x. Calls need not pass the task of a
text. To add the next task:

    second = peftcore.apply(model, "sapt", tasks=2, name="second")
    peftcore_multitask.sapt.take_tasks(second, first)  # the values of an adapter of one task, which may go then

The loss preserves the shares that the network computes for texts of earlier tasks (the paper's pseudo-samples). Such
texts are rows of the batch without labels. The call passes their target shares t [rows, tasks], the oldest task first,
with zeros for later tasks: ``with peftcore.call(model, attention=t)``. For all other rows t is zero. The authors' code
uses as t the mean shares over the texts of a task; `injection.report()` contains them.

The text is the part of the input before the first label, or the whole input without labels, unless
``peftcore.call(model, prompt_length=...)`` passes its length. Generated tokens do not change the shares.

Parameters: tasks * rank * (in + out) per module, tasks * d + 2 hidden d + 2 d once.

Start: Keys uniform in +-1, A in +-1/sqrt(inputs), the network from N(0, 0.02^2) as transformers starts it in the
authors' Llama (in their T5, uniform in +-1/sqrt(inputs)), B at zero. A fresh adapter is the identity for the first
task.

Differs from the authors' code: The authors' max includes padding; here it does not. Dropout, which is zero in the
authors' scripts, is left out. Encoder-decoder models are refused, since the text is not available when the decoder
runs.

Use it: `peftcore.apply(model, "sapt")`, for tasks that are learned one after the other, if earlier tasks must not be
forgotten and should help later ones; not for tasks that are available at the same time (`hydralora`), nor for LoRAs
that were trained without this attention (`mole`).
"""

from __future__ import annotations

import math
import sys
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    PromptPositions,
    Router,
    Site,
    Surgeon,
    Tags,
    Tap,
    TokenStack,
    TokenStacks,
    cache_in,
    cached_tokens,
    forward_context,
    full_precision,
)
from peftcore.errors import ConfigError, MissingContext, SequenceError, UnsupportedSite
from peftcore_multitask._chosen import add_shares
from peftcore_multitask._skills import factors

__all__ = ["SAPT", "SAPTConfig", "take_tasks"]

STD = 0.02
"""Standard deviation of the network's weights at the start."""


class SAPTConfig(MethodConfig):
    """Options of SAPT."""

    method: Literal["sapt"] = "sapt"
    tasks: PositiveInt = Field(default=1, le=1000)
    """Number of tasks so far; the last one is being learned."""
    rank: PositiveInt = 4
    """Rank of each LoRA."""
    alpha: PositiveFloat = 32.0
    """Numerator of the scale ``alpha / rank``."""
    hidden: PositiveInt = 100
    """Width of the network that reads texts."""
    replay: NonNegativeFloat = 1.0
    """Factor of the loss of rows whose shares the call passes."""


def take_tasks(injection: AppliedMethod, trained: AppliedMethod) -> None:
    """Copy all tensors of `trained`, an adapter for fewer tasks, into `injection`, an adapter of the same method for
    more tasks.

    Raises:
        ConfigError: the adapters differ in method, modules or sizes, or `injection` has fewer tasks. Nothing is changed
            then.
    """
    mine, theirs = (
        {f"{path}:{name}": value for path, op in each.operators.items() for name, value in op.named_parameters()}
        for each in (injection, trained)
    )
    kinds = {(type(each.config), frozenset(each.operators)) for each in (injection, trained)}
    if len(kinds) > 1 or any(name not in mine or mine[name].shape != value.shape for name, value in theirs.items()):
        raise ConfigError(
            "take_tasks(more, fewer) needs two adapters of one method with the same modules and sizes, and the first "
            "must have all tasks of the second, and more"
        )
    with torch.no_grad():
        for name, value in theirs.items():
            mine[name].copy_(value)


def divergence(told: Any, logs: Tensor) -> Tensor:
    """Return the divergence of shares from target shares, as a mean over the rows that have targets.

    Args:
        told: the target shares ``[rows, tasks]``; rows of zeros are skipped.
        logs: the logarithms of the shares ``[rows, tasks]``.

    Raises:
        ConfigError: the target shares have another number of rows or tasks.
    """
    told = torch.as_tensor(told).to(logs)
    if told.shape != logs.shape:
        raise ConfigError(
            f"attention={tuple(told.shape)}: pass target shares of shape {tuple(logs.shape)}, for rows and tasks"
        )
    return (torch.special.xlogy(told, told) - told * logs).sum() / told.any(1).sum().clamp(min=1)


EMBEDS = "inputs_embeds"
KEPT = "_peftcore_decided"
"""The name of the attribute of a cache that stores the shares of its texts."""


class Decisions:
    """Stores the shares that one operator computed for texts (its decisions), as an attribute of the model's caches.
    Copies of the model can read them too."""

    def __init__(self) -> None:
        self.stamp = uuid.uuid4().hex

    def of(self, cache: Any) -> Tensor | None:
        """Return the weights of the tasks' LoRAs that were stored with a key-value cache; None if none were."""
        kept: Tensor | None = getattr(cache, KEPT, {}).get(self.stamp)
        return kept

    def keep(self, cache: Any, decided: Tensor) -> None:
        """Store shares with a cache. Caches that do not accept attributes are skipped."""
        with suppress(AttributeError):
            setattr(cache, KEPT, {**getattr(cache, KEPT, {}), self.stamp: decided.detach()})


class SharedAttention(Router):
    """The keys of the tasks, and the network that reads texts. It stores the shares of each text for all LoRAs.

    The operator wraps the stack of blocks, and reads the output of its token embedding. A forward that continues a
    cache uses the shares that are stored with the cache. Copies of the cache contain them too, and they are repeated
    for repeated rows (beams).
    """

    routes = "sequence"
    observes = frozenset({"table"})

    def __init__(self, site: Site, config: SAPTConfig, stack: TokenStack, decided: Tap) -> None:
        super().__init__(site)
        self.decided, self.given, self.kept, self.names = decided, Tap(), Decisions(), site.arguments
        self.positions = PromptPositions(0, stack.causal, 0, sys.maxsize, halves=False, whole=True)
        width, self.replay = site.out_features, config.replay
        self.keys = nn.ParameterList(torch.empty(width).uniform_(-1, 1) for _ in range(config.tasks))
        self.down, self.up = nn.Linear(width, config.hidden, bias=False), nn.Linear(config.hidden, width, bias=False)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=STD)
        self.norm = nn.LayerNorm(width)

    def decide(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Return the shares of texts ``[rows, tasks]`` for embedded tokens ``[rows, tokens, d]``. The mask `text`
        ``[rows, tokens]`` is True at tokens of the text."""
        with full_precision(embeds):
            logs = self.scores(embeds, text).log_softmax(-1)
            told = forward_context().context.get("attention") if self.training else None
            if told is not None:
                forward_context().add_loss(self.replay * divergence(told, logs), self)
            shares = logs.exp()
        self.noted(shares)
        return shares

    def scores(self, embeds: Tensor, text: Tensor) -> Tensor:
        """Return the logits of the shares, ``[rows, tasks]``."""
        keys = torch.stack([*self.keys])
        largest = embeds.to(keys.dtype).masked_fill(~text[..., None], -torch.inf).amax(1)
        largest = largest.masked_fill(~text.any(1, keepdim=True), 0.0)  # nothing was said
        sought = self.norm(nn.functional.silu(self.up(self.down(largest))))
        return sought @ keys.mT / math.sqrt(keys.shape[1])

    def at(self, form: str, module: Any) -> Callable[..., Any]:
        return self._at_table if form == "table" else self

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.given.put(given)
        if given.get(EMBEDS) is not None:
            self._leave(given[EMBEDS])
        output = call(*args, **kwargs)
        cache = cache_in(output) if isinstance(output, Mapping) else None
        cache = cache_in(given) if cache is None else cache
        if cache is not None:
            self.kept.keep(cache, self.decided.get())
        return output

    def _at_table(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        embeds = call(*args, **kwargs)
        self._leave(embeds)
        return embeds

    def _leave(self, embeds: Tensor) -> None:
        given = self.given.take()
        if given is None:  # the table is used elsewhere
            return
        if cached_tokens(given, 0, embeds.shape[1]):
            self.decided.put(self._again(self.kept.of(cache_in(given)), embeds))
            return
        found = self.positions.positions(embeds, given, self.training)
        assert found is not None, "nothing is in a cache"
        self.decided.put(self.decide(embeds, found[1].expand(embeds.shape[:2])))

    def _again(self, kept: Tensor | None, embeds: Tensor) -> Tensor:
        """Return the shares `kept`, repeated for the rows of the batch. Raises SequenceError if there are none or they
        do not fit, and MissingContext if the input may be a part of the text."""
        if kept is None or len(embeds) % len(kept):
            raise SequenceError(
                "this cache was filled without this adapter, or for other rows: start with an empty cache, and leave "
                "the adapter active while it fills"
            )
        if embeds.shape[1] > 1 and forward_context().context.get("prompt_length") is None:
            raise MissingContext(
                "this input continues a cache and may belong to the prompt or to the answer: pass the prompt's length "
                "with peftcore.call(model, prompt_length=...)"
            )
        return kept.repeat_interleave(len(embeds) // len(kept), 0)


def deciding_place(surgeon: Surgeon, sites: list[Site]) -> tuple[Site, TokenStack, tuple[Site, ...]]:
    """Return the site of the stack of blocks that contains all given modules, the stack itself, and the site of its
    token embedding.

    Raises:
        UnsupportedSite: the modules are not in one stack, or the stack is an encoder or decoder connected to another
            stack.
    """
    place, stack = TokenStacks(surgeon).around(sites), TokenStacks(surgeon).of(sites[0])
    assert stack is not None, "there is a place around it"
    table = surgeon.resolver.site(f"{stack.path}.{stack.table}".lstrip("."), "weight")
    return place, stack, (replace(table, form="table"),)


class SAPTOperator(Operator):
    """The LoRAs of one module."""

    def __init__(self, site: Site, config: SAPTConfig, decided: Tap) -> None:
        super().__init__(site)
        if not (self.layer.called and self.layer.of_vectors) or site.batch:
            raise UnsupportedSite(f"{site.path} is not a linear layer; exclude it")
        self.decided, self.scale = decided, config.alpha / config.rank
        shapes = (config.rank, site.in_features), (site.out_features, config.rank)
        every = [factors(site, *shapes, site.in_features) for _ in range(config.tasks)]
        self.A, self.B = (nn.ParameterList(each) for each in zip(*every, strict=True))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:  # x [..., in]
        shares = self.decided.get()
        if shares is None:
            raise MissingContext(
                "a part of the model was called by itself, so the adapter has not read its text; call the whole model"
            )
        if len(x) % len(shares):
            raise SequenceError(
                f"a module got {tuple(x.shape)}, with another number of rows than the stack of blocks; exclude it"
            )
        shares = shares.repeat_interleave(len(x) // len(shares), 0).view(len(x), *[1] * (x.dim() - 2), -1)
        return self.update(call(x), x, shares)

    def update(self, y: Tensor, x: Tensor, shares: Tensor) -> Tensor:
        """Return y plus the outputs of all LoRAs for x, weighted by shares ``[rows, ..., tasks]``."""
        every = [(A, B, self.scale) for A, B in zip(self.A, self.B, strict=True)]
        if every[:-1]:
            y = add_shares(self, y, x.detach(), every[:-1], shares[..., :-1])
        return add_shares(self, y, x, every[-1:], shares[..., -1:])


class SAPT(Method):
    """LoRAs of tasks that are learned one after the other, mixed by attention to each text."""

    name = "sapt"
    Config = SAPTConfig
    tags = Tags(
        category="multitask",
        paper="2401.08295",
        per_row=False,
        routes="sequence",
        exact_gradient=False,
        reentrant=False,
    )
    learning_rate = LearningRate(5e-5, "circle-hit/SAPT@52a52b9, gen_script_superni_llama.py", on="Llama 2 7B, SuperNI")
    target = ("attn.q", "attn.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: SAPTConfig, surgeon: Surgeon) -> None:
        sites, decided = surgeon.sites(), Tap(until_backward=True)
        place, stack, table = deciding_place(surgeon, sites)
        surgeon.graft(place, SharedAttention, config, table, stack=stack, decided=decided)
        for site in sites:
            surgeon.graft(site, SAPTOperator, config, decided=decided)

    def trainable(self, model: nn.Module, config: SAPTConfig, injection: AppliedMethod) -> None:
        super().trainable(model, config, injection)
        for each in injection.operators.values():
            for name, parameter in each.named_parameters():
                kind, _, number = name.partition(".")
                if kind in ("A", "B", "keys") and int(number) < config.tasks - 1:
                    parameter.requires_grad_(False)

    @staticmethod
    def parameter_count(site: Site, config: SAPTConfig) -> int:
        if site.role == "stack":
            return (config.tasks + 2 * config.hidden + 2) * site.out_features
        return config.tasks * config.rank * (site.in_features + site.out_features)
