"""ProPETL: one adapter for all layers, with a separate mask for each layer.   Zeng et al. 2023, arXiv 2305.17682
(ChaosCodes/ProPETL).

Equation:
    y_l = h + (m'_l * U) relu((m_l * D) n + b) + c,     m_l = 1 where |s_l| is among the largest, else 0

D [r, d], U [d, r] and the biases (never masked) form the prototype, which all layers of one width share. Each layer has
scores s_l [r, d] and s'_l [d, r], and each mask keeps the share `kept` of a matrix's entries. n is the adapter's input
and h the tensor to which its output is added, as in `pfeiffer_adapter` with the same `placement`. In the backward pass
a mask acts as |s_l| (a straight-through estimate): the gradient of a mask entry passes to its score as if no entry were
masked. The learning rate of the scores is `mask_ratio` times that of the prototype. Scores have the weight decay of the
maps; biases are not decayed.

With learned masks a file stores the scores, which are larger than one adapter for each layer. For small files use
`masks="fixed"`, which stores one bit instead of each score, and copies the masks and the prototype from a trained
adapter:

    small = peftcore.apply(model, "propetl", name="small", masks="fixed", ...)
    take_masks(small, trained)

The prototype continues to train with these masks, or can be frozen.

Parameters: 2 d r + r + d of the prototype, and 2 d r scores per layer, or as many bits with fixed masks.

Start: Both maps from N(0, 0.02), biases at zero, the scores of D uniform in +-1/sqrt(r), the scores of U in
+-1/sqrt(d). The start is near the identity; ``up_init_std=0`` makes it an exact identity.

Differs from the authors' code: The authors also mask LoRA and prefixes, and combine a layer's mask with a mask for each
task; neither is available here.

Use it: `peftcore.apply(model, "propetl")`, where many adapters are stored and files must be small; not where training
memory must be small: `compacter` also shares parameters between layers, and `pfeiffer_adapter` has no scores.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn

from peftcore.author import AppliedMethod, LearningRate, Method, MethodConfig, Shared, Site, Surgeon, Tags
from peftcore.errors import ConfigError
from peftcore_additive.pfeiffer_adapter import AtLayerEnd, Placement, placed

MAPS = ("down", "up")


class ProPETLConfig(MethodConfig):
    """Options of ProPETL."""

    method: Literal["propetl"] = "propetl"
    bottleneck: PositiveInt = 64
    """Width r of the prototype; the authors use a twelfth of the hidden size."""
    kept: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Share of the prototype's numbers that a mask keeps; the authors' code calls it sparsity."""
    masks: Literal["learned", "fixed"] = "learned"
    """"learned": masks are computed from trained scores. "fixed": masks are stored as bits and do not train."""
    mask_ratio: PositiveFloat = 30.0
    """Learning rate of the scores, divided by that of the prototype."""
    placement: Literal["auto", "post", "pre", "branch"] = "auto"
    """The adapter's input. "post": the residual stream after the norm that ends a block. "pre": the residual stream as
    the block returns it. "branch": the output of the target. "auto": "post" or "pre", depending on the model."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of D at the start."""
    up_init_std: NonNegativeFloat = 0.02
    """Standard deviation of U at the start; 0 makes a fresh adapter an exact identity."""


def largest(scores: Tensor, kept: float) -> Tensor:
    """Return a mask that is 1 for the share `kept` of entries with the largest magnitudes, else 0. In backward, the
    mask's gradient passes to the magnitudes."""
    sizes = scores.abs()
    count = scores.numel() - int((1 - kept) * scores.numel())
    places = sizes.flatten().topk(count).indices
    mask = torch.zeros_like(sizes).flatten().scatter(0, places, 1.0).view_as(sizes)
    return mask + (sizes - sizes.detach())


def to_bits(mask: Tensor) -> Tensor:
    """Return a mask packed into bytes of eight entries each; the first entry is the lowest bit."""
    flat = F.pad(mask.flatten() > 0.5, (0, -mask.numel() % 8)).view(-1, 8)
    return (flat.to(torch.uint8) << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(-1, dtype=torch.uint8)


def from_bits(stored: Tensor, shape: torch.Size) -> Tensor:
    """Return the bool mask that `to_bits` packed."""
    shifts = torch.arange(8, dtype=torch.uint8, device=stored.device)
    return ((stored.unsqueeze(-1) >> shifts) & 1).flatten()[: shape.numel()].view(shape).bool()


class Prototype(nn.Module):
    """The two maps that layers share."""

    def __init__(self, width: int, config: ProPETLConfig) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, config.bottleneck), nn.Linear(config.bottleneck, width)
        for linear, std in ((self.down, config.init_std), (self.up, config.up_init_std)):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)


