"""EVA: explained-variance adaptation.   Paischer et al. 2024, arXiv 2410.07170 (ml-jku/EVA).

Equation:
    X - mean(X) = U S V'   of all inputs X [tokens, in] of a target module, batch by batch
    y = W x + b + s B A dropout(x),   A = V_r', and B = 0 at first,   s = alpha / rank

EVA is a LoRA whose A starts at the directions in which the inputs vary most, so that B gets the largest gradients.
``data=`` contains batches of the training data and needs no labels. Batches are read until the directions have
converged: a direction before and after a batch must have a cosine of `tau` or more.

Ranks are redistributed. Up to rho * rank components of each target module are sorted by the share of the module's
variance that they explain, all modules together. The first rank * modules of them are used: the rank of a module is the
number of its components among these. A module without such a component gets no adapter. With rho=1 every module keeps
its rank. The ranks are stored in `overrides`, and so in the file. If the user overrides options of a module, it keeps
its rank. Modules with the same input have equal components. If these cannot be divided evenly, the earlier modules in
the model get more ranks.

As in the authors' code and in peft, the mean is subtracted from the inputs, and V is approximated (`iterations`).
Positions of padding are excluded, and so are positions without a label, as in peft. A batch with fewer positions than
components is combined with the next one.

Parameters: rank * (in + out) a site, with the redistributed rank. If all sites have the same shape, the sum is at most
that of LoRA.

Start: A = V_r', B at zero: the identity. Embeddings, convolutions and weights that another module reads have no input
vectors. They start as in LoRA, with the configured rank.

Differs from the authors' code: No difference is known. The authors' code was not compared; peft was. peft never stops
if directions do not converge, and skips a batch with fewer positions than components.

Use it: `peftcore.apply(model, "eva", data=batches)`, instead of LoRA where the data is available before training. It
learns faster at first, and the base is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    Batches,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    sees_vectors,
    watched_inputs,
)
from peftcore.errors import CalibrationError
from peftcore_reparameterized._decomposed import nearly_principal
from peftcore_reparameterized._inputs import check_seen
from peftcore_reparameterized._low_rank import low_rank_count
from peftcore_reparameterized.lora import LoRAOperator


class EVAConfig(MethodConfig):
    """Options of EVA: those of LoRA, and those of the analysis of data."""

    method: Literal["eva"] = "eva"
    rank: PositiveInt = 16
    """Rank of the update, on average."""
    alpha: PositiveFloat = 1.0
    """Numerator of the scale ``alpha / rank``."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    rho: Annotated[float, Field(ge=1.0, le=1000.0)] = 2.0
    """Upper bound of the rank of a module, as a multiple of `rank`. With 1 no rank is changed."""
    tau: Annotated[float, Field(ge=0.0, le=1.0)] = 0.99
    """Minimum cosine between a direction before and after a batch, from which on the direction has converged."""
    whiten: bool = False
    """Whether each direction is divided by the square root of its singular value."""
    keep_scale: bool = True
    """Whether alpha is adjusted to the redistributed rank of a module, so that ``alpha / rank`` is the same for all
    modules."""
    use_label_mask: bool = True
    """Whether positions whose label is -100 are excluded."""
    iterations: Annotated[PositiveInt, Field(le=1000)] | None = 4
    """Number of steps of a fast approximation of the directions; None computes them exactly."""
    passes: PositiveInt = 10
    """Maximum number of passes over the data; after that the current directions are used."""


def components(model: nn.Module, data: Batches, config: EVAConfig, sites: Sequence[Site]) -> dict[str, Components]:
    """Return the components of the inputs of each site that was called, the earlier sites first.

    Raises:
        CalibrationError: the data has too few tokens.
    """
    sites = [site for site in sites if sees_vectors(site)]
    at = {site.path: config.at(site.path) for site in sites}
    counts = {
        site.path: min(
            site.in_features, round(config.rank * config.rho) if at[site.path] is config else at[site.path].rank
        )
        for site in sites
    }
    own = {path: Components(count, config.tau, config.iterations) for path, count in counts.items()}
    first: dict[str, str] = {}  # by path: that of the module which was called first with the same input
    inputs: Any = WeakTensorKeyDictionary()
    ranks = dict(counts)
    pending: set[str] = set(counts)

    def look(module: nn.Module, given: Tensor, x: Tensor) -> None:
        for site in (each for each in sites if each.module is module):
            alike = inputs.setdefault(given, {})
            path = first.setdefault(
                site.path, alike.setdefault((at[site.path] is config, counts[site.path]), site.path)
            )
            if path == site.path and path in pending:
                own[path].add(x)

    model.eval()
    with torch.no_grad(), watched_inputs(model, {site.module for site in sites}, look, config.use_label_mask):
        for _ in range(config.passes):
            for batch in data:
                batch.output()
                if all(own[path].seen for path in first.values()):
                    ranks |= redistributed({p: own[q] for p, q in first.items() if at[p] is config}, config.rank)
                pending = {path for path in first.values() if not own[path].settled[: ranks[path]].all()}
                if not pending:
                    break
            if not pending:
                break
    for path, found in first.items():
        if not own[found].seen:
            raise CalibrationError(f"{path} needs {counts[path]} tokens, and the data has fewer; pass more data")
    return {path: own[found] for path, found in first.items()}


