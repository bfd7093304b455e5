"""VB-LoRA: vector bank.   Li et al. 2024, arXiv 2405.15179 (leo-yangli/VB-LoRA).

Equation:
    y = W x + b + B A dropout(x),   A [rank, in] and B [out, rank] in sub-vectors of length b
    sub-vector = sum over i in top k of logits:  softmax(top k logits)_i  V[i],   V [h, b] the bank of all sites

Rows of A and columns of B are split into sub-vectors. Each sub-vector has h logits, and mixes the k vectors of the bank
with the largest logits. The choice changes as the logits train. The update is not scaled. Only the chosen vectors and
their logits get gradients.

If b does not divide a side, the last sub-vector is truncated. Kernels of convolutions count as columns, [rank, in *
kernel], embeddings as [dim, num], and each expert has separate logits. The learning rate of the logits is
`logits_ratio` times that of the bank, as in the authors' code. The rates are set in parameter groups, so they require
an optimizer of ``injection.optimizer(...)``.

Parameters: h * b in all, and rank * h * (in / b + out / b) a site, the quotients rounded up, times the number of
experts. An adapter that is not trained further needs only k of each h logits. Files of peft may contain only these
(`save_only_topk_weights`). Such files can be read, but further training cannot change which vectors are chosen.

Start: V uniform in +-`bank_bound`, logits from N(0, `logits_std`): a fresh adapter changes outputs a little.

Differs from the authors' code: The paper and peft require lengths that divide all sides. The authors' code was not
compared; peft was.

Use it: `peftcore.apply(model, "vb_lora")`, where many adapters must be stored, and training may need more memory than
for a LoRA.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from peftcore.author import (
    MATRICES,
    AppliedMethod,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Shared,
    Site,
    Surgeon,
    Tags,
)
from peftcore_reparameterized._basis import columns
from peftcore_reparameterized._low_rank import LowRankOperator


class VBLoRAConfig(MethodConfig):
    """Options of VB-LoRA."""

    overridable = ("rank", "topk", "dropout", "logits_std", "logits_ratio")

    method: Literal["vb_lora"] = "vb_lora"
    rank: PositiveInt = 4
    """Rank of the update."""
    num_vectors: PositiveInt = 256
    """Number h of vectors in the bank."""
    vector_length: PositiveInt = 256
    """Length b of a vector. It should divide the widths of the target modules."""
    topk: PositiveInt = 2
    """Number k of vectors of the bank that a sub-vector mixes."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    bank_bound: PositiveFloat = 0.02
    """Bound of the uniform distribution that the initial bank is drawn from."""
    logits_std: PositiveFloat = 0.1
    """Standard deviation of the initial logits."""
    logits_ratio: PositiveFloat = 10.0
    """Learning rate of the logits, as a multiple of that of the bank."""

    @model_validator(mode="after")
    def _check_topk(self) -> VBLoRAConfig:
        if self.topk > self.num_vectors:
            raise ValueError(f"topk={self.topk} is more than num_vectors={self.num_vectors}")
        return self


class Bank(nn.Module):
    """The bank of vectors that all sites share."""

    def __init__(self, config: VBLoRAConfig) -> None:
        super().__init__()
        bound = config.bank_bound
        self.vectors = nn.Parameter(torch.empty(config.num_vectors, config.vector_length).uniform_(-bound, bound))


def pieces(site: Site, length: int) -> tuple[int, int]:
    """Return the number of sub-vectors in a row of A, and in a column of B."""
    return -(-columns(site) // length), -(-site.out_features // length)


class VBLoRAOperator(LowRankOperator):
    """The logits of one site, which choose among the vectors of the bank."""

    def __init__(self, site: Site, config: VBLoRAConfig, bank: Shared) -> None:
        super().__init__(site, config.dropout)
        self.bank, self.topk = bank, config.topk
        self.inputs, self.columns, self.out = (site.in_features, *site.kernel), columns(site), site.out_features
        of_row, of_column = pieces(site, config.vector_length)
        shape = (*site.batch, config.rank, of_row, config.num_vectors)
        self.logits_A = nn.Parameter(torch.randn(shape) * config.logits_std)
        shape = (*site.batch, of_column, config.rank, config.num_vectors)
        self.logits_B = nn.Parameter(torch.randn(shape) * config.logits_std)

    def mixed(self, logits: Tensor) -> Tensor:
        """Return the sub-vectors [..., b] for logits [..., h]: mixtures of the vectors with the k largest logits."""
        best, chosen = logits.topk(self.topk, -1)  # [..., k]
        vectors = self.bank.module.vectors.to(logits)[chosen]  # [..., k, b]
        return (best.softmax(-1).unsqueeze(-1) * vectors).sum(-2)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        A = self.mixed(self.logits_A).flatten(-2)[..., : self.columns]  # [*batch, rank, in * kernel]
        B = self.mixed(self.logits_B).transpose(-1, -2).flatten(-3, -2)[..., : self.out, :]  # [*batch, out, rank]
        return A.unflatten(-1, self.inputs), B, 1.0


class VBLoRA(Method):
    """Low-rank adaptation whose factors are mixed from a bank of vectors."""

    name = "vb_lora"
    Config = VBLoRAConfig
    tags = Tags(category="reparameterized", paper="2405.15179", mergeable=True, identity_at_init=False, low_rank=True)
    learning_rate = LearningRate(
        1e-3, "leo-yangli/VB-LoRA@2fa62a7, NLU/NLU/scripts_vblora_qv/roberta_base_mrpc.sh", on="RoBERTa-base, MRPC"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: VBLoRAConfig, surgeon: Surgeon) -> None:
        bank = surgeon.own("bank", lambda: Bank(config))
        for site in surgeon.sites():
            surgeon.graft(site, VBLoRAOperator, config, bank=bank)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        logits = [p for graft in injection.grafts if graft.by_method for p in graft.operator.parameters()]
        bank = injection.shared["bank"].parameters()
        rates = ((bank, lr), (logits, lr * injection.config.logits_ratio))
        groups = (([p for p in group if p.requires_grad], rate) for group, rate in rates)
        return [{"params": group, **defaults, "lr": rate} for group, rate in groups]

    @staticmethod
    def parameter_count(site: Site, config: VBLoRAConfig) -> int:
        return math.prod(site.batch) * config.rank * config.num_vectors * sum(pieces(site, config.vector_length))
