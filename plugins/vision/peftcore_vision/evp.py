"""EVP: explicit visual prompting.   Liu et al. 2023, arXiv 2303.10883 (code: NiFangBaAGe/Explicit-Visual-Prompt).

Equation:
    x_i' = x_i + U gelu(T_i (F_hfc + F_pe) + t_i) + u        in front of block i, at the patches
    F_pe = L e,   F_hfc = N(K * h),   h = |IFFT(mask FFT(picture))|

e [patches, d] is the frozen model's embedding of patches, without positions. h is the picture without its low
frequencies: a rectangle around frequency 0, with the share τ of all frequencies, is set to zero. K is a convolution
like the model's own patch convolution, with c = d / reduction channels; N is a norm if the model's convolution has a
norm after it (SegFormer, not ViT). Each block has its own T_i [c, c]; U [d, c], L [c, d] and K belong to a stage. In
the later stages of a pyramid K reads the F_hfc of the previous stage. In models in half precision all this is computed
in float32, since a half-precision FFT is too inaccurate.

Nothing is added to the class token and other tokens in front of the patches, as in the authors' code for ViTs, which
sets `reduction` to 32.

Parameters of a stage with l blocks, n channels before it and kernels of k by k: c (n k^2 + 1) + c (d + 1) + d (c + 1) +
l c (c + 1), and 2 c with a norm.

Start: Matrices from N(0, 0.02^2), truncated, K from N(0, 2 / (k^2 c)), biases at zero. A fresh prompt is not an
identity (`zero_up` makes it one).

Differs from the authors' code: The authors train the mask decoder too (``train=["decode_head"]``).

Use it: `peftcore.apply(model, "evp")`, for tasks that depend on low-level structure (forgery, shadows, blur,
camouflage); not for tasks of high-level content, nor in text models. The prompts depend on the input, so they cannot be
merged; `vpt_deep` has prompts that do not depend on the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from peftcore.author import (
    BlockSite,
    LearningRate,
    Method,
    MethodConfig,
    Operator,
    Shared,
    Site,
    Surgeon,
    Tags,
    Tap,
    block_sites,
)
from peftcore.errors import ConfigError, UnsupportedSite


class EVPConfig(MethodConfig):
    """Options of EVP."""

    overridable = ()

    method: Literal["evp"] = "evp"
    reduction: PositiveInt = 4
    """Divisor of the hidden size d; the quotient is c."""
    share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.25
    """The share of all frequencies that count as low."""
    frequencies: Literal["high", "low", "none"] = "high"
    """The frequencies of the picture from which prompts are computed: high, low, or none."""
    patches: bool = True
    """Compute prompts from the frozen patch embeddings too."""
    zero_up: bool = False
    """Start U at zero: an exact identity."""


NORM = "norm"
"""The form of a site at the norm after a stage's convolution."""


@dataclass(frozen=True, eq=False)
class StageSite(Site):
    """The convolution in front of a stage."""

    number: int = 0
    """The number of the stage, from 0 on."""
    before: int = 0
    """Number of features of the previous stage, which the convolution reads; 0 for the first stage, which reads the
    picture."""
    normed: bool = False
    """True if a norm follows the convolution."""


@dataclass(frozen=True)
class Stage:
    """A stage of the model, with its target blocks (possibly none)."""

    site: StageSite
    norm: tuple[Site, ...]
    blocks: tuple[BlockSite, ...]