class EVA(Method):
    """Low-rank adaptation from the principal components of inputs."""

    name = "eva"
    Config = EVAConfig
    tags = Tags(category="reparameterized", paper="2410.07170", mergeable=True, low_rank=True, needs_data=True)
    learning_rate = LearningRate(5e-4, "ml-jku/EVA@a5ac24b, README.md", on="Llama-2-7B, MetaMathQA")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES
    found: dict[str, Components] | None = None

    def inject(self, model: nn.Module, config: EVAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        check_seen(sites, "lora")
        for site in sites:
            surgeon.graft(site, LoRAOperator, config)

    def structure(
        self, model: nn.Module, data: Batches, config: EVAConfig, sites: Sequence[Site]
    ) -> Mapping[str, Mapping[str, Any] | None]:
        self.found = components(model, data, config, sites)
        free = {path: each for path, each in self.found.items() if config.at(path) is config}
        options: dict[str, Mapping[str, Any] | None] = {}
        for path, rank in redistributed(free, config.rank).items():
            if rank != config.rank:
                alpha = config.alpha * rank / config.rank if config.keep_scale else config.alpha
                options[path] = {"rank": rank, "alpha": alpha} if rank else None
        return options

    def calibrate(self, model: nn.Module, data: Batches, config: EVAConfig, injection: AppliedMethod) -> None:
        grafts: list[Any] = [graft for graft in injection.grafts if graft.by_method]
        if self.found is None:  # a part of a hybrid, whose ranks are told
            with injection.whole.disabled():
                self.found = components(model, data, config, [graft.site for graft in grafts])
        with torch.no_grad():
            for graft in grafts:
                if graft.site.path in self.found:
                    rows = self.found[graft.site.path].start(graft.operator.A.shape[0], config.whiten)
                    graft.operator.A[: len(rows)] = rows
        self.found = None

    @staticmethod
    def parameter_count(site: Site, config: EVAConfig) -> int:
        return low_rank_count(site, config.rank)


class Components:
    """An incremental PCA: the largest principal components of vectors that are added batch by batch."""

    mean: Tensor
    """The mean of all vectors, ``[in]``. It is set by the first batch, as are S and V."""
    S: Tensor
    """The singular values, ``[count]``."""
    V: Tensor
    """The directions, ``[count, in]``."""

    def __init__(self, count: int, tau: float, iterations: int | None) -> None:
        """Compute `count` components. A component is settled when its directions before and after a batch have a cosine
        of `tau` or more."""
        self.count, self.tau, self.iterations, self.seen, self.variation = count, tau, iterations, 0, torch.zeros(())
        self.settled = torch.zeros(count, dtype=torch.bool)
        self.waiting: Tensor | None = None

    @torch.no_grad()
    def add(self, x: Tensor) -> None:  # x [tokens, in]
        """Update the components with a batch; a batch with fewer vectors than components is added to the next one."""
        x = torch.cat([self.waiting, x]) if self.waiting is not None else x
        self.waiting = x if len(x) < self.count else None
        if self.waiting is not None:
            return
        mean, seen = x.mean(0), self.seen + len(x)
        rows = x - mean
        variation = rows.square().sum()
        if self.seen:
            gap = (self.seen * len(x) / seen) ** 0.5 * (self.mean - mean)  # [in]
            rows = torch.cat([self.S.unsqueeze(-1) * self.V, rows, gap.unsqueeze(0)])
            variation = variation + self.variation + gap.square().sum()
            mean = self.mean + (mean - self.mean) * len(x) / seen
        _, S, V = nearly_principal(rows, self.count, 2 * self.count, self.iterations)
        if self.seen:
            self.settled = F.cosine_similarity(V, self.V) >= self.tau
        self.mean, self.seen, self.variation, self.S, self.V = mean, seen, variation, S, V

    def shares(self) -> list[float]:
        """Return the share of the variance that each component explains."""
        shares: list[float] = (self.S.square() / self.variation).tolist()
        return shares

    def start(self, rank: int, whiten: bool) -> Tensor:
        """Return the first directions ``[rank, in]``. With `whiten`, each is divided by the root of its singular
        value."""
        S, V = self.S[:rank], self.V[:rank]
        return V / S.sqrt().unsqueeze(-1) if whiten else V


def redistributed(found: Mapping[str, Components], rank: int) -> dict[str, int]:
    """Return the rank of each module: the number of its components among the ``rank * modules`` components that explain
    most."""
    ranked = sorted(((share, path) for path, each in found.items() for share in each.shares()), key=lambda one: -one[0])
    best = [path for _, path in ranked[: rank * len(found)]]
    return {path: best.count(path) for path in found}
