"""MaPLe, multi-modal prompt learning.   Khattak et al. 2022, arXiv 2210.03117.

Equation:
    text, block j:    [SOS; P_j; name; EOS],   P_j [length, d]
    image, block j:   [class token; patches; P_j F_j + b_j],   F_j [d, d_image],   j = 0 ... depth - 1

Text prompts train, and linear maps compute image prompts from them, so both towers learn together (code:
muzairkhattak/multimodal-prompt-learning). Each of the first `depth` blocks has a separate prompt, which replaces the
output rows of the previous block's prompt. The last prompt passes through all later blocks. P_0 replaces words before
positions are added, as in coop. Tokenize ``"X X " + name + "."`` with `length` placeholder words of one token each. In
any other text, the first `length` words are replaced. The authors write "a photo of a"; with length=2 its first two
words are replaced, and their ids are ``init_ids``. The texts of a batch are the classes:

    peftcore.apply(clip, "maple", init_ids=[320, 1125])
    clip(input_ids=texts_of_all_classes, pixel_values=images).logits_per_image

The first image prompt passes through the norm before the blocks, if the model has one (CLIP). If several adapters are
active together, the text prompts of the last one replace the words, and the image tower gets the prompts of all.

Parameters: depth (length d + (d + 1) d_image).

Start: Text prompts start from N(0, 0.02), or P_0 from the embeddings of `init_ids`; maps start as torch's linear
layers. No start is an identity.

Differs from the authors' code: In the authors' code the deeper maps start with the same values; here each has a
separate draw.

Use it: `peftcore.apply(model, "maple", depth=2)`, for CLIP with few images a class, where names of unseen classes must
still work; coop has a hundredth of the parameters, and is as good for the seen classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore.author import LearningRate, Method, Site, Surgeon, Tags, Tap, on_first
from peftcore.errors import ConfigError, SequenceError, UnsupportedSite
from peftcore_vision._prompt_words import PlacesConfig, PlacesOperator, put_at, text_sites, words
from peftcore_vision._prompts import check_tokens, image_blocks

NORM, BLOCK, LAST = "prompt.norm", "prompt.block", "prompt.last"
"""The forms of sites in the image tower: the norm before the blocks, the block that gets a prompt, and the last
block."""


class MaPLeConfig(PlacesConfig):
    """Options of MaPLe."""

    overridable = ("init_ids",)

    method: Literal["maple"] = "maple"
    length: PositiveInt = 2
    """Rows of each prompt."""
    depth: PositiveInt = 9
    """Number of blocks, from the first on, that have separate prompts."""


@dataclass(frozen=True)
class Towers:
    """The sites of the text tower and of the image tower."""

    table: Site
    """The module that embeds texts."""
    tower: Site
    """The text tower, whose attention mask is read."""
    texts: list[Site]
    """The blocks of the text tower."""
    images: list[Site]
    """The blocks that process patches of an image."""
    image_width: int
    """Hidden size of the image tower."""
    norms: list[Site]
    """The norm between the patch embedding and the first block, or an empty list."""


@dataclass(frozen=True, eq=False)
class CoupledSite(Site):
    """A module in the text tower, together with the width of the image tower."""

    width: int = 0
    """Hidden size of the text tower."""
    image_width: int = 0
    """Hidden size of the image tower; the maps compute prompts of this width."""

    @property
    def weight_shape(self) -> torch.Size:
        """The shape [image_width, width], which plans and saved files record for this target."""
        return torch.Size([self.image_width, self.width])


@dataclass(frozen=True)
class Rest:
    """The values that the operators of all blocks share."""

    names: tuple[str, ...]
    """The names of the text tower's arguments."""
    last: int
    """The number of the last block of the image tower."""
    has_norm: bool
    """True if the image tower has a norm before its blocks."""
    places: Tap
    """Passes the prompt's positions from the operator at the token embedding to the operators at the text blocks."""


def two_towers(surgeon: Surgeon) -> Towers:
    """Return the sites of the text encoder and of the image encoder (the two towers).

    Raises:
        UnsupportedSite: the model lacks one of the towers, or a tower does not accept prompts.
    """
    (table, tower), *others = text_sites(surgeon)
    if others:
        raise UnsupportedSite(f"{others[0][0].path} is a second table of texts; target only one of them")
    host, images = surgeon.resolver.host, image_blocks(surgeon)
    top = f"{tower.module_path}.".lstrip(".")
    of_texts = [each.path for each in host.entries if each.role == "block" and each.path.startswith(top)]
    if any(image.module_path in of_texts for image in images):
        raise UnsupportedSite(
            f"{tower.module_path or 'the host'} has one tower for texts and images, but maple needs two; use coop or "
            "prompt_tuning"
        )
    in_front = host.at(images[0].module_path)[0].tower
    norms = [each.path for each in host.entries if each.role == "norm.embed" and each.tower == in_front]
    at = surgeon.resolver.module_site
    return Towers(table, tower, [*map(at, of_texts)], [*images], images[0].width, [*map(at, norms)])


