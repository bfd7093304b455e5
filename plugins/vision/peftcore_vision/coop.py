"""CoOp, context optimization.   Zhou et al. 2021, arXiv 2109.01134 (code: KaiyangZhou/CoOp).

    t_k = g([SOS; v_1 ... v_M; name_k; EOS]),   p(k | x) = softmax_k(scale * cos(f(x), t_k)),   v [M, d]

Context vectors stand in the place of the words "a photo of a" in front of the names of classes, before positions are
added. As in the authors' code the texts hold the places: tokenize ``"X X X X " + name + "."`` with M words of one token
each; whatever they are, the M places behind the first token (behind padding on the left, by the mask) get v. Lengths,
masks, positions and the place of EOS are then the model's own affair. For the authors' other orders (the name first, or
in the middle) say which token holds a place: ``placeholder=343`` is "x" in CLIP. The batch of texts is the classes:

    peftcore.apply(clip, "coop", length=4)
    clip(input_ids=texts_of_all_classes, pixel_values=images).logits_per_image

With `classes` each class has a context of its own (CSC): row k of the batch gets the k-th, or
``peftcore.call(model, classes=[2, 0])`` says whose each row is.

v starts as N(0, 0.02), or as the embeddings of `init_ids`. Parameters: M d, or classes M d. Nothing merges, but once
trained the features of all classes can be kept.
Use it to adapt CLIP with 16 or fewer images a class; without CSC an adapter holds for any names. Models that generate
are refused: prompt_tuning is for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from peftcore import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, Tap, forward_context
from peftcore.errors import ConfigError, MissingContext, SequenceError, UnsupportedSite


class Config(MethodConfig):
    """Options of CoOp."""

    method: Literal["coop"] = "coop"
    length: PositiveInt = 16
    """Context vectors M."""
    init_ids: list[NonNegativeInt] = Field(default_factory=list)
    """Start from the embeddings of these tokens; there are as many context vectors then."""
    placeholder: NonNegativeInt | None = None
    """The token whose places the vectors take, in their order; None takes the places behind the first token."""
    classes: PositiveInt | None = None
    """How many classes have contexts of their own; None shares one."""

    @property
    def count(self) -> int:
        """Count the vectors of a context."""
        return len(self.init_ids) or self.length


class ContextOperator(Operator):
    """Puts context vectors in their places among the embedded tokens."""

    observes = frozenset({"tower"})

    def __init__(self, site: Site, config: Config, names: tuple[str, ...] = ()) -> None:
        super().__init__(site)
        self.names = names  # of the tower's arguments
        self.placeholder, self.classes = config.placeholder, config.classes
        self.mask = Tap()  # from the tower to its embeddings
        start = torch.randn(config.classes or 1, config.count, site.out_features) * 0.02
        if config.init_ids:
            if max(config.init_ids) >= site.in_features:
                raise ConfigError(f"init_ids: {max(config.init_ids)} is no token of a vocabulary of {site.in_features}")
            start = site.weight().detach()[:, config.init_ids].T.to(start).expand_as(start).clone()
        self.context = nn.Parameter(start)  # [classes or 1, M, d]

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._note if form == "tower" else super().at(form, module)

    def _note(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.mask.put({**dict(zip(self.names, args, strict=False)), **kwargs}.get("attention_mask"))
        try:
            return call(*args, **kwargs)
        finally:
            self.mask.take()

    def forward(self, call: Callable[..., Any], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embedded: Tensor = call(ids, *args, **kwargs)
        (context,) = self.cast(embedded, self.context)
        held = self._held(ids)
        number = (held.cumsum(-1) - 1).clamp(0, context.shape[1] - 1)  # which of the vectors a place gets
        chosen = context[self._rows(ids)[:, None], number]  # [batch, tokens, d]
        return torch.where(held[..., None], chosen, embedded)

    def _held(self, ids: Tensor) -> Tensor:
        """Mark the places of the context [batch, tokens].

        Raises:
            SequenceError: there are not as many as vectors.
        """
        count = self.context.shape[1]
        if self.placeholder is None:
            at, mask = torch.arange(ids.shape[-1], device=ids.device), self.mask.get()
            if isinstance(mask, Tensor) and mask.shape == ids.shape:
                at = at - (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # places behind the padding on the left
            held, enough = ((at >= 1) & (at <= count)).expand_as(ids), ids.shape[-1] > count
        else:
            held = ids == self.placeholder
            enough = torch.compiler.is_compiling() or bool((held.sum(-1) == count).all())
        if not enough:
            raise SequenceError(f"{ids.shape[-1]} tokens lack the {count} places of the context: tokenize them, too")
        return held

    def _rows(self, ids: Tensor) -> Tensor:
        """Return the number of the context that each row of the batch gets."""
        if self.classes is None:
            return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        told = forward_context().context.get("classes")
        if told is None and len(ids) != self.classes:
            raise MissingContext(f"{len(ids)} texts, but {self.classes} classes: peftcore.call(model, classes=...)")
        return torch.as_tensor(range(self.classes) if told is None else told, device=ids.device)


class CoOp(Method):
    """Trained words in front of the names of classes."""

    name = "coop"
    Config = Config
    tags = Tags(category="vision", paper="2109.01134", identity_at_init=False)
    learning_rate = LearningRate(
        2e-3,
        "KaiyangZhou/CoOp@ff61507, configs/trainers/CoOp/rn50.yaml",
        on="CLIP RN50, 16 images a class",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("embed",)

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        stacks = {f"{each.path}.{each.table}".lstrip("."): each for each in surgeon.resolver.token_stacks()}
        sites, refused = [], []
        for site in surgeon.sites():
            stack = stacks.get(site.module_path)
            if stack is None:
                refused.append(f"{site.path} embeds no texts of a tower")
            elif stack.causal and stack.takes_cache:
                refused.append(f"{site.path} embeds what a model generates; prompt_tuning is for that")
            else:
                sites.append(site)
        if refused and (surgeon.wishes.target is not None or not sites):
            raise UnsupportedSite(refused[0])
        for site in sites:
            path = stacks[site.module_path].path
            tower = replace(site, module=surgeon.resolver.modules[path], module_path=path, form="tower")
            operator = functools.partial(ContextOperator, names=tower.arguments)
            surgeon.graft(replace(site, form="activation"), operator, config, (tower,))

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return (config.classes or 1) * config.count * site.out_features
