"""MonteCLoRA: low-rank adaptation by Monte Carlo.   Sengupta et al. 2024, arXiv 2411.04358.

Equation:
    y = W x + b + s B A' dropout(x),   s = alpha / rank,   A' = A in evaluation, and in training
    A' = A + sample_scale sqrt(v) * sum_n w_n eps_n,   eps_n [rank, in] ~ N(0, 1),   n = 1 … N
    v = max(exp(2 t) * chi, 1e-3),   chi [rank] ~ chi^2 with `rank` degrees of freedom       (Wishart's diagonal)
    w = softmax(p - mean(p) + sqrt(d + 1e-6) * eta),   eta [N] ~ N(0, 1)                      (Dirichlet, nearly)
    d = (1 - 2 / N) exp(-p) + sum_n exp(-p_n) / N^2

Each row of A has a separate, learned deviation exp(t), and the N samples have learned weights. So A is the mean of a
distribution, from which training draws A'. t is [rank], p is [N]. An additional loss in training, averaged over the
sites, keeps the distributions near their priors. It is `kl` times the sum of

    KL of Dirichlet(exp(p)) and Dirichlet(prior, …),   rank / 2 * sum_i (u_i - log u_i - 1) with u = exp(2 t),
    N / 2 * sum_i (v_i - log v_i - 1),

and with `entropy` also the sum of all w_n^2. The formula is that of peft. In its first term, the sum of log Gamma(exp
p) - log Gamma(prior) has a plus sign, where the divergence has a minus sign. So this term is not a divergence, but it
is zero if both distributions are equal. At tensors that another module reads, the mean A is used.

Kernels of convolutions count as inputs. Each expert draws separately.

Parameters: rank * (in * kernel + out) + rank + N a site, times the number of experts.

Start: A and B as in LoRA, t and p uniform in 0 to 1: the identity.

Differs from the authors' code: The authors' code was not compared; peft was. peft always computes roots in float32,
draws samples in advance, and supports linear layers only.

Use it: `peftcore.apply(model, "monteclora")`, where the result of LoRA depends on the learning rate and the seed. t and
p are not needed after training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    forward_context,
)
from peftcore_reparameterized._low_rank import add_low_rank, input_dropout, low_rank_count, low_rank_factors


class MonteCLoRAConfig(MethodConfig):
    """Options of MonteCLoRA."""

    method: Literal["monteclora"] = "monteclora"
    rank: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    samples: PositiveInt = 8
    """Number N of samples that are drawn at a time."""
    sample_scale: NonNegativeFloat = 1e-4
    """Factor of the drawn noise."""
    prior: PositiveFloat = 0.1
    """Concentration of the prior of the samples' weights. If it is small, a few samples have most of the weight."""
    kl: NonNegativeFloat = 1e-5
    """Factor of the loss that keeps the distributions near their priors."""
    entropy: bool = False
    """Add sum(w^2) to the loss. This prevents a single sample from getting all of the weight."""


class MonteCLoRAOperator(Operator):
    """The factors of one target module, and the distribution of A."""

    def __init__(self, site: Site, config: MonteCLoRAConfig, share: float) -> None:
        super().__init__(site)
        self.dropout = input_dropout(site, config.dropout)
        self.scale = config.alpha / (config.rank if config.scaling == "rank" else math.sqrt(config.rank))
        self.sample_scale, self.prior, self.entropy = config.sample_scale, config.prior, float(config.entropy)
        self.kl, self.share = config.kl, share
        self.noise = 1.0
        self.t = nn.Parameter(torch.rand(*site.batch, config.rank))
        self.p = nn.Parameter(torch.rand(*site.batch, config.samples))
        self.A, self.B = low_rank_factors(site, config.rank)  # [*batch, rank, in, *kernel], [*batch, out, rank]

    def drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Draw eps [N, *batch, rank, in, *kernel], chi [*batch, rank] and eta [*batch, N]."""
        rank = self.t.shape[-1]
        eps = torch.randn(self.p.shape[-1], *self.A.shape, dtype=self.A.dtype, device=self.A.device)
        normal = torch.randn(*self.t.shape, rank, dtype=self.t.dtype, device=self.t.device)
        return eps, normal.square().sum(-1), torch.randn_like(self.p)

    def sample(self) -> tuple[Tensor, Tensor]:
        """Return A' and the loss of this draw."""
        eps, chi, eta = self.drawn()
        v = ((2 * self.t).exp() * chi).clamp(min=1e-3)
        p, count = self.p, self.p.shape[-1]
        d = (1 - 2 / count) * (-p).exp() + (-p).exp().sum(-1, keepdim=True) / count**2
        w = torch.softmax(p - p.mean(-1, keepdim=True) + (d.clamp(min=1e-6) + 1e-6).sqrt() * eta, -1)
        mixed = (w.movedim(-1, 0).reshape(count, *w.shape[:-1], *[1] * (eps.dim() - w.dim())) * eps).sum(0)
        rows = v.sqrt().reshape(*v.shape, *[1] * (mixed.dim() - v.dim()))
        return self.A + self.sample_scale * rows * mixed, self.loss(v, w)

    def loss(self, v: Tensor, w: Tensor) -> Tensor:
        """Return the loss that keeps the distributions near their priors, for the drawn variances v and weights w."""
        rank, count, a = self.t.shape[-1], self.p.shape[-1], self.p.exp()
        whole, prior = a.sum(-1), torch.full_like(a, self.prior)
        dirichlet = (
            torch.lgamma(whole)
            - torch.lgamma(prior.sum(-1))
            + (torch.lgamma(a) - torch.lgamma(prior)).sum(-1)
            + ((a - prior) * (torch.digamma(a) - torch.digamma(whole).unsqueeze(-1))).sum(-1)
        )
        wishart = rank / 2 * ((2 * self.t).exp() - 2 * self.t - 1).sum(-1)
        normal = count / 2 * (v - v.log() - 1).sum(-1)
        distances = self.kl * (dirichlet + wishart + normal) + self.entropy * w.square().sum(-1)
        return self.share * distances.mean()

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        A: Tensor = self.A
        if self.training and self.noise:
            A, loss = self.sample()
            forward_context().add_loss(loss, self)
        A, B = self.cast(y, A, self.B)
        low = self.layer.apply_dropped(x, A, self.dropout if self.training else 0.0)
        return y + self.layer.mix(self.scale * low, B)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.A, self.B, self.scale

    def merged(self, weight: Tensor) -> Tensor:
        return add_low_rank(weight, self.A, self.scale * self.B)


class MonteCLoRA(Method):
    """Low-rank adaptation by Monte Carlo."""

    name = "monteclora"
    Config = MonteCLoRAConfig
    tags = Tags(
        category="reparameterized", paper="2411.04358", mergeable=True, low_rank=True, random=True, reentrant=False
    )
    learning_rate = LearningRate(1e-4, "LCS2-IIITD/MonteCLoRA@0cd4a77, run_ft_mc.sh", on="Llama 3.2 3B, Math10K")
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: MonteCLoRAConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        for site in sites:
            surgeon.graft(site, MonteCLoRAOperator, config, share=1 / len(sites))

    @staticmethod
    def parameter_count(site: Site, config: MonteCLoRAConfig) -> int:
        return low_rank_count(site, config.rank) + math.prod(site.batch) * (config.rank + config.samples)
