"""SPT-LoRA: sensitivity-aware tuning.   He et al. 2023, arXiv 2303.08566 (code: ziplab/SPT).

Equation:
    s(w) = sum over batches of (dL/dw)^2,   the tau weights with the largest s of all sites are chosen
    W' = W + B A              where at least rank (in + out) / ease entries of a matrix were chosen
    W' = W + scatter(v at I)  else, I the chosen entries of W,   v zero
    b' = b + v                of a vector (norm, bias) with at least 1 / vector_ease of its entries chosen, else as W

Before training, one pass over ``data=`` (batches with a loss) determines how a budget of parameters is distributed over
the sites, and the kind of change of each site: single entries where few weights matter, a low-rank update where many
do. Gradients are those of whole batches, as in the code, not of single examples. The budget is `share` of the weights
of all sites. tau is tried in steps from 1 / 20 to 79 / 20 of the budget, and the tau whose number of parameters is
nearest to the budget is used. The choice is stored in `overrides`, and so in the file; sites that the user overrides
keep the user's options.

Weights that are quantized are left out. Without data, as in a plan, each matrix has a low-rank update and each vector
trains as a whole; ``share=1`` results in the same choice.

Parameters: about share * (the number of weights of all sites).

Start: A uniform in +-1/sqrt(in), B and v at zero. A fresh adapter is the identity.

Differs from the authors' code: The authors' steps of tau are chosen for their budget of 400,000. Their A and B start in
the same way, but then the initialization of their whole model draws both again, from N(0, 0.02^2): `init_std` does
that. In training their code drops inputs of updates, and whole updates of samples, with probability 0.1. It leaves
chosen entries of norms frozen, although they count in the budget. Here queries, keys and values of one fused matrix
count as separate sites. The authors also train the head and the class token (``train=["head"]``), count the 768 numbers
of the token in the budget, which is not done here, and do not adapt embeddings. SPT-Adapter, with bottlenecks instead
of low-rank updates, is not available.

Use it: `peftcore.apply(model, "spt_lora", data=[batch], share=0.05)`, where the budget is small and the task differs
much from pretraining; not where one adapter is to be used with several base models, since the chosen entries depend on
the base. `fish_mask` trains only entries, and `eva` distributes ranks according to the inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore import Batch
from peftcore.author import (
    AppliedMethod,
    Batches,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    WeightOperator,
    low_rank,
)
from peftcore.errors import CalibrationError, InactiveSite, UnsupportedSite


class SPTLoRAConfig(MethodConfig):
    """Options of SPT-LoRA."""

    method: Literal["spt_lora"] = "spt_lora"
    share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.005
    """The budget of trained parameters, as a share of the weights of all sites."""
    rank: PositiveInt = 8
    """Rank of the low-rank updates."""
    ease: PositiveFloat = 10.0
    """A matrix gets a low-rank update if the update has at most `ease` times as many parameters as there are chosen
    entries in the matrix."""
    vector_ease: PositiveFloat = 5.0
    """All entries of a vector train if it has at most `vector_ease` times as many entries as there are chosen ones."""
    batches: PositiveInt = 16
    """The largest number of batches of the data that are used."""
    dropout: Share = 0.0
    """Dropout probability of the inputs of low-rank updates."""
    init_std: NonNegativeFloat | None = None
    """Standard deviation of both factors of updates at the start, 0.02 in the authors' code; None: an exact
    identity."""
    entries: NonNegativeInt | None = None
    """Number of trained entries of a site, set in `overrides`. None: a low-rank update of a matrix, or all entries of a
    vector. With data, the method itself sets this option."""


class EntriesOperator(WeightOperator):
    """Adds trained values to some or all entries of a tensor, and stores the indices of these entries. Before the
    method chooses entries, they are the first ones of the tensor.

    Raises:
        UnsupportedSite: the number of entries is zero, or larger than the tensor.
    """

    index: Tensor

    def __init__(self, site: Site, config: SPTLoRAConfig) -> None:
        super().__init__(site)
        self.size, count = site.numel, site.numel if config.entries is None else config.entries
        if not 0 < count <= self.size:
            raise UnsupportedSite(
                f"entries={count} is not a number from 1 to {self.size}, the number of entries of {site.path}"
            )
        self.register_buffer("index", torch.arange(count))
        self.values = nn.Parameter(torch.zeros(count))

    def wrong_values(self, values: Mapping[str, Tensor]) -> Iterator[str]:
        index = values.get("index")
        if index is not None and not (index.diff().gt(0).all() and int(index[0]) >= 0 and int(index[-1]) < self.size):
            yield f"index does not hold ascending places in {self.size} entries"

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten()
        new = (flat.gather(0, self.index) + self.values).to(flat.dtype)
        return flat.scatter(0, self.index, new).view(weight.shape)


def sensitivities(sites: Sequence[Site], batches: Iterable[Batch]) -> dict[str, Tensor]:
    """Return the sum over the batches of (dL/dw)^2 for each weight, as a mapping from the path of a site to a flat
    tensor in the site's logical layout.

    Raises:
        CalibrationError: data is missing, or all gradients are zero.
        InactiveSite: the loss does not depend on any of the weights.
    """
    weights = [site.module.get_parameter(site.tensor).requires_grad_(True) for site in sites]
    sums = {each: torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32)) for each in weights}
    used = False
    for batch in batches:
        gradients = torch.autograd.grad(batch.loss(), list(sums), allow_unused=True)
        for total, gradient in zip(sums.values(), gradients, strict=True):
            if gradient is not None:  # this batch uses it
                used = True
                total.add_(gradient.to(total.dtype).square())
    if not used:
        raise InactiveSite(
            f"the loss of data= does not depend on {sites[0].path} or any other target: name modules in target= that "
            "the model calls for such data"
        )
    if not any(total.any() for total in sums.values()):
        raise CalibrationError("the loss of data= has zero gradients in the weights of all targets: pass other batches")
    return {site.path: site.logical(sums[each]).flatten() for site, each in zip(sites, weights, strict=True)}


def update_size(site: Site, rank: int) -> int:
    """Return how many numbers a low-rank update of a matrix has."""
    return math.prod(site.batch) * rank * (site.in_features * math.prod(site.kernel) + site.out_features)


def is_vector(site: Site) -> bool:
    """True if a site is a bias or the scale of a norm."""
    return len(site.weight_shape) == 1


def counts(scores: Mapping[str, Tensor], taus: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yield for each τ the number of entries of each site among the τ largest scores of all sites."""
    flat = torch.cat(list(scores.values()))
    largest = flat.topk(min(max(taus), len(flat))).indices  # of all τ, since one ranking takes long
    ends = torch.tensor([len(each) for each in scores.values()], device=flat.device).cumsum(0)
    holders = torch.bucketize(largest, ends, right=True)
    for tau in taus:
        yield dict(zip(scores, holders[:tau].bincount(minlength=len(scores)).tolist(), strict=True))


