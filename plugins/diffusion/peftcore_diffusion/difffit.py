"""DiffFit: biases, norms, classes and scale factors.   Xie et al. 2023, arXiv 2304.06648.

Equation:
    z = x + gamma_1 * Attention(x),   y = z + gamma_2 * FeedForward(z)   in each block;   gamma [d], one at first

All biases, the gains of norms, and the embedding table of classes train. Cross-attention has a gamma too. A gamma
scales the output of its branch before dropout and before the gates of a DiT; the order does not change the result.
``scales="matrices"`` adds a gamma after queries, keys and values, as in mkshing/DiffFit-pytorch. That code also has a
second gamma after an attention; it is left out here, since it has the same effect as the first. All changes can be
merged: a gamma is multiplied into the matrix and bias whose output it scales.

If the host does not read tokens, its embedding tables count as tables of classes, except tables of positions; the DiT
of diffusers has one in each block. Feed-forwards of stacked experts do not get a gamma.

Parameters: the length of each bias and gain, rows times width of the table, and 2 d a block (3 d with cross-attention,
5 d or 9 d with "matrices").

Start: The model's tensors at their pretrained values, gamma at one: the identity.

Differs from the authors' code: The authors' code selects the trained tensors by words in their names (bias, norm,
gamma, y_embed); here the selection is by the kind of tensor. So the matrices that compute a DiT's modulation, which
diffusers stores in modules called norm1, stay frozen, as in the paper's DiT. The authors' code was not compared.

Use it: `peftcore.apply(model, "difffit")`, to adapt a diffusion transformer to another domain with a thousandth of its
parameters. For a single subject or style use `lora`, which has more parameters; to keep norms and classes frozen, use
`bitfit`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, MethodConfig, Operator, Site, Surgeon, Tags, block_around, on_first

ENDS = ("attn.output", "cross.output", "mlp.output")
INSIDE = tuple(f"{family}.{part}" for family in ("attn", "cross") for part in ("q", "k", "v"))


class DiffFitConfig(MethodConfig):
    """Options of DiffFit."""

    method: Literal["difffit"] = "difffit"
    scales: Literal["branches", "matrices"] = "branches"
    """The outputs that a gamma scales: those of attention and feed-forward ("branches"), or also queries, keys and
    values ("matrices")."""
    blocks: PositiveInt | None = None
    """How many blocks have a gamma, counted from the first block of each stack. If None, all blocks have one. The paper
    also tries the first half."""
    classes: bool = True
    """Train the embedding table of classes."""


class ScaleOperator(Operator):
    """A scale factor for each channel."""

    stackable = True

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        self.gamma = nn.Parameter(torch.ones(site.out_features))

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(call(*args, **kwargs), self.times_gamma)

    def times_gamma(self, y: Tensor) -> Tensor:
        """Return y with each channel multiplied by its factor."""
        (gamma,) = self.cast(y, self.gamma)
        return y * self.layer.along_channels(gamma, y)

    def merged(self, weight: Tensor) -> Tensor:
        return weight * self.gamma.view(-1, *[1] * (weight.dim() - 1))

    def merged_bias(self, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor | None:
        return None if bias is None else bias * self.gamma


class DiffFit(Method):
    """Train biases, norms and class embeddings, and scale the outputs of attention and feed-forward."""

    name = "difffit"
    Config = DiffFitConfig
    tags = Tags(category="diffusion", paper="2304.06648", mergeable=True)
    learning_rate = LearningRate(
        1e-3, "mkshing/DiffFit-pytorch@78dc2d1, README.md", on="Stable Diffusion 1.4, one subject"
    )
    target = "*"

    def inject(self, model: nn.Module, config: DiffFitConfig, surgeon: Surgeon) -> None:
        sites = surgeon.sites()
        takes_tokens = bool(surgeon.at("stack"))
        for site in sites:
            whole = _is_norm(site) or (config.classes and not takes_tokens and _is_table(site))
            for tensor in site.tensors():
                if (whole or tensor.endswith("bias")) and not site.missing(tensor):
                    surgeon.replace(site.at(tensor))
        inside = {site.module_path for site in sites}
        roles = ENDS + INSIDE if config.scales == "matrices" else ENDS
        found = {site.path: site for role in roles for site in surgeon.at(role) if not site.batch}
        for site in found.values():
            early = config.blocks is None or block_around(surgeon, site, each_run=True).depth < config.blocks
            if early and site.module_path in inside:
                surgeon.graft(site, ScaleOperator)

    @staticmethod
    def parameter_count(site: Site, config: DiffFitConfig) -> int:
        scaled = site.role in ENDS + INSIDE and not site.tensor.endswith("bias")
        return site.out_features if scaled else site.numel


def _is_norm(site: Site) -> bool:
    return site.role is not None and site.role.partition(".")[0] == "norm"


def _is_table(site: Site) -> bool:
    return site.layer.one_hot and site.role != "pos"
