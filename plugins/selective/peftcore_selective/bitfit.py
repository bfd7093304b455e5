"""BitFit: only biases train.   Ben Zaken et al. 2021, arXiv 2106.10199.

Equation:
    y = W x + b',   b' trained, starting from b

All biases of the model train, including those of norms. As in the authors' code, the whole classification head trains
too; the paper does not mention it. If `target` is set, only biases of the target train. Models without biases (Llama,
T5) have nothing to train. `add_missing_bias` adds new biases to the linear layers of the blocks.

Parameters: the length of each bias, and the weight of the head.

Start: Trained tensors start at the model's values. A fresh adapter is the identity. New biases of `add_missing_bias`
start at zero.

Differs from the authors' code: No difference is known (benzakenelad/BitFit).

Use it: `peftcore.apply(model, "bitfit")`, as the smallest baseline that changes every layer. Merging writes the biases
into the model.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import LearningRate, Method, MethodConfig, Site, Surgeon, Tags
from peftcore.errors import TargetError
from peftcore_selective._heads import train_classifiers


class BitFitConfig(MethodConfig):
    """Options of BitFit."""

    method: Literal["bitfit"] = "bitfit"
    add_missing_bias: bool = False
    """Add a bias, starting at zero, to linear layers without one: to the targets, or without targets to all layers with
    the role `all-linear`."""
    head: bool = True
    """Train the whole head, unless it predicts tokens."""


class BitFit(Method):
    """Train the biases."""

    name = "bitfit"
    Config = BitFitConfig
    tags = Tags(category="selective", paper="2106.10199", mergeable=True)
    learning_rate = LearningRate(1e-3, "benzakenelad/BitFit@7ead19a, README.md", on="BERT-base, RTE")
    target = "*"
    config_version = 2
    former_defaults = ({"head": False},)

    def inject(self, model: nn.Module, config: BitFitConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            for tensor in site.tensors():
                if tensor.endswith("bias") and not site.missing(tensor):
                    surgeon.replace(site.at(tensor))
        for site in self._without_bias(surgeon) if config.add_missing_bias else ():
            for tensor in site.tensors():
                if tensor.rpartition(".")[2] == "bias" and site.missing(tensor):
                    surgeon.replace(site.at(tensor))
        if not surgeon.grafts:
            where = "" if surgeon.wishes.target is None else f" at target={surgeon.wishes.target!r}"
            hint = "" if config.add_missing_bias else "; add_missing_bias=True gives linear layers new ones"
            raise TargetError(f"bitfit: this {type(model).__name__} has no biases{where}, so nothing would train{hint}")
        if surgeon.wishes.target is None and config.head:
            train_classifiers(surgeon)

    def _without_bias(self, surgeon: Surgeon) -> list[Site]:
        return surgeon.at("all-linear") if surgeon.wishes.target is None else surgeon.sites()

    @staticmethod
    def parameter_count(site: Site, config: BitFitConfig) -> int:
        return site.numel
