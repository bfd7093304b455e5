"""CoOp, context optimization.   Zhou et al. 2021, arXiv 2109.01134 (code: KaiyangZhou/CoOp).

Equation:
    t_k = g([SOS; v_1 ... v_M; name_k; EOS]),   p(k | x) = softmax_k(scale * cos(f(x), t_k)),   v [M, d]

Context vectors replace the words "a photo of a" in front of the names of classes, before positions are added. As in the
authors' code, texts contain placeholder words: tokenize ``"X X X X " + name + "."`` with M words of one token each. v
replaces the M tokens right after the first one, whatever these words are. Left padding is skipped if the attention mask
shows it. So the model computes lengths, masks, positions and the position of EOS as usual. For the authors' other
orders (the name first, or in the middle) set the token that v replaces: ``placeholder=343`` is "x" in CLIP. The texts
of a batch are the classes:

    peftcore.apply(clip, "coop", length=4)
    clip(input_ids=texts_of_all_classes, pixel_values=images).logits_per_image

With `classes` each class has a separate context (CSC): row k of the batch gets context k, unless ``peftcore.call(model,
classes=[2, 0])`` passes the class of each row.

Parameters: M d, or classes M d. The method cannot be merged, but after training the text features of all classes can be
computed once and cached.

Start: v starts as N(0, 0.02), or as the embeddings of `init_ids`. No start is an identity.

Differs from the authors' code: The authors' other orders of words need `placeholder`; no other difference is known.

Use it: `peftcore.apply(model, "coop")`, to adapt CLIP with 16 or fewer images a class; without CSC one adapter works
for any class names. Models that generate text are refused: use prompt_tuning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags, forward_context
from peftcore.errors import MissingContext
from peftcore_vision._prompt_words import PlacesConfig, PlacesOperator, put_at, text_sites, words


class CoOpConfig(PlacesConfig):
    """Options of CoOp."""

    method: Literal["coop"] = "coop"
    classes: PositiveInt | None = None
    """Number of classes with separate contexts; None trains one context for all classes."""


class ContextOperator(PlacesOperator):
    """Inserts context vectors at their positions among the embedded tokens."""

    def __init__(self, site: Site, config: CoOpConfig, names: tuple[str, ...] = ()) -> None:
        super().__init__(site, config, names)
        self.classes = config.classes
        self.context = nn.Parameter(words(site, config, config.classes or 1))  # [classes or 1, M, d]

    def forward(self, call: Callable[..., Any], ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embedded: Tensor = call(ids, *args, **kwargs)
        (context,) = self.cast(embedded, self.context)
        return put_at(self.held(ids), context[self._rows(ids)], embedded)

    def _rows(self, ids: Tensor) -> Tensor:
        """Return the index of the context for each row of the batch."""
        if self.classes is None:
            return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
        told = forward_context().context.get("classes")
        if told is None and len(ids) != self.classes:
            raise MissingContext(
                f"the model got {len(ids)} texts, but the prompts are for {self.classes} classes; pass the class of "
                "each text: with peftcore.call(model, classes=...): ..."
            )
        return torch.as_tensor(range(self.classes) if told is None else told, device=ids.device)


class CoOp(Method):
    """Trained words in front of the names of classes."""

    name = "coop"
    Config = CoOpConfig
    tags = Tags(category="vision", paper="2109.01134", identity_at_init=False)
    learning_rate = LearningRate(
        2e-3,
        "KaiyangZhou/CoOp@ff61507, configs/trainers/CoOp/rn50.yaml",
        on="CLIP RN50, 16 images a class",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("embed",)

    def inject(self, model: nn.Module, config: CoOpConfig, surgeon: Surgeon) -> None:
        for site, tower in text_sites(surgeon):
            surgeon.graft(site, ContextOperator, config, (tower,), names=tower.arguments)

    @staticmethod
    def parameter_count(site: Site, config: CoOpConfig) -> int:
        return (config.classes or 1) * config.count * site.out_features
