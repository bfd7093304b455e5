"""VQT, visual query tuning: rows that ask and are not asked.   Tu, Mai and Chao 2022, arXiv 2212.03220.

Equation:
    [z_l; x_l] = L_l([P_l; x_{l-1}]),   in whose attention all rows see the tokens x alone
    logits = W n(x_head) + b + sum_l U_l n(s(z_l)),   n(v) = v / |v|,   P_l [length, d]

P_l are queries that summarise the tokens of block l. They pass through the block's norms, projections and feed-forward
as tokens do, but no row attends to them, so the model's own tokens do not change. The block's outputs z_l for them are
removed after the block, and only the head reads them: s concatenates the rows of z_l ("concat"), or takes their mean or
a trained weighted sum (U_l then reads d numbers). x_head is the head's input; W and b are the head's weights, which
train too.

Parameters: length * d per block, for each head with c classes c * length * d per block ("concat") or c * d, and the
head; 9,216 without heads for ViT-B with length 1. "weighted" has `length` more for each block.

Start: P_l uniform in +-sqrt(6 / (3 p^2 + d)), where p is the side of a patch, and U_l at zero. Not an identity, since
the head's inputs are normalized; ``normalize=False`` makes it one.

Differs from the authors' code: The authors (andytu28/VQT) begin with a new head. Their selection of features by a group
lasso (KEEP_FRAC) trains once, keeps the best columns and then trains again; it is not available. They keep dropout of
the frozen blocks off while prompts train: put the model in eval mode for that.

Use it: `peftcore.apply(model, "vqt")`, where a head needs features of all layers and the backbone must not change, as
when several tasks share one forward; not where features have to change with the task: use the related `vpt_deep`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    Attend,
    AttentionOperator,
    AttentionSite,
    LearningRate,
    Method,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    head_sites,
    on_first,
)
from peftcore.errors import SequenceError, UnsupportedSite
from peftcore_vision._prompts import PromptOperator, PromptSite, RowsConfig, attentions_of, prompt_sites


class VQTConfig(RowsConfig):
    """Options of VQT."""

    overridable = ()

    method: Literal["vqt"] = "vqt"
    length: PositiveInt = 1
    """Number of queries in each block."""
    dropout: Share = 0.1
    """Dropout probability of the queries."""
    summary: Literal["concat", "mean", "weighted"] = "concat"
    """The values that the head reads of a block's queries: all of them, their mean, or a sum with trained weights."""
    normalize: bool = True
    """Normalize to length 1 the head's own input and the features that it reads from each block's queries."""
    train_head: bool = True
    """Train the matrix and bias of the head, too."""


@dataclass(frozen=True, eq=False)
class QuerySite(PromptSite):
    """A block with trained queries, whose outputs the heads read."""

    classes: tuple[int, ...] = ()
    """Number of outputs of each head."""


