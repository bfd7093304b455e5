"""Consolidator.   Hao et al. 2023, arXiv 2305.00603 (code: THU-MIG/Consolidator).

Equation:
    y = W x + bias + drop(G P x + c),   G [out, in] of g diagonal blocks [out/g, in/g],   c [out]
    W' = W + G P,   bias' = bias + c

By default P is the identity. With `reorder`, P is a permutation that distributes the inputs of each group over all
groups: input j of group i becomes input number j g + i. Several numbers in `groups` make several branches, whose
outputs are added. Each branch has a separate c and a separate random drop. The drop is stochastic depth: whole rows of
the batch skip the branch. By default all matrices of blocks are adapted and all norms train, as in the authors' code.

For convolutions the blocks include the kernel: [out/g, in/g, kernel]. Each expert of a mixture has separate blocks. It
has a c only if it has a bias.

Parameters: in out / g + out per branch, and the norms.

Start: G and c are uniform in +-1e-3, near the identity. ``init_range=0`` makes the start an exact identity.

Differs from the authors' code: In the code the biases of the matrices train too, although each adds to c; name them in
`train` to do the same.

Use it: `peftcore.apply(model, "consolidator")`, where inference must cost nothing and updates of high rank are wanted
for few parameters; not where inputs and outputs lack a common divisor (`lora` accepts any sizes). `gralora` has blocks
of low rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Share, Site, Surgeon, Tags, bias_name
from peftcore.errors import UnsupportedSite


class ConsolidatorConfig(MethodConfig):
    """Options of Consolidator."""

    method: Literal["consolidator"] = "consolidator"
    groups: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] | None = None
    """The number of diagonal blocks of each branch; it must divide the numbers of inputs and outputs. None: one branch
    with half of their greatest common divisor, which is 384 in a ViT-B."""
    reorder: bool = False
    """Distribute the inputs of each group over all groups."""
    init_range: NonNegativeFloat = 1e-3
    """Bound of the uniform draw of G and c; 0 makes a fresh adapter an exact identity."""
    stochastic_depth: Share = 0.0
    """Probability that a row of the batch skips a branch in training. The branch's output for the other rows is scaled
    up."""
    train_norms: bool = True
    """Train all norms, too."""


def written_out(G: Tensor, groups: int, batch: int, reorder: bool) -> Tensor:
    """Return the block-diagonal matrices ``[*batch, out, in, *kernel]`` that have the diagonal blocks ``[*batch, out,
    in/g, *kernel]``. `batch` is the number of leading dimensions. With `reorder`, consecutive inputs belong to
    different groups."""
    own = G.unflatten(batch, (groups, -1)).unsqueeze(batch + 2)  # [*batch, g, out/g, 1, in/g, *kernel]
    same = torch.eye(groups, dtype=G.dtype, device=G.device)
    whole = own * same.view(groups, 1, groups, *[1] * (own.dim() - batch - 3))
    whole = whole.flatten(batch, batch + 1).flatten(batch + 1, batch + 2)
    if not reorder:
        return whole
    return whole.unflatten(batch + 1, (-1, groups)).transpose(batch + 1, batch + 2).flatten(batch + 1, batch + 2)


def groups_of(site: Site, config: ConsolidatorConfig) -> tuple[int, ...]:
    """Return the number of blocks of each branch.

    Raises:
        UnsupportedSite: a number does not divide inputs and outputs.
    """
    common = math.gcd(site.in_features, site.out_features)
    chosen = config.groups or (common // 2 if common % 2 == 0 else common,)
    for each in chosen:
        if common % each:
            raise UnsupportedSite(
                f"{site.path} is {site.out_features} x {site.in_features}, and groups={each} does not divide both; set "
                "another number for it with overrides=, or exclude it"
            )
    return chosen


def _biased(site: Site) -> bool:
    """Return whether the site has a c. It has none if the model reads the weight without calling its module and there
    is no bias to which c could be added."""
    return site.form != "weight" or not site.missing(bias_name(site.tensor))


class ConsolidatorOperator(Operator):
    """The branches in parallel with one matrix."""

    training_only = Operator.training_only | {"drops"}

    def __init__(self, site: Site, config: ConsolidatorConfig) -> None:
        super().__init__(site)
        if site.layer.one_hot:
            raise UnsupportedSite(f"{site.path} is an embedding table, which cannot have a bias; exclude it")
        if config.stochastic_depth and site.form == "weight":
            raise UnsupportedSite(
                f"{site.path} is read as a weight, not called, so stochastic depth cannot act on its update; use "
                "stochastic_depth=0 or exclude it"
            )
        self.groups, self.reorder, self.drops = groups_of(site, config), config.reorder, config.stochastic_depth
        self.stackable, self.batch = not self.drops, len(site.batch)
        bound, out = config.init_range, site.out_features
        shapes = [(*site.batch, out, site.in_features // each, *site.kernel) for each in self.groups]
        self.G = nn.ParameterList(nn.Parameter(torch.empty(shape).uniform_(-bound, bound)) for shape in shapes)
        c = torch.empty(len(shapes), *site.batch, out).uniform_(-bound, bound)
        self.c = nn.Parameter(c) if _biased(site) else None

    def dense(self, number: int) -> Tensor:
        """Return the matrix G P of branch `number`, ``[*batch, out, in, *kernel]``."""
        return written_out(self.G[number], self.groups[number], self.batch, self.reorder)

    def branch(self, x: Tensor, number: int) -> Tensor:
        """Return the output of a branch for the matrix's input; c is not added."""
        if not self.layer.of_vectors:
            return self.layer.apply(x, *self.cast(x, self.dense(number)))
        groups = self.groups[number]
        blocks = self.G[number].to(x.dtype).unflatten(0, (groups, -1))
        dealt = x.unflatten(-1, (groups, -1)).mT.flatten(-2) if self.reorder else x
        return torch.einsum("...gi,goi->...go", dealt.unflatten(-1, (groups, -1)), blocks).flatten(-2)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        for number in range(len(self.groups)):
            added = self.branch(x, number).to(y.dtype)
            if self.c is not None:
                added = added + self.layer.along_channels(self.c[number].to(y.dtype), y)
            if self.training and self.drops:
                keeps = y.new_empty(len(y), *[1] * (y.dim() - 1)).bernoulli_(1 - self.drops)
                added = added * keeps / (1 - self.drops)
            y = y + added
        return y

    def merged(self, weight: Tensor) -> Tensor:
        dense: Any = sum(self.dense(number) for number in range(len(self.groups)))
        return weight + dense.view(weight.shape)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        if self.c is None:
            return bias
        return self.c.sum(0) if bias is None else bias + self.c.sum(0)


class Consolidator(Method):
    """Block-diagonal branches in parallel with matrices, which can be merged."""

    name = "consolidator"
    Config = ConsolidatorConfig
    tags = Tags(
        category="vision",
        paper="2305.00603",
        mergeable=True,
        identity_at_init=False,
        identity_options={"init_range": 0.0},
    )
    learning_rate = LearningRate(
        1e-3,
        "THU-MIG/Consolidator@545d006, configs/Consolidator/VTAB/train_consolidator_vtab.sh",
        on="ViT-B/16, CIFAR-100",
    )
    target = ("all-linear",)

    def inject(self, model: nn.Module, config: ConsolidatorConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, ConsolidatorOperator, config)
        for site in surgeon.at("norm.*") if config.train_norms else ():
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: ConsolidatorConfig) -> int:
        if len(site.weight_shape) < 2:  # a norm's gain or bias
            return site.numel
        inputs = site.in_features * math.prod(site.kernel)
        rows = math.prod(site.batch) * site.out_features
        return sum(rows * (inputs // g + _biased(site)) for g in groups_of(site, config))