class MaPLeOperator(PlacesOperator):
    """The prompts of one block in both towers. The text prompt replaces rows of the previous block's output, or of the
    token embedding's output."""

    def __init__(self, site: CoupledSite, config: MaPLeConfig, table: Site, depth: int, rest: Rest) -> None:
        super().__init__(site, config, rest.names)
        drawn = config.replace(init_ids=[], length=config.count) if depth else config
        self.depth, self.places = depth, rest.places
        self.stays = depth == config.depth - 1 < rest.last
        self.has_norm = depth == 0 and rest.has_norm
        self.normed = Tap(until_backward=True)  # from the norm before the blocks to the first of them
        self.rows = nn.Parameter(words(table, drawn)[0])  # [length, d]
        self.map = nn.Linear(site.width, site.image_width)

    def at(self, form: str, module: nn.Module) -> Callable[..., Any]:
        acts = {NORM: self._norm, BLOCK: self._enter, LAST: self._leave}
        return acts[form] if form in acts else super().at(form, module)

    def forward(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output = call(x, *args, **kwargs)
        if not self.depth:
            self.places.put(self.held(x))
        held = self.places.get()
        if held is None:
            raise SequenceError(
                "the text blocks were called without their table, so the prompt's position is unknown; call the whole "
                "model"
            )
        return on_first(output, lambda y: put_at(held, self.cast(y, self.rows)[0][None], y))

    def _of_image(self, x: Tensor) -> Tensor:
        """Return the image prompt [batch, length, d_image]."""
        rows, weight, bias = self.cast(x, self.rows, self.map.weight, self.map.bias)
        return nn.functional.linear(rows, weight, bias).expand(len(x), -1, -1)

    def _norm(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(torch.cat([x, self._of_image(x)], dim=1))
        self.normed.put(y[:, x.shape[1] :])
        return y[:, : x.shape[1]]

    def _enter(self, call: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        check_tokens(x, (*args, *kwargs.values()))
        rows = self.normed.get() if self.has_norm else self._of_image(x)
        if self.stays:
            return call(torch.cat([x, rows], dim=1), *args, **kwargs)
        output = call(torch.cat([rows, x], dim=1), *args, **kwargs)  # the next block has its own
        return on_first(output, lambda y: y[:, self.count :].contiguous())

    def _leave(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return on_first(call(*args, **kwargs), lambda y: y[:, : -self.count].contiguous())


class MaPLe(Method):
    """Trained text prompts in several blocks, and linear maps that compute the image prompts from them.

    Example:
        injection = peftcore.apply(model, "maple", depth=2)  # the model has two blocks
    """

    name = "maple"
    Config = MaPLeConfig
    tags = Tags(category="vision", paper="2210.03117", identity_at_init=False, per_row=False, reentrant=False)
    learning_rate = LearningRate(
        3.5e-3,
        "muzairkhattak/multimodal-prompt-learning@69bce21, configs/trainers/MaPLe/vit_b16_c2_ep5_batch4_2ctx.yaml",
        on="CLIP ViT-B/16, 16 images a class, batches of 4",
        optimizer="SGD",
        momentum=0.9,
    )
    target = ("embed",)

    def inject(self, model: nn.Module, config: MaPLeConfig, surgeon: Surgeon) -> None:
        towers = two_towers(surgeon)
        table, images = towers.table, towers.images
        if config.depth > (most := min(len(images), len(towers.texts))):
            raise ConfigError(
                f"depth={config.depth}, but the towers of this {type(model).__name__} have only {most} blocks; set at "
                f"most {most}"
            )
        rest = Rest(towers.tower.arguments, len(images) - 1, bool(towers.norms), Tap(until_backward=True))
        for depth in range(config.depth):
            site = table if depth == 0 else replace(towers.texts[depth - 1], form="activation")
            coupled = CoupledSite(**vars(site), width=table.out_features, image_width=towers.image_width)
            holders = [replace(images[depth], form=BLOCK)]
            if depth == 0:
                holders += [towers.tower, *(replace(norm, form=NORM) for norm in towers.norms)]
            if depth == config.depth - 1 < rest.last:
                holders.append(replace(images[-1], form=LAST))
            surgeon.graft(coupled, MaPLeOperator, config, tuple(holders), table=table, depth=depth, rest=rest)

    @staticmethod
    def parameter_count(site: CoupledSite, config: MaPLeConfig) -> int:
        return config.count * site.width + (site.width + 1) * site.image_width
