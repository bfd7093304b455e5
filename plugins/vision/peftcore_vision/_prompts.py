"""Base operator of visual prompts: it finds the blocks that process image patches, and adds prompt rows to the patches.

Attention without positions treats its tokens as a set, so the position of prompt rows among them changes only the order
of the output rows. Rows that pass through several blocks are appended after the host's tokens, so that class tokens
keep their positions. Rows of a single block are inserted in front of all tokens. So each operator can separate its rows
from the tokens even if other prompts are active.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from peftcore import HostEntry
from peftcore.author import MethodConfig, Operator, Share, Shared, Site, Surgeon, on_first
from peftcore.errors import SequenceError, UnsupportedSite

STREAM = ("mlp.down", "experts.down", "attn.out", "attn_mlp.out")
"""Roles of matrices whose output is added to the residual stream. Their number of output features is the hidden
size."""
ROTARY = re.compile(r"rope|rotary", re.IGNORECASE)
"""Pattern in the class names of modules that compute rotary positions for each token."""


class RowsConfig(MethodConfig):
    """Options of prompt rows that are added to the tokens of an image."""

    length: PositiveInt = 5
    """Number of rows of a prompt. The authors of VPT search it between 1 and 200 for each task."""
    dropout: Share = 0.0
    """Dropout probability of the prompts."""


class PromptConfig(RowsConfig):
    """Options of visual prompts to which tokens attend."""

    projection: PositiveInt | None = None
    """Width of the trained prompts; one shared linear layer projects them to the hidden size. None: prompts have the
    hidden size, without a linear layer."""
    train_head: bool = True
    """Train the image head together with the prompts, as in the VPT paper."""


@dataclass(frozen=True, eq=False)
class PromptSite(Site):
    """A block that processes image patches."""

    width: int = 0
    """The hidden size: features of a token."""
    patch: int = 0
    """Number of values in one patch of the image: pixels times channels."""

    @property
    def weight_shape(self) -> torch.Size:
        """The shape [width], which plans and saved files record for this target."""
        return torch.Size([self.width])


def prompt_sites(surgeon: Surgeon) -> list[PromptSite]:
    """Return the blocks among the user's targets. Without targets, return all blocks of the image encoder, which is the
    tower that splits images into patches.

    Raises:
        UnsupportedSite: a target is not a block of the image encoder, or no tokens can be added to a block.
    """
    host = surgeon.resolver.host
    patches = _patches(surgeon)
    towers = [entry.tower for entry in patches]
    if surgeon.wishes.target is None and patches and host.main_tower() not in towers:
        blocks = [entry.path for entry, _ in host.select("block", towers[0])]
        return _checked(surgeon, surgeon.sites([f"re:{re.escape(path)}" for path in blocks]))
    return _checked(surgeon, surgeon.sites())


def image_blocks(surgeon: Surgeon) -> list[PromptSite]:
    """Return all blocks of the image encoder, which is the tower that splits images into patches. The user's targets
    are ignored.

    Raises:
        UnsupportedSite: the model lacks an image encoder, or no tokens can be added to a block.
    """
    patches = _patches(surgeon)
    blocks = [entry for patch in patches[:1] for entry, _ in surgeon.resolver.host.select("block", patch.tower)]
    if not blocks:
        raise UnsupportedSite(
            f"this {type(surgeon.model).__name__} has no blocks that process patches of an image; use a vision "
            "transformer"
        )
    return _checked(surgeon, [surgeon.resolver.module_site(entry.path) for entry in blocks])


def _patches(surgeon: Surgeon) -> list[HostEntry]:
    return [entry for entry in surgeon.resolver.host.entries if entry.role == "patch" and entry.block is None]


def _checked(surgeon: Surgeon, found: list[Site]) -> list[PromptSite]:
    """Return the blocks as prompt sites. Raise UnsupportedSite if no tokens can be added to one of them."""
    patches = _patches(surgeon)
    stacks = [stack.path for stack in surgeon.resolver.token_stacks()]
    for site in found:
        if any(f"{site.module_path}.".startswith(f"{stack}.".lstrip(".")) for stack in stacks):
            raise UnsupportedSite(f"{site.path} processes tokens of a text; use prompt_tuning for it")
    sites = [_prompt_site(surgeon, site, patches) for site in found]
    for one, other in itertools.pairwise(sites):
        if one.width != other.width and _owner(one) == _owner(other):
            raise UnsupportedSite(
                f"{one.path} has width {one.width}, {other.path} {other.width}: tokens merge between them; target "
                "blocks of one width"
            )
    return sites


def _owner(site: Site) -> str:
    """Return the path of the module list that contains a block."""
    return site.module_path.rpartition(".")[0]


def _prompt_site(surgeon: Surgeon, site: Site, patches: list[HostEntry]) -> PromptSite:
    inside = [entry for entry in surgeon.resolver.host.entries if entry.block == site.module_path]
    tower = inside[0].tower if inside else ""
    sizes = [math.prod(entry.shape[1:]) for entry in patches if entry.tower == tower]
    for reason in _obstacles(surgeon, site, inside, tower):
        raise UnsupportedSite(f"{site.path or 'the host'} {reason}, so no tokens can be added to those of the image")
    if not sizes:
        raise UnsupportedSite(f"{site.path} does not process patches of an image; exclude it")
    width = next(entry.rows for entry in inside if entry.role in STREAM)
    once = not surgeon.resolver.check_runs_once(site.module_path)
    return PromptSite(**{**vars(site), "form": "activation", "once": once}, width=width, patch=sizes[-1])


def _obstacles(surgeon: Surgeon, site: Site, inside: list[HostEntry], tower: str) -> Iterator[str]:
    """Yield the reasons why no tokens can be added to those of a block."""
    modules = surgeon.resolver.modules
    roles = {entry.role for entry in inside}
    if not any(entry.role == "block" and entry.path == site.module_path for entry in inside):
        yield "is not a block of this host"
    if not roles.intersection(STREAM) or not any(role.partition(".")[0] == "attn" for role in roles):
        yield "has no attention between its tokens"
    if any(role == "embed.pos" or role.startswith("pos.") for role in roles):
        yield "has a position for each of its tokens (relative positions, windows)"
    if any(entry.kind == "conv" for entry in inside):
        yield "arranges its tokens in a grid for a convolution"
    for path, module in modules.items():
        if path.startswith(f"{tower}.".lstrip(".")) and ROTARY.search(type(module).__name__):
            yield f"gets rotary positions for each of its tokens from {path}"
    if site.tokens_first:
        yield (
            "gets the tokens in the first dimension and the batch in the second (torch's own layers need "
            "batch_first=True)"
        )


def stack_ends(surgeon: Surgeon, sites: list[PromptSite]) -> tuple[PromptSite, PromptSite]:
    """Return the first and the last site. The sites must be a block and all later blocks of the same module list, so
    that the rows of all active prompts are removed at the same block.

    Raises:
        UnsupportedSite: a later block of the list is not among the sites.
    """
    owner = _owner(sites[0])
    blocks = [entry.path for entry in surgeon.resolver.host.entries if entry.role == "block"]
    whole = [path for path in blocks if path.rpartition(".")[0] == owner]
    if [site.module_path for site in sites] != whole[-len(sites) :]:
        raise UnsupportedSite(
            f"a prompt passes from its first block through all later ones in {owner or 'the host'}, not only from "
            f"{sites[0].path} to {sites[-1].path}; target all of them, or use vpt_deep, which accepts any blocks"
        )
    return sites[0], sites[-1]


class PromptOperator(Operator):
    """The rows of one prompt, which subclasses add to the tokens of a block."""

    def __init__(self, site: PromptSite, config: RowsConfig, projection: Shared | None = None) -> None:
        super().__init__(site)
        width = site.width if projection is None else projection.module.in_features
        bound = math.sqrt(6 / (site.patch + width))
        self.length, self.projection = config.length, projection
        self.prompt = nn.Parameter(torch.empty(config.length, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(config.dropout)

    def rows(self, x: Tensor, others: tuple[Any, ...]) -> Tensor:
        """Return the prompt, [batch, length, width], for tokens [batch, tokens, width]; `others` are the block's other
        arguments.

        Raises:
            SequenceError: another argument has an entry for each token, or the tokens are arranged on a grid.
        """
        check_tokens(x, others)
        rows = self.prompt if self.projection is None else self.projection.module(self.prompt)
        (rows,) = self.cast(x, rows)
        dropped: Tensor = self.dropout(rows.expand(len(x), -1, -1))
        return dropped


def check_tokens(x: Tensor, others: tuple[Any, ...]) -> None:
    """Check the arguments of a block: its tokens must be [batch, tokens, width], and other arguments must not depend on
    the token.

    Raises:
        SequenceError: another argument has an entry for each token, or the tokens are arranged on a grid.
    """
    if x.dim() != 3 or any(isinstance(each, Tensor) and each.dim() > 1 for each in _flat(others)):
        raise SequenceError(
            "a block with visual prompts accepts only tokens [batch, tokens, width], but got a mask or positions for "
            "each token, which are unknown for the prompt's rows; call the model without them"
        )


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, tuple | list) else (value,)


class DeepOperator(PromptOperator):
    """The prompt of a single block. Its rows are removed from the block's output."""

    def forward(self, call: Callable[..., Any], x: Any, *args: Any, **kwargs: Any) -> Any:
        rows = self.rows(x, (*args, *kwargs.values()))
        output = call(torch.cat([rows, x], dim=1), *args, **kwargs)
        return on_first(output, lambda y: y[:, self.length :].contiguous())  # heads may want to view it


