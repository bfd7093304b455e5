"""AIM, image models adapted for videos.   Yang et al. 2023, arXiv 2302.03024 (code: taoyang1122/adapt-image-models).

Equation:
    x1 = x0 + A_t(MHA_t(LN1(x0)))                  temporal: the model's own attention, across the frames of a clip
    x2 = x1 + S,   S = a + A_s(a),  a = MHA(LN1(x1))    spatial: within a frame, as the model has it
    x3 = x2 + MLP(LN2(x2)) + s A_j(LN2(x2))        joint
    A(u) = W_up gelu(W_down u + b_down) + b_up,   W_down [h, d],  W_up [d, h],  h = d / 4

The model is one of images, which is given the frames of clips as rows of the batch, those of a clip one behind the
other: [clips * T, 3, rows, columns]. MHA_t is its frozen attention on the T tokens of each place. In front of all
blocks, a trained e [T, d] is added to the tokens of each frame. With `temporal_adapters` 2, MHA_t reads u + A_i(u) in
place of u.

In training the code drops what the first and the third line add, at single places of all frames of a batch alike, with
a probability that rises from 0 in the first block to `drop_path`. It trains the norm behind the last block along, and
the user's head over the frames' outputs. The host's changes of the branches' outputs act on MHA, A_s and MLP alone.

Parameters: 3 (2 d h + h + d) a block, T d, and 2 d of the norm: 10.7M in a ViT-B. It cannot be merged.

Start: e, W_up and all biases at zero, W_down from N(0, 0.02^2): the identity.

Differs from the authors' code: no difference is known.

Use it: `peftcore.apply(model, "aim", frames=1)`, for videos on a frozen ViT or CLIP where all frames see each other;
not in models with windows or relative positions (`st_adapter`, its kin with a convolution over frames), nor where
attention must not run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import (
    BranchSite,
    Bypass,
    LearningRate,
    Method,
    MethodConfig,
    Share,
    Site,
    Surgeon,
    Tags,
    block_depths,
    branch,
)
from peftcore_vision._frames import dropped
from peftcore_vision._prompts import prompt_sites
from peftcore_vision.aim.across import (
    AcrossOperator,
    PlaceSite,
    TimesOperator,
    attention_of,
    entrance,
    feed_forward_of,
    norms_behind,
)


class AIMConfig(MethodConfig):
    """Options of AIM."""

    method: Literal["aim"] = "aim"
    frames: PositiveInt = 8
    """Frames T of a clip, which are that many rows of the batch."""
    ratio: Annotated[float, Field(gt=0.0, le=4.0)] = 0.25
    """Width h of the bottlenecks as a share of d."""
    scale: PositiveFloat = 0.5
    """The factor s of the adapter in parallel with the feed-forward; the code has 1 for Something-Something v2."""
    temporal_adapters: Annotated[int, Field(ge=1, le=2)] = 1
    """With 2, an adapter is in front of the temporal attention too, as in the code for Something-Something v2."""
    drop_path: Share = 0.2
    """Probability with which what is added is dropped in training in the last block."""
    train_norm: bool = True
    """Train the norm behind the last block along."""


class Adapter(nn.Module):
    """One bottleneck, which starts as zero."""

    def __init__(self, width: int, config: AIMConfig) -> None:
        super().__init__()
        h = inner(width, config)
        self.down, self.up = nn.Linear(width, h), nn.Linear(h, width)
        nn.init.trunc_normal_(self.down.weight, std=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, u: Tensor) -> Tensor:
        """Map ``[..., d]`` to the bottleneck's output."""
        down, down_bias, up, up_bias = (each.to(u.dtype) for each in self.parameters())
        return F.linear(F.gelu(F.linear(u, down, down_bias)), up, up_bias)


def inner(width: int, config: AIMConfig) -> int:
    """Return h."""
    return max(int(width * config.ratio), 1)


def count(width: int, config: AIMConfig) -> int:
    """Return how many parameters one has."""
    return (2 * width + 1) * inner(width, config) + width


class TurnsOperator(AcrossOperator):
    """The temporal and the spatial adapter of one attention."""

    def __init__(self, site: PlaceSite, config: AIMConfig, ends: bool, p: float) -> None:
        super().__init__(site, config.frames, ends)
        self.p = p
        self.before = Adapter(site.width, config) if config.temporal_adapters == 2 else None
        self.temporal, self.spatial = Adapter(site.width, config), Adapter(site.width, config)

    def across(self, attend: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        return self.temporal(attend(y if self.before is None else y + self.before(y)))

    def within(self, y: Tensor) -> Tensor:
        return y + self.spatial(y)

    def drop(self, added: Tensor) -> Tensor:
        return dropped(added, self.p, self.training)


class JointOperator(Bypass):
    """The adapter in parallel with one feed-forward."""

    def __init__(self, site: BranchSite, config: AIMConfig, p: float) -> None:
        super().__init__(site)
        self.scale, self.p = config.scale, p
        self.joint = Adapter(site.width, config)

    def beside(self, x: Tensor) -> Tensor:
        return dropped(self.scale * self.joint(x), self.p, self.training)


class AIM(Method):
    """Adapters behind attention, within frames and across them, and in parallel with the feed-forward.

    Example:
        injection = peftcore.apply(model, "aim", frames=1)  # rows are frames, clip by clip; 8, 16 or 32 in the paper
    """

    name = "aim"
    Config = AIMConfig
    tags = Tags(category="vision", paper="2302.03024", per_row=False, random=True)
    learning_rate = LearningRate(
        3e-4,
        "taoyang1122/adapt-image-models@b3580d2, configs/recognition/vit/vitclip_base_k400.py",
        on="CLIP ViT-B/16, Kinetics-400",
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: AIMConfig, surgeon: Surgeon) -> None:
        host, depths, towers = surgeon.resolver.host, block_depths(surgeon), set()
        for block in prompt_sites(surgeon):
            tower = host.at(block.module_path)[0].tower
            if tower not in towers:
                towers.add(tower)
                place, patches = entrance(surgeon, block)
                surgeon.graft(place, lambda at, own: TimesOperator(at, own.frames), config, patches)
                for norm in norms_behind(surgeon, block) if config.train_norm else []:
                    surgeon.train(norm)
            p = config.drop_path * depths[block.module_path] / max(len(host.select("block", tower)) - 1, 1)
            site, others = attention_of(surgeon, block)
            ends = any(other.form == "end" for other in others)
            surgeon.graft(site, TurnsOperator, config, others, ends=ends, p=p)
            end = branch(surgeon, feed_forward_of(surgeon, block))
            surgeon.graft(end, JointOperator, config, end.places, p=p)

    @staticmethod
    def parameter_count(site: Site, config: AIMConfig) -> int:
        if isinstance(site, BranchSite):
            return count(site.width, config)
        if not isinstance(site, PlaceSite):
            return site.numel  # of the norm
        if site.embeds:
            return config.frames * site.width
        return (1 + config.temporal_adapters) * count(site.width, config)
