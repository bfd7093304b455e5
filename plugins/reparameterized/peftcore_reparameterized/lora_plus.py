"""LoRA+: low-rank adaptation whose B learns faster than A.   Hayou et al. 2024, arXiv 2402.12354.

Equation:
    y = W x + b + s B A dropout(x)   as in LoRA,     lr(A) = lr,     lr(B) = ratio * lr

B starts at zero and A does not. With one learning rate for both, either B learns too slowly in a wide layer, or A
learns too fast. The rates are set in parameter groups, so the method works only with an optimizer of
``injection.optimizer(...)``.

As in the authors' code, both factors of an embedding have a separate learning rate, `embedding_lr`, which does not
depend on lr. Modules that the user names in `train` have the rate lr.

Parameters: rank * (in * kernel + out) a site, times the number of experts.

Start: As in LoRA: A uniform in +-1/sqrt(in), B at zero: the identity.

Differs from the authors' code: The authors' code and peft treat every vector as a B, so that the bias of a head learns
`ratio` times as fast as its matrix. Here, modules that the user names in `train` have the rate lr. The authors' code
and peft set the weight decay of all groups to zero by default. Here it is the weight decay of the optimizer.

Use it: `peftcore.apply(model, "lora_plus")`, instead of LoRA when training is slow at first. Use about half of the
learning rate of LoRA.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn

from peftcore.author import MATRICES, AppliedMethod, LearningRate, Method, MethodConfig, Share, Site, Surgeon, Tags
from peftcore_reparameterized._low_rank import low_rank_count
from peftcore_reparameterized.lora import LoRAOperator


class LoRAPlusConfig(MethodConfig):
    """Options of LoRA+: those of LoRA, and the learning rates."""

    method: Literal["lora_plus"] = "lora_plus"
    rank: PositiveInt = 8
    """Rank of the update."""
    alpha: PositiveFloat = 8.0
    """Numerator of the scale ``alpha / rank``."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """Denominator of the scale: the rank, or its square root (rsLoRA)."""
    dropout: Share = 0.0
    """Probability with which inputs of the update are dropped in training."""
    ratio: Annotated[float, Field(ge=1.0)] = 16.0
    """Learning rate of B, as a multiple of that of A."""
    embedding_lr: PositiveFloat = 1e-6
    """Learning rate of both factors of embeddings."""


class LoRAPlus(Method):
    """Low-rank adaptation with two learning rates."""

    name = "lora_plus"
    Config = LoRAPlusConfig
    tags = Tags(category="reparameterized", paper="2402.12354", mergeable=True, low_rank=True)
    learning_rate = LearningRate(
        2e-4, "nikhil-ghosh-berkeley/loraplus@a0c44bf, glue/scripts/run_gpt2_lora.sh", on="GPT-2, MNLI; of A"
    )
    target = ("attn.q", "attn.v", "cross.q", "cross.v")
    alternatives = MATRICES

    def inject(self, model: nn.Module, config: LoRAPlusConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LoRAOperator, config)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        by_rate: defaultdict[float, list[nn.Parameter]] = defaultdict(list)
        for graft in injection.grafts:
            if graft.by_method:
                config, embedding = injection.config.at(graft.site.path), graft.site.layer.one_hot
                for factor, rate in (("A", lr), ("B", config.ratio * lr)):
                    by_rate[config.embedding_lr if embedding else rate].append(graft.operator.get_parameter(factor))
        groups = ((rate, [p for p in factors if p.requires_grad]) for rate, factors in by_rate.items())
        return [{"params": factors, **defaults, "lr": rate} for rate, factors in groups]

    @staticmethod
    def parameter_count(site: Site, config: LoRAPlusConfig) -> int:
        return low_rank_count(site, config.rank)