class ProPETLOperator(AtLayerEnd):
    """The masks of one layer for the shared prototype."""

    def __init__(self, site: Site, config: ProPETLConfig, placement: Placement, prototype: Shared) -> None:
        super().__init__(site)
        self.placement, self.prototype, self.kept = placement, prototype, config.kept
        self.only_inputs = placement == "post"
        d, r = site.out_features, config.bottleneck
        for name, shape, bound in (("down", (r, d), 1 / math.sqrt(r)), ("up", (d, r), 1 / math.sqrt(d))):
            scores = torch.empty(shape).uniform_(-bound, bound)
            if config.masks == "learned":
                self.register_parameter(f"{name}_scores", nn.Parameter(scores))
            else:
                self.register_buffer(f"{name}_bits", to_bits(largest(scores, config.kept)))

    def mask(self, name: str) -> Tensor:
        """Return the mask of one of the `MAPS`, in the shape and dtype of its matrix."""
        scores = self._parameters.get(f"{name}_scores")
        if scores is not None:
            return largest(scores, self.kept)
        weight: Tensor = self.prototype.module.get_submodule(name).weight
        return from_bits(self.get_tensor(f"{name}_bits"), weight.shape).to(weight.dtype)

    def added(self, h: Tensor) -> Tensor:
        low = F.relu(self._mapped("down", self.layer.channels_last(h)))
        return self.layer.channels_back(self._mapped("up", low))

    def _mapped(self, name: str, x: Tensor) -> Tensor:
        linear: Any = self.prototype.module.get_submodule(name)
        return F.linear(x, *self.cast(x, linear.weight * self.mask(name).to(linear.weight.dtype), linear.bias))


class ProPETL(Method):
    """One adapter that all layers share, with a mask for each layer."""

    name = "propetl"
    Config = ProPETLConfig
    tags = Tags(
        category="hybrid",
        paper="2305.17682",
        identity_at_init=False,
        identity_options={"up_init_std": 0.0},
        exact_gradient=False,
    )
    learning_rate = LearningRate(
        1e-4, "ChaosCodes/ProPETL@1c08f19, propetl-roberta/scripts/run_adapter.sh", on="RoBERTa-base, GLUE"
    )
    target = ("mlp.output",)

    def inject(self, model: nn.Module, config: ProPETLConfig, surgeon: Surgeon) -> None:
        for site, placement, holders in placed(surgeon, surgeon.sites(), lambda site: config.at(site.path).placement):
            own, width = config.at(site.path), site.out_features
            prototype = surgeon.own(f"prototype_{width}x{own.bottleneck}", partial(Prototype, width, own))
            surgeon.graft(site, ProPETLOperator, config, holders, placement=placement, prototype=prototype)

    def parameter_groups(self, injection: AppliedMethod, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
        operators = [each for each in injection.operators.values() if isinstance(each, ProPETLOperator)]
        scores = [each for operator in operators for each in operator.parameters(recurse=False)]
        scored = {id(each) for each in scores}
        others = [each for each in injection.parameters() if each.requires_grad and id(each) not in scored]
        return [
            {"params": [each for each in others if each.dim() > 1], **defaults, "lr": lr},
            {"params": [each for each in others if each.dim() < 2], **defaults, "lr": lr, "weight_decay": 0.0},
            {"params": [p for p in scores if p.requires_grad], **defaults, "lr": lr * injection.config.mask_ratio},
        ]

    @staticmethod
    def parameter_count(site: Site, config: ProPETLConfig) -> int:
        return 2 * site.out_features * config.bottleneck if config.masks == "learned" else 0


@torch.no_grad()
def take_masks(fixed: AppliedMethod, trained: AppliedMethod) -> None:
    """Copy the masks and prototypes of a trained adapter to an adapter with fixed masks.

    Raises:
        ConfigError: `fixed` does not have fixed masks, `trained` does not have learned masks, or their layers or sizes
            differ.
    """
    mine, theirs = _layers(fixed), _layers(trained)
    kinds = [each.config.model_dump().get("masks") for each in (fixed, trained)]
    sizes = [{path: op.prototype.module.down.weight.shape for path, op in each.items()} for each in (mine, theirs)]
    if kinds != ["fixed", "learned"] or sizes[0] != sizes[1]:
        raise ConfigError(
            "take_masks(fixed, trained) needs two propetl adapters at the same layers with the same bottleneck, and "
            'masks="fixed" in the first one'
        )
    for name, prototype in fixed.shared.items():
        prototype.load_state_dict(trained.shared[name].state_dict())
    for path, operator in mine.items():
        for name in MAPS:
            operator.get_tensor(f"{name}_bits").copy_(to_bits(theirs[path].mask(name)))


def _layers(injection: AppliedMethod) -> dict[str, ProPETLOperator]:
    return {path: each for path, each in injection.operators.items() if isinstance(each, ProPETLOperator)}