def allotted(
    counted: Mapping[str, int], sites: Mapping[str, Site], rank: int, ease: float, vector_ease: float
) -> dict[str, int | None]:
    """Return how many entries train at each site, given the number of chosen entries at each site.

    None means that the whole vector trains, or that the matrix gets a low-rank update. A vector gets None if it has at
    most `vector_ease` times as many entries as were chosen, a matrix if its low-rank update has at most `ease` times as
    many parameters.
    """
    found: dict[str, int | None] = {}
    for path, count in counted.items():
        site = sites[path]
        whole, times = (site.numel, vector_ease) if is_vector(site) else (update_size(site, rank), ease)
        found[path] = None if count >= whole / times else count
    return found


def total(allotment: Mapping[str, int | None], sites: Mapping[str, Site], rank: int) -> int:
    """Return the total number of trained parameters, given the numbers of trained entries that `allotted` returns."""
    whole = {path: site.numel if is_vector(site) else update_size(site, rank) for path, site in sites.items()}
    return sum(whole[path] if count is None else count for path, count in allotment.items())


def nearest(
    scores: Mapping[str, Tensor], sites: Mapping[str, Site], budget: float, rank: int, ease: float, vector_ease: float
) -> dict[str, int | None]:
    """Return how many entries train at each site (as `allotted` does), so that the number of trained parameters is
    nearest to `budget`.

    The number τ of chosen weights is tried from a twentieth of the budget to nearly four times the budget. Among
    equally near results, the one with the largest τ is returned.
    """
    taus = [max(1, round(step * budget / 20)) for step in range(1, 80)]
    plans = [allotted(each, sites, rank, ease, vector_ease) for each in counts(scores, taus)]
    return min(reversed(plans), key=lambda plan: abs(total(plan, sites, rank) - budget))


