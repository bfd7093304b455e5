"""Linear probe: only the head trains, on frozen features.   Classic; see VPT, arXiv 2203.12119, for its role as a
baseline.

Equation:
    y = H' f(x) + c',   H' and c' trained, starting from the host's head

The head is the module with the role `head` (or the module in `target`); modules in `train` train too. The trained head
is a replacement, so the model's own head is kept and restored when the probe is removed.

Parameters: classes * (d + 1) for a linear head.

Start: Trained tensors start at the model's values. A fresh adapter is the identity.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "linear_probe")`, as the first baseline: other methods have to close the gap between the
probe and full fine-tuning.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import LearningRate, Method, MethodConfig, Site, Surgeon, Tags


class LinearProbeConfig(MethodConfig):
    """Options of the linear probe: only those that every method has."""

    method: Literal["linear_probe"] = "linear_probe"


class LinearProbe(Method):
    """Train the head alone."""

    name = "linear_probe"
    Config = LinearProbeConfig
    tags = Tags(category="selective", paper="2203.12119", mergeable=True)
    learning_rate = LearningRate(
        0.1,
        "KMnP/vpt@4410440, configs/linear/cub.yaml",
        on="ViT-B/16, CUB, batches of 1,024",
        optimizer="SGD",
        momentum=0.9,
    )
    target = "head"

    def inject(self, model: nn.Module, config: LinearProbeConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites(optional=bool(surgeon.wishes.train)):
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: LinearProbeConfig) -> int:
        return site.numel
