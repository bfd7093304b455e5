"""AIM, image models adapted for videos.   Yang et al. 2023, arXiv 2302.03024 (code: taoyang1122/adapt-image-models).

Equation:
    x1 = x0 + A_t(MHA_t(LN1(x0)))                  temporal: the model's own attention, across the frames of a clip
    x2 = x1 + S,   S = a + A_s(a),  a = MHA(LN1(x1))    spatial: within a frame, as the model has it
    x3 = x2 + MLP(LN2(x2)) + s A_j(LN2(x2))        joint
    A(u) = W_up gelu(W_down u + b_down) + b_up,   W_down [h, d],  W_up [d, h],  h = d / 4

The model is an image model. The frames of clips are rows of its batch, and the frames of one clip are consecutive:
[clips * T, 3, rows, columns]. MHA_t is the model's frozen attention over the T tokens at each position of the picture.
In front of all blocks, a trained e [T, d] is added to the tokens of each frame. With `temporal_adapters` 2, MHA_t reads
u + A_i(u) instead of u.

In training, the terms that the first and the third line of the equation add are dropped at random token positions, the
same positions in all frames of a batch. The drop probability rises from 0 in the first block to `drop_path` in the
last. The norm after the last block trains too. The user adds and trains a head over the frames' outputs. The host's
dropout, layer scale and stochastic depth act only on MHA, A_s and MLP.

Parameters: 3 (2 d h + h + d) per block, T d, and 2 d of the norm: 10.7M in a ViT-B. It cannot be merged.

Start: e, W_up and all biases at zero, W_down from N(0, 0.02^2). A fresh adapter is the identity.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "aim", frames=1)`, for videos on a frozen ViT or CLIP, where all frames attend to each
other; not in models with windows or relative positions (use the similar `st_adapter`, with a convolution over frames),
nor where a second run of attention is too slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.author import (
    BranchSite,
    Bypass,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Share,
    Site,
    Surgeon,
    Tags,
    Tap,
    block_depths,
    branch,
    branch_end,
    is_post_norm,
    on_first,
)
from peftcore.errors import UnsupportedSite
from peftcore_vision._frames import clips, dropped
from peftcore_vision._patches import patch_sites
from peftcore_vision._prompts import PromptSite, prompt_sites


class AIMConfig(MethodConfig):
    """Options of AIM."""

    method: Literal["aim"] = "aim"
    frames: PositiveInt = 8
    """Number T of frames of a clip; each clip is T consecutive rows of the batch."""
    ratio: Annotated[float, Field(gt=0.0, le=4.0)] = 0.25
    """Width h of the bottlenecks as a share of d."""
    scale: PositiveFloat = 0.5
    """The factor s of the adapter in parallel with the feed-forward; the authors' code uses 1 for Something-Something
    v2."""
    temporal_adapters: Annotated[int, Field(ge=1, le=2)] = 1
    """Number of adapters of the temporal attention: 2 adds one in front of it, as in the code for Something-Something
    v2."""
    drop_path: Share = 0.2
    """Drop probability of the added terms in the last block, in training. It rises linearly from 0 in the first
    block."""
    train_norm: bool = True
    """Train the norm after the last block, too."""


NORM, END, PATCH = "norm", "end", "patch"
"""The forms of three kinds of sites: the norms of a block, the module whose output adds attention to the residual
stream, and the convolution that embeds patches."""


@dataclass(frozen=True, eq=False)
class PlaceSite(Site):
    """A module that tokens pass through."""

    width: int = 0
    """Number of features of the tokens."""
    embeds: bool = False
    """True if the module runs after the embeddings and before all blocks."""

    @property
    def weight_shape(self) -> torch.Size:
        """The shape [width], which plans and saved files record for this target."""
        return torch.Size([self.width])


class Adapter(nn.Module):
    """One bottleneck, whose output is zero at the start."""

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
    """Return the width h of the bottlenecks at a site."""
    return max(int(width * config.ratio), 1)


def count(width: int, config: AIMConfig) -> int:
    """Return the number of parameters of one bottleneck."""
    return (2 * width + 1) * inner(width, config) + width


class TurnsOperator(Operator):
    """The temporal and the spatial adapter of one attention, whose input is the output of a norm. The operator first
    runs the attention across the frames, and adds the result to the residual stream in front of this norm. Then it runs
    the attention within frames.

    Args:
        site: the attention.
        config: the options.
        ends: True if a module outside of the attention processes its output before it is added to the residual stream.
        p: the drop probability of the added term in training.
    """

    observes = frozenset({NORM})

    def __init__(self, site: PlaceSite, config: AIMConfig, ends: bool, p: float) -> None:
        super().__init__(site)
        self.frames, self.path, self.p = config.frames, site.path, p
        self.norm, self.behind, self.joins = Tap(), Tap(), Tap() if ends else None
        self.before = Adapter(site.width, config) if config.temporal_adapters == 2 else None
        self.temporal, self.spatial = Adapter(site.width, config), Adapter(site.width, config)

    def within(self, y: Tensor) -> Tensor:
        """Return the attention's output ``[rows, tokens, d]`` with the spatial adapter."""
        return y + self.spatial(y)

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return {NORM: self._at_norm, END: self._at_end}.get(form, self)

    def _at_norm(self, call: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = call(x, *args, **kwargs)
        if self.behind.take() is None:  # what stands behind the attention is none of its norms
            self.norm.take()
            self.norm.put((call, x, y))
        return y

    def forward(self, call: Callable[..., Any], y: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the attention with both adapters.

        Raises:
            UnsupportedSite: the attention's input is not its norm's output, or it gets masks or positions.
        """
        normed = self.norm.take()
        if normed is None or normed[2] is not y or y.dim() != 3:
            raise UnsupportedSite(
                f"{self.path}: the attention's input differs from its norm's output for whole frames; exclude this "
                "block"
            )
        if any(isinstance(each, Tensor | tuple | list) for each in (*args, *kwargs.values())):
            raise UnsupportedSite(
                f"{self.path}: the attention gets masks or positions, which do not exist for attention over time; call "
                "the model without them, or exclude this block"
            )
        count = clips(y, self.frames, None)

        def attend(sequences: Tensor) -> Tensor:
            output = call(sequences, *args, **kwargs)
            attended: Tensor = output[0] if isinstance(output, tuple) else output
            return attended

        by_place = y.unflatten(0, (count, self.frames)).transpose(1, 2)  # [clips, tokens, frames, d]
        places = by_place.flatten(0, 1)
        added = self.temporal(attend(places if self.before is None else places + self.before(places)))
        added = dropped(added.view_as(by_place).transpose(1, 2).flatten(0, 1), self.p, self.training)
        norm, x, _ = normed
        output = call(norm(x + added), *args, **kwargs)
        self.behind.put((True,))
        if self.joins is None:
            return on_first(output, lambda h: self.within(h) + added)
        self.joins.take()
        self.joins.put((added,))
        return on_first(output, self.within)

    def _at_end(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        assert self.joins is not None, "it stands there for that"
        output, joining = call(*args, **kwargs), self.joins.take()
        return output if joining is None else on_first(output, lambda h: h + joining[0])


def attention_of(surgeon: Surgeon, block: PromptSite) -> tuple[PlaceSite, tuple[Site, ...]]:
    """Return the attention of a block as a site, and the further sites of its operator.

    Raises:
        UnsupportedSite: the block lacks an attention or has several, or its norms follow its branches.
    """
    resolver, path = surgeon.resolver, block.module_path
    inside = [entry for entry in resolver.host.entries if entry.block == path]
    found = [entry.path for entry in inside if entry.role == "attn"]
    if len(found) != 1 or any(entry.role.startswith("cross") for entry in inside) or is_post_norm(resolver, path):
        raise UnsupportedSite(f"{path} is not a norm in front of one attention; exclude this block")
    whole = resolver.module_site(found[0])
    site = PlaceSite(**{**vars(whole), "form": "activation"}, width=block.width)
    norms = [e.path for e in inside if e.role == "norm" and e.kind == "norm" and not e.path.startswith(f"{found[0]}.")]
    ends = [e for e in branch_end(surgeon, whole).places if not e.module_path.startswith(f"{found[0]}.")]
    return site, (*(replace(resolver.site(each, "weight"), form=NORM) for each in norms), *ends)


def feed_forward_of(surgeon: Surgeon, block: PromptSite) -> Site:
    """Return the last matrix of a block's feed-forward.

    Raises:
        UnsupportedSite: the block lacks a feed-forward or has several.
    """
    inside = [entry for entry in surgeon.resolver.host.entries if entry.block == block.module_path]
    last = [entry for entry in inside if entry.role == "mlp.down"]
    if len(last) != 1:
        raise UnsupportedSite(f"{block.path} does not have exactly one feed-forward; exclude this block")
    return surgeon.resolver.site(last[0].module, "weight", "mlp.down")


class TimesOperator(Operator):
    """Adds trained embeddings of the frames' positions to the tokens in front of all blocks. At the convolution that
    embeds the patches (form "patch") it counts the pictures."""

    changes_inputs = True

    def __init__(self, site: PlaceSite, config: AIMConfig) -> None:
        super().__init__(site)
        self.frames, self.pictures = config.frames, Tap(until_backward=True)
        self.times = nn.Parameter(torch.zeros(config.frames, site.width))

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._at_patches if form == PATCH else self

    def _at_patches(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        patches = call(*args, **kwargs)
        self.pictures.put((len(patches),))
        return patches

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        (pictures,) = self.pictures.get() or (None,)
        count = clips(x, self.frames, pictures)
        (times,) = self.cast(x, self.times)
        timed = x.unflatten(0, (count, self.frames)) + times[:, None]  # [clips, frames, tokens, d]
        return call(timed.flatten(0, 1), *args, **kwargs)


def entrance(surgeon: Surgeon, block: PromptSite) -> tuple[PlaceSite, tuple[Site, ...]]:
    """Return the first module that reads the embedded tokens of a block's tower (the norm after the embeddings, or the
    first block), and the convolution that embeds patches of pictures.

    Raises:
        UnsupportedSite: the tower lacks a convolution that embeds single pictures; video models embed several frames at
            once.
    """
    host, patches = surgeon.resolver.host, patch_sites(surgeon, block)
    if not patches:
        raise UnsupportedSite(
            f"{block.path}: no convolution in this tower embeds patches of single pictures; target a tower of images"
        )
    tower = host.at(block.module_path)[0].tower
    norms = [e.path for e in host.entries if e.role == "norm.embed" and e.tower == tower and e.kind == "norm"]
    first = host.select("block", tower)[0][0].path
    site = surgeon.resolver.module_site(norms[-1] if norms else first)
    return PlaceSite(**{**vars(site), "form": "activation"}, width=block.width, embeds=True), tuple(patches)


def norms_behind(surgeon: Surgeon, block: PromptSite) -> list[str]:
    """Return the paths of the norms after the last block of a block's tower."""
    host = surgeon.resolver.host
    tower = host.at(block.module_path)[0].tower
    return [entry.path for entry in host.entries if entry.role == "norm.final" and entry.tower == tower]


class JointOperator(Bypass):
    """The adapter in parallel with one feed-forward."""

    def __init__(self, site: BranchSite, config: AIMConfig, p: float) -> None:
        super().__init__(site)
        self.scale, self.p = config.scale, p
        self.joint = Adapter(site.width, config)

    def beside(self, x: Tensor) -> Tensor:
        return dropped(self.scale * self.joint(x), self.p, self.training)


class AIM(Method):
    """Adapters after attention within frames and across frames, and in parallel with the feed-forward.

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
                surgeon.graft(place, TimesOperator, config, patches)
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