class UpdateOperator(Operator):
    """A low-rank update of a matrix."""

    factors_are_parameters = True
    padded = frozenset({"A", "B"})

    def __init__(self, site: Site, config: SPTLoRAConfig) -> None:
        super().__init__(site)
        if config.dropout and site.form == "weight":
            raise UnsupportedSite(
                f"{site.path} is read as a weight, not called, so dropout cannot act on its input: set dropout=0"
            )
        self.input_dropout = config.dropout
        inputs = (site.in_features, *site.kernel)
        bound = 1 / math.sqrt(math.prod(inputs))
        self.A = nn.Parameter(torch.empty(*site.batch, config.rank, *inputs).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(*site.batch, site.out_features, config.rank))
        if config.init_std is not None:
            for factor in (self.A, self.B):
                nn.init.normal_(factor, std=config.init_std)

    @low_rank
    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A, B = self.cast(y, self.A, self.B)
        dropped = nn.functional.dropout(x, self.input_dropout) if self.training and self.input_dropout else x
        return y + self.layer.mix(self.layer.apply(dropped, A), B)

    def merged(self, weight: Tensor) -> Tensor:
        return weight + (self.B @ self.A.flatten(self.B.dim() - 1)).view(weight.shape)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, 1.0


class SPTLoRA(Method):
    """Trains single entries or low-rank updates of those weights whose gradients are large.

    Example:
        injection = peftcore.apply(model, "spt_lora", data=[batch], share=0.05)  # for large models 0.005, the default
    """

    name = "spt_lora"
    Config = SPTLoRAConfig
    tags = Tags(category="vision", paper="2303.08566", mergeable=True, needs_data=True)
    learning_rate = LearningRate(
        1e-3, "ziplab/SPT@e385f67, configs/vtab_supervised_spt_lora.sh", on="ViT-B/16, VTAB-1k"
    )
    target = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down", "norm.*")
    alternatives = ("all-layers",)
    found: dict[str, Tensor] | None = None

    def inject(self, model: nn.Module, config: SPTLoRAConfig, surgeon: Surgeon) -> None:
        tensors: dict[str, Site] = {}
        for site in surgeon.sites():
            biases = [site.at(name) for name in site.tensors() if name.endswith("bias") and not site.missing(name)]
            tensors |= {each.path: each for each in (site, *biases) if not each.layer.packed}
        for site in surgeon.chosen([*tensors.values()]):  # biases too are recorded in files
            entries = config.at(site.path).entries
            if entries != 0:
                if is_vector(site) or entries is not None:
                    surgeon.graft(site, EntriesOperator, config)
                else:
                    surgeon.graft(site, UpdateOperator, config)

    def structure(
        self, model: nn.Module, data: Batches, config: SPTLoRAConfig, sites: Sequence[Site]
    ) -> Mapping[str, Mapping[str, Any] | None]:
        model.eval()
        self.found = sensitivities(sites, islice(data, config.batches))
        own = {} if config.entries is not None else {s.path: s for s in sites if config.at(s.path) is config}
        if not own:  # the user told all of them
            return {}
        budget = config.share * sum(site.numel for site in own.values())
        scores = {path: self.found[path] for path in own}
        plan = nearest(scores, own, budget, config.rank, config.ease, config.vector_ease)
        return {path: {"entries": count} for path, count in plan.items() if count is not None}

    def calibrate(self, model: nn.Module, data: Batches, config: SPTLoRAConfig, injection: AppliedMethod) -> None:
        grafts = [g for g in injection.grafts if g.by_method and isinstance(g.operator, EntriesOperator)]
        if self.found is None:  # a part of a hybrid, whose entries are told
            model.eval()
            with injection.whole.disabled():
                self.found = sensitivities([graft.site for graft in grafts], islice(data, config.batches))
        for graft in grafts:
            index = graft.operator.get_buffer("index")
            index.copy_(self.found[graft.site.path].topk(len(index)).indices.sort().values)
        self.found = None

    @staticmethod
    def parameter_count(site: Site, config: SPTLoRAConfig) -> int:
        if config.entries is not None:
            return config.entries
        return site.numel if is_vector(site) else update_size(site, config.rank)
