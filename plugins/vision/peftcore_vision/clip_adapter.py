"""CLIP-Adapter.   Gao et al. 2021, arXiv 2110.04544 (code: gaopengcuhk/CLIP-Adapter).

Equation:
    f' = ratio * relu(W2 relu(W1 f)) + (1 - ratio) * f,   W1 [d / reduction, d],   W2 [d, d / reduction], no biases

f are the features of an image before they are normalized and compared with text features. By default, f is the output
of CLIP's image projection, as in the authors' code. For other models name the module that returns the image features in
`target`, as in ``target="vision_model.head"`` for SigLIP. The paper also tries an adapter on the text features, with
another ratio:

    peftcore.apply(model, "clip_adapter", target=["visual_projection", "text_projection"],
                   overrides={"text_projection": {"ratio": 0.1}})

If the model has a classifier instead of texts (the paper's W, whose rows are text features), ``features="input"``
adapts the input of this classifier.

Parameters: 2 d (d // reduction).

Start: Both matrices start as torch's linear layers do, so a fresh adapter already mixes random values in; ``ratio=0``
leaves the model's outputs unchanged.

Differs from the authors' code: The authors train with 1 to 16 images a class and search the ratio by task; no other
difference is known.

Use it: `peftcore.apply(model, "clip_adapter")`, with few images a class: only the features change, so backward does not
run through the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Operator, Surgeon, Tags
from peftcore.errors import UnsupportedSite
from peftcore_vision._features import FeatureConfig, FeatureSite, feature_sites


class CLIPAdapterConfig(FeatureConfig):
    """Options of CLIP-Adapter."""

    method: Literal["clip_adapter"] = "clip_adapter"
    reduction: PositiveInt = 4
    """Divisor of the number of features; the quotient is the width of the bottleneck."""
    ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.2
    """Share of the adapter's output in the mix; the rest is the original features."""


class FeatureOperator(Operator):
    """Mixes features with the output of a bottleneck on them."""

    def __init__(self, site: FeatureSite, config: CLIPAdapterConfig) -> None:
        super().__init__(site)
        narrow = site.width // config.reduction
        if not narrow:
            raise UnsupportedSite(f"{site.path} has {site.width} features; use a reduction of {site.width} at most")
        self.ratio, self.features = config.ratio, config.features
        self.changes_inputs = config.features == "input"
        self.down = nn.Linear(site.width, narrow, bias=False)
        self.up = nn.Linear(narrow, site.width, bias=False)

    def forward(self, call: Callable[..., Any], f: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.features == "input":
            return call(self._mixed(f), *args, **kwargs)
        return self._mixed(call(f, *args, **kwargs))

    def _mixed(self, f: Tensor) -> Tensor:
        down, up = self.cast(f, self.down.weight, self.up.weight)
        inner = nn.functional.linear(f, down).relu()  # [..., d / reduction]
        adapted = nn.functional.linear(inner, up).relu().to(f.dtype)
        return self.ratio * adapted + (1 - self.ratio) * f


class CLIPAdapter(Method):
    """A bottleneck on image features, mixed with them."""

    name = "clip_adapter"
    Config = CLIPAdapterConfig
    tags = Tags(category="vision", paper="2110.04544", identity_at_init=False, identity_options={"ratio": 0.0})
    learning_rate = LearningRate(
        2e-3,
        "KaiyangZhou/CoOp@ff61507, configs/trainers/CoOp/rn50_ep50.yaml",
        on="CLIP RN50, ImageNet",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("head",)

    def inject(self, model: nn.Module, config: CLIPAdapterConfig, surgeon: Surgeon) -> None:
        for site in feature_sites(surgeon, config):
            surgeon.graft(site, FeatureOperator, config)

    @staticmethod
    def parameter_count(site: FeatureSite, config: CLIPAdapterConfig) -> int:
        return 2 * site.width * (site.width // config.reduction)