def attentions_of(surgeon: Surgeon, site: PromptSite) -> list[Site]:
    """Return the self-attentions of a block."""
    resolver = surgeon.resolver
    cores = [entry for entry, _ in resolver.host.select("attn.core") if entry.block == site.module_path]
    return [resolver.site(core.module, "weight", core.role) for core in cores]


def train_heads(surgeon: Surgeon, sites: list[PromptSite]) -> None:
    """Make the heads trainable that are in the same encoder (tower) as the blocks. Heads that compare images and texts
    stay frozen. If a condition modulates the blocks, all heads stay frozen, since diffusion models do not score
    classes."""
    host, blocks = surgeon.resolver.host, {site.module_path for site in sites}
    if any(entry.role == "mod" and entry.block in blocks for entry in host.entries):
        return
    towers = {host.at(path)[0].tower for path in blocks}
    for site in surgeon.at("head"):
        matrix = site.layer.has(site.module, site.tensor)  # no pooling head (SigLIP)
        if matrix and host.at(site.module_path)[0].tower in towers:
            surgeon.train(site.module_path)


def prompt_count(site: Site, config: PromptConfig) -> int:
    """Return the number of parameters of a prompt, or of a trained tensor of the head. It is 0 for an attention of a
    prompt stream."""
    if site.form == "attention":
        return 0
    return site.numel if site.form == "weight" else config.length * (config.projection or site.out_features)


def shared_projection(surgeon: Surgeon, site: PromptSite, config: PromptConfig) -> Shared | None:
    """Return the linear map that all prompts share, or None if the option `projection` is None."""
    if config.projection is None:
        return None
    return surgeon.own(f"projection_{config.projection}_{site.width}", lambda: _projection(config, site.width))


def _projection(config: PromptConfig, width: int) -> nn.Linear:
    linear = nn.Linear(config.projection or width, width)
    nn.init.kaiming_normal_(linear.weight, mode="fan_out")
    return linear