class QueryOperator(PromptOperator):
    """The queries of one block, and their scores for each head."""

    def __init__(self, site: QuerySite, config: VQTConfig, asking: Tap, made: Tap) -> None:
        super().__init__(site, config)
        self.asking, self.made = asking, made
        self.summary, self.normalize = config.summary, config.normalize
        read = site.width * (config.length if config.summary == "concat" else 1)
        self.reads = nn.ParameterList(torch.zeros(classes, read) for classes in site.classes)
        self.sums = nn.Parameter(torch.ones(config.length)) if config.summary == "weighted" else None

    def forward(self, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self.rows(x, (*args, *kwargs.values()))
        count = self.length + x.shape[1]
        self.asking.put((self.length, count))
        output = call(torch.cat([rows, x], dim=1), *args, **kwargs)
        self.asking.take()
        return on_first(output, lambda y: self._parted(y, count))

    def _parted(self, y: Tensor, count: int) -> Tensor:
        if y.shape[1] > count:
            raise SequenceError("another adapter adds tokens that stay in this block; apply vqt before it")
        read = unit(self._summed(y[:, : self.length]), self.normalize)
        self.made.put([nn.functional.linear(read, each) for each in self.cast(read, *self.reads)])
        return y[:, self.length :].contiguous()  # heads may want to view it

    def _summed(self, z: Tensor) -> Tensor:
        """Return [batch, features] of queries [batch, length, d]."""
        if self.summary == "concat":
            return z.flatten(1)
        if self.sums is None:
            return z.mean(1)
        (sums,) = self.cast(z, self.sums)
        return (sums[:, None] * z).sum(1)


def unit(v: Tensor, wanted: bool) -> Tensor:
    """Return the vectors, normalized to length 1 if `wanted`."""
    return nn.functional.normalize(v, dim=-1) if wanted else v


class UnaskedOperator(AttentionOperator):
    """Hides the keys of the trained queries of a block from all rows of the attention. Keys of other operators may be
    in front of the queries' keys."""

    def __init__(self, site: AttentionSite, asking: Tap) -> None:
        super().__init__(site)
        self.asking = asking

    def forward(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        asking = self.asking.get()
        if asking is None:
            return attend(query, key, value)
        (length, count), rows = asking, query.shape[2]
        hidden = torch.zeros(1, 1, rows, rows, dtype=torch.bool, device=query.device)
        hidden[..., rows - count : rows - count + length] = True
        return attend.hiding(hidden, query, key, value)


class ReadingOperator(Operator):
    """Adds the scores of the blocks' queries to a head's output."""

    def __init__(self, site: Site, number: int, normalize: bool, made: Sequence[Tap]) -> None:
        super().__init__(site)
        self.number, self.normalize, self.made = number, normalize, list(made)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        made = [tap.get() for tap in self.made]
        if x.dim() != 2 or any(each is None for each in made):
            raise SequenceError(
                "vqt needs a head that reads one vector [batch, d] for each image after all blocks; this model's head "
                "reads something else"
            )
        y = call(unit(x, self.normalize))
        for each in made:
            y = y + each[self.number].to(y.dtype)
        return y


class VQT(Method):
    """Trained queries in each block of a vision transformer, whose outputs only the head reads."""

    name = "vqt"
    Config = VQTConfig
    tags = Tags(
        category="vision",
        paper="2212.03220",
        identity_at_init=False,
        identity_options={"normalize": False},
        per_row=False,
        random=True,
        reentrant=False,
    )
    learning_rate = LearningRate(
        0.25,
        "andytu28/VQT@9bca87e, head2toe_train.py",
        on="ViT-B/16, VTAB-1k, batches of 128: 0.5 of its range from 0.05 to 1, times 128 / 256",
        optimizer="Adam",
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: VQTConfig, surgeon: Surgeon) -> None:
        sites = prompt_sites(surgeon)
        host = surgeon.resolver.host
        tower = host.at(sites[0].module_path)[0].tower
        heads = [
            head
            for head in head_sites(surgeon)
            if host.at(head.module_path)[0].tower == tower and head.layer.has(head.module, head.tensor)
        ]
        if not heads or any(site.width != sites[0].width for site in sites):
            raise UnsupportedSite(
                f"{type(model).__name__} does not have a head after blocks of one width, which vqt needs to read its "
                "queries"
            )
        made, classes = [], tuple(head.out_features for head in heads)
        for site in sites:
            asking, own = Tap(), Tap(until_backward=True, learns=True)
            place = QuerySite(**vars(site), classes=classes)
            surgeon.graft(place, QueryOperator, config, asking=asking, made=own)
            for attention in attentions_of(surgeon, site):
                surgeon.attention(attention, UnaskedOperator, asking=asking)
            made.append(own)
        for number, head in enumerate(heads):
            surgeon.graft(head, ReadingOperator, number=number, normalize=config.normalize, made=made)
        for head in heads if config.train_head else []:
            surgeon.train(head.module_path)

    @staticmethod
    def parameter_count(site: Site, config: VQTConfig) -> int:
        if not isinstance(site, QuerySite):
            return site.numel if site.form == "weight" else 0
        read = site.width * (config.length if config.summary == "concat" else 1)
        return config.length * site.width + sum(site.classes) * read + config.length * (config.summary == "weighted")
