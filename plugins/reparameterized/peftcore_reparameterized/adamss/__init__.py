"""AdaMSS: adaptive multi-subspace fine-tuning.   NeurIPS 2025, OpenReview 8ZdWmpYxT0 (in peft).

Equation:
    [W | b] = U S V',   V' [components, in + 1] of the largest singular values, frozen
    outputs in K clusters, by K-means of the rows of U;   for the outputs c of a cluster:
    [W | b]'_c = [W | b]_c + B_c A_c V',   B_c [outputs of c, rank],   A_c [rank, components]

Layers without a bias lack the column of b. With `threshold` a cluster may have fewer directions than `rank`: only those
whose squared singular value in U_c, relative to the largest, is above it. A cluster has at most as many directions as
outputs. Directions beyond that are stored, but are neither trained nor used.

With `target_subspaces` the clusters of all sites compete during training. The score of a cluster depends on moving
averages of |w dw| and of its fluctuation. From step `warmup` to `until` (counted from 0, as in peft), the number of
clusters that train decreases by a power law from all to the target, every `interval` steps. Dropped clusters keep their
values and stop training. As in peft, only clusters above the target-th score continue, which is one fewer than the
target, and the averages are reset after each choice.

Files contain V and the cluster of each output, because K-means and the decomposition could differ on another machine.
Files of peft lack the clusters, and peft computes them again. For such files peftcore does so too, and refuses a file
if its V' differs from the computed one.

Parameters: rank * (K * components + out) a site, times the number of experts; components at most those of the weight.
Kernels count as inputs (in * kernel), embeddings as [dim, num], and each expert is a separate weight.

Start: The rows of A_c at the right singular vectors of U_c, B_c at zero: the identity.

Differs from the authors' code: The method is in peft, which was compared; peft supports linear layers only.

Use it: `peftcore.apply(model, "adamss")`, for few parameters along the directions of a weight, or where subspaces
should be dropped in training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import MATRICES, AppliedMethod, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore.errors import ConfigError, TrainingError
from peftcore_reparameterized.adamss.clusters import shape, subspaces
from peftcore_reparameterized.adamss.competing import Competing, choose


class AdaMSSConfig(MethodConfig):
    """Options of AdaMSS."""

    method: Literal["adamss"] = "adamss"
    components: PositiveInt = 100
    """Number of singular vectors of the weight to choose from."""
    subspaces: PositiveInt = 5
    """The number K of clusters of a site's outputs."""
    rank: PositiveInt = 1
    """Rank of the update of each cluster."""
    threshold: Share | None = None
    """Use only those directions of a cluster whose squared singular value, relative to the largest, is above this."""
    target_subspaces: PositiveInt | None = None
    """Number of clusters of all sites that train at the end. With None all of them train."""
    warmup: NonNegativeInt = 50
    """Number of steps before clusters are dropped."""
    until: PositiveInt = 1000
    """The step at which the target is reached."""
    interval: PositiveInt = 100
    """Number of steps from one choice of clusters to the next."""
    beta1: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    """Decay of the moving average of the importance."""
    beta2: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.85
    """Decay of the moving average of the importance's fluctuation."""
    exponent: PositiveFloat = 3.0
    """Exponent of the decrease of the number of clusters: 1 is linear, and larger values decrease it faster at
    first."""
    projection_seed: NonNegativeInt = 0
    """Seed of the random directions at which the approximation of singular vectors starts."""


class AdaMSSOperator(Competing):
    """The updates of one site's clusters."""

    V: Tensor

    def __init__(self, site: Site, config: AdaMSSConfig) -> None:
        super().__init__(site)
        self.rank, self.inputs = config.rank, (site.in_features, *site.kernel)
        V, cluster, ranks, A = subspaces(site, config)
        self.register_buffer("V", V)  # [*batch, components, in * kernel (+ 1)]
        self.register_buffer("cluster", cluster)  # [*batch, out]
        self.register_buffer("ranks", ranks)  # [*batch, K]
        self.A = nn.Parameter(A)  # [*batch, K, rank, components]
        self.B = nn.Parameter(torch.zeros(*site.batch, site.out_features, config.rank))
        self.compete(config.target_subspaces is not None)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the change of [W | b], [*batch, K * rank, in * kernel (+ 1)] and
        [*batch, out, K * rank]."""
        A, B = self.trained("A").flatten(-3, -2), self.trained("B")
        place = self.cluster.unsqueeze(-1) * self.rank + torch.arange(self.rank, device=B.device)
        wide = B.new_zeros(*B.shape[:-1], A.shape[-2])
        return A @ self.V.to(A), wide.scatter(-1, place, B)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        A, B = self.pair()
        size = math.prod(self.inputs)
        y = self.layer.update(call, x, A[..., :size].unflatten(-1, self.inputs), B, 1.0)
        if A.shape[-1] == size:
            return y
        return y + self.layer.along_channels((B @ A[..., size:]).squeeze(-1).to(y.dtype), y)

    def merged(self, weight: Tensor) -> Tensor:
        A, B = self.pair()
        return weight + (B @ A[..., : math.prod(self.inputs)]).view(weight.shape)

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        A, B = self.pair()
        size = math.prod(self.inputs)
        return bias if bias is None or A.shape[-1] == size else bias + (B @ A[..., size:]).squeeze(-1)


class AdaMSS(Method):
    """Adaptive multi-subspace fine-tuning."""

    name = "adamss"
    Config = AdaMSSConfig
    tags = Tags("reparameterized", "NeurIPS 2025, OpenReview 8ZdWmpYxT0", mergeable=True, scheduled=True)
    learning_rate = LearningRate(
        1e-3, "huggingface/peft@5d602fd, examples/adamss_finetuning/glue_adamss_asa_example.py", on="RoBERTa-base, CoLA"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: AdaMSSConfig, surgeon: Surgeon) -> None:
        if config.target_subspaces and config.warmup >= config.until:
            raise ConfigError(f"adamss: warmup={config.warmup} must be below until={config.until}")
        for site in surgeon.sites():
            surgeon.graft(site, AdaMSSOperator, config)

    def follows_steps(self, config: AdaMSSConfig) -> bool:
        return config.target_subspaces is not None

    def check_steps(self, config: AdaMSSConfig, total: int) -> None:
        if config.until >= total:
            raise TrainingError(f"adamss: until={config.until} is not reached in {total} steps; lower it")

    @torch.no_grad()
    def on_step(self, injection: AppliedMethod, step: int, total: int) -> None:
        config, at = injection.config, step - 1
        if not self.follows_steps(config):
            return
        operators = [each for each in injection.operators.values() if isinstance(each, AdaMSSOperator)]
        for operator in operators:
            operator.hold()
        if config.warmup <= at <= config.until:
            for operator in operators:
                operator.observe(config.beta1, config.beta2)
            if at % config.interval == 0:
                target, most = config.target_subspaces, sum(each.active.numel() for each in operators)
                share = (config.until - at) / (config.until - config.warmup)
                choose(operators, int(target + (most - target) * share**config.exponent))

    @staticmethod
    def parameter_count(site: Site, config: AdaMSSConfig) -> int:
        K, components = shape(site, config)
        return math.prod(site.batch) * config.rank * (K * components + site.out_features)
