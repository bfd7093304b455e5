"""Linear probe: only the head trains, on frozen features.   Classic; see VPT, arXiv 2203.12119, for its role as a
baseline.

    y = H' f(x) + c',   H' and c' trained, starting from the host's head

The head is the module with the role `head` (or what `target` says), and whatever `train` names besides. It is trained
as a replacement, so the model's own head stays and comes back when the probe is removed.

Parameters: classes * (d + 1) for a linear head.

Use it first of all: the gap between the probe and full fine-tuning is what every other method has to close.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from peftcore.author import LearningRate, Method, MethodConfig, Site, Surgeon, Tags


class Config(MethodConfig):
    """The linear probe has no options of its own."""

    method: Literal["linear_probe"] = "linear_probe"


class LinearProbe(Method):
    """Train the head alone."""

    name = "linear_probe"
    Config = Config
    tags = Tags(category="selective", paper="2203.12119", mergeable=True)
    learning_rate = LearningRate(
        0.1,
        "KMnP/vpt@4410440, configs/linear/cub.yaml",
        on="ViT-B/16, CUB, batches of 1,024",
        optimizer="SGD",
        momentum=0.9,
    )
    target = "head"

    def inject(self, model: nn.Module, config: Config, surgeon: Surgeon) -> None:
        for site in surgeon.sites(optional=bool(surgeon.wishes.train)):
            surgeon.train(site.module_path)

    @staticmethod
    def parameter_count(site: Site, config: Config) -> int:
        return site.numel