def stages_of(surgeon: Surgeon, targets: list[BlockSite]) -> list[Stage]:
    """Return the stages of the tower that contains the target blocks, up to the last stage with a target block.

    Raises:
        UnsupportedSite: the blocks are in several towers, or a stage does not begin with one plain convolution that
            embeds patches of a picture or reads the previous stage.
    """
    host, wanted = surgeon.resolver.host, {site.module_path: site for site in targets}
    [tower, *others] = dict.fromkeys(host.at(path)[0].tower for path in wanted)
    if others:
        raise UnsupportedSite(f"the targets are in two towers, {tower} and {others[0]}; target the blocks of one tower")
    entries = [entry for entry in host.entries if entry.tower == tower]
    stages: list[Stage] = []
    found = 0
    for place, entry in enumerate(entries):
        if entry.role == "patch" and entry.block is None and entry.called and len(entry.shape) == 4:
            if stages and not found:
                break  # several convolutions embed one picture
            parent = entry.path.rpartition(".")[0]
            behind = entries[place + 1 : place + 2]
            norms = [e for e in behind if e.role.startswith("norm") and e.path.rpartition(".")[0] == parent]
            norm = tuple(replace(surgeon.resolver.site(each.path, "weight"), form=NORM) for each in norms)
            site = surgeon.resolver.site(entry.path, "weight")
            if not isinstance(site.module, nn.Conv2d) or site.module.groups != 1:
                raise UnsupportedSite(
                    f"{site.path} is not a plain convolution, so evp cannot add a second one like it; exclude its stage"
                )
            before = stages[-1].site.out_features if stages else 0
            whole = StageSite(**vars(site), number=len(stages), before=before, normed=bool(norm))
            stages.append(Stage(whole, norm, ()))
            found = 0
        elif entry.role == "block":
            found += 1
            block = wanted.pop(entry.path, None)
            if block is not None and (not stages or stages[-1].site.out_features != block.width):
                raise UnsupportedSite(
                    f"{entry.path} has width {block.width}, but no convolution in front of its stage embeds patches of "
                    "a picture with this width; exclude this stage"
                )
            if block is not None:
                stages[-1] = replace(stages[-1], blocks=(*stages[-1].blocks, block))
    if wanted:
        raise UnsupportedSite(
            f"several convolutions embed the picture in front of {next(iter(wanted))}, but evp needs one; exclude this "
            "stage"
        )
    while not stages[-1].blocks:
        stages.pop()
    return stages


def starting(linear: nn.Linear, zero: bool = False) -> nn.Linear:
    """Return a linear map, initialized as in the authors' code."""
    nn.init.zeros_(linear.weight) if zero else nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def frequencies(x: Tensor, share: float, low: bool) -> Tensor:
    """Return pictures [..., high, wide] without their low frequencies, or with `low` only their low frequencies. The
    values are magnitudes."""
    high, wide = x.shape[-2:]
    line = int((high * wide * share) ** 0.5 // 2)
    mask = torch.zeros(high, wide, dtype=torch.bool, device=x.device)
    mask[high // 2 - line : high // 2 + line, wide // 2 - line : wide // 2 + line] = True
    mask = torch.fft.ifftshift(mask if low else ~mask)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.fft.ifft2(torch.fft.fft2(exact) * mask).real.abs()


def channels(site: StageSite, config: EVPConfig) -> int:
    """Return the number of channels that the convolution K of a stage reads."""
    return site.before // config.reduction or site.in_features


class StageOperator(Operator):
    """Computes the features for the prompts of one stage's blocks, from the stage's patches and the picture's
    frequencies."""

    def __init__(self, site: StageSite, config: EVPConfig, taps: list[tuple[Tap, Tap]]) -> None:
        super().__init__(site)
        conv, number = site.module, site.number
        assert isinstance(conv, nn.Conv2d), "stages begin with one"
        d, c = site.out_features, site.out_features // config.reduction
        self.read = taps[number - 1][0] if number else None
        self.left, self.feature = taps[number]
        self.share, self.low = config.share, config.frequencies == "low"
        self.embedding = starting(nn.Linear(d, c)) if config.patches else None
        self.filter: nn.Conv2d | None = None
        self.norm: nn.LayerNorm | None = None
        if config.frequencies != "none":
            inputs = channels(site, config)
            shape: Any = {"kernel_size": conv.kernel_size, "stride": conv.stride, "padding": conv.padding}
            self.filter = nn.Conv2d(inputs, c, **shape)
            nn.init.normal_(self.filter.weight, std=(2.0 / (site.kernel[0] * site.kernel[1] * c)) ** 0.5)
            nn.init.zeros_(self.filter.get_parameter("bias"))
            self.norm = nn.LayerNorm(c) if site.normed else None
        self.normed = site.normed

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        return self._behind_norm if form == NORM else self

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.filter is not None:
            h = frequencies(x, self.share, self.low) if self.read is None else self.read.get()
            h = self.filter(h.to(self.filter.weight.dtype)).movedim(1, -1)  # [batch, rows, columns, c]
            h = h if self.norm is None else self.norm(h)
            self.left.put(h.movedim(-1, 1))
        y = call(x)
        if not self.normed:
            self._put(y.flatten(2).transpose(1, 2))
        return y

    def _behind_norm(self, call: Callable[..., Tensor], y: Tensor) -> Tensor:
        y = call(y)
        self._put(y.flatten(1, -2))
        return y

    def _put(self, patches: Tensor) -> None:
        """Store features [batch, patches, c] for the blocks, computed from patches [batch, patches, d]."""
        feature: Tensor | float = 0.0 if self.filter is None else self.left.get().flatten(2).transpose(1, 2)
        if self.embedding is not None:
            feature = feature + self.embedding(patches.to(self.embedding.weight.dtype))
        self.feature.put(feature)


class EVPOperator(Operator):
    """The prompts in front of one block."""

    changes_inputs, only_inputs = True, True

    def __init__(self, site: BlockSite, config: EVPConfig, feature: Tap, up: Shared) -> None:
        super().__init__(site)
        c = site.width // config.reduction
        self.tune, self.feature, self.up = starting(nn.Linear(c, c)), feature, up

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Add the prompts in front of the block; raises UnsupportedSite if the block's tokens are not the patches of
        its stage."""
        feature = self.feature.get()
        tokens = x.flatten(1, -2)  # [batch, tokens, d]
        if feature is None or feature.shape[1] > tokens.shape[1]:
            raise UnsupportedSite(
                "this block got other tokens than the patches that the convolution of its stage embedded; exclude "
                "this stage"
            )
        prompts = self.up.module(nn.functional.gelu(self.tune(feature))).to(x.dtype)
        others = tokens.shape[1] - feature.shape[1]
        tokens = torch.cat([tokens[:, :others], tokens[:, others:] + prompts], 1)
        return call(tokens.view(x.shape), *args, **kwargs)


def _up(c: int, d: int, zero: bool) -> nn.Linear:
    return starting(nn.Linear(c, d), zero)


class EVP(Method):
    """Prompts that are computed from a picture's high frequencies and patches."""

    name = "evp"
    Config = EVPConfig
    tags = Tags(
        category="vision",
        paper="2303.10883",
        identity_at_init=False,
        identity_options={"zero_up": True},
        reentrant=False,
    )
    learning_rate = LearningRate(
        2e-4,
        "NiFangBaAGe/Explicit-Visual-Prompt@601ae99, configs/train/segformer/train_segformer_evp_cod.yaml",
        on="SegFormer-B4, camouflaged objects",
    )
    target = ("block",)

    def inject(self, model: nn.Module, config: EVPConfig, surgeon: Surgeon) -> None:
        if config.frequencies == "none" and not config.patches:
            raise ConfigError("evp computes prompts from frequencies or patches: set frequencies= or patches=True")
        stages = stages_of(surgeon, block_sites(surgeon))
        taps = [(Tap(until_backward=True, learns=True), Tap(until_backward=True, learns=True)) for _ in stages]
        for number, stage in enumerate(stages):
            d = stage.site.out_features
            if d < config.reduction:
                raise UnsupportedSite(
                    f"{stage.site.path} has {d} features, less than reduction={config.reduction}; lower reduction="
                )
            c = d // config.reduction
            surgeon.graft(stage.site, StageOperator, config, stage.norm, taps=taps)
            if stage.blocks:
                up = surgeon.own(f"up_{number}", partial(_up, c, d, config.zero_up))
            for site in stage.blocks:
                surgeon.graft(site, EVPOperator, config, feature=taps[number][1], up=up)

    @staticmethod
    def parameter_count(site: Site, config: EVPConfig) -> int:
        c = site.out_features // config.reduction
        if not isinstance(site, StageSite):
            return c * (c + 1)
        seen = math.prod(site.kernel) * channels(site, config) + 1 + 2 * site.normed
        return c * (seen * (config.frequencies != "none") + (site.out_features + 1) * config.patches)
