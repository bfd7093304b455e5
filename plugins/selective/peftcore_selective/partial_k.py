"""Partial-k: the last k blocks train, with the final norm and the head.   Classic; see VPT, arXiv 2203.12119, for its
role as a baseline.

Equation:
    h_l = B_l(h_{l-1}) for l <= L - k,   h_l = B'_l(h_{l-1}) for l > L - k,   y = H'(n'(h_L)),   all from the host's

Backward ends at block L - k: no parameter below it trains, so no activations are kept there. Blocks are counted
separately in each stack, such as an encoder and a decoder. The stages of a pyramid are one stack. A head that is tied
to the token embedding stays frozen, since training it would also train the embedding below the blocks. `target` selects
some of these modules, for example only the linear layers of the last blocks.

Parameters: those of k blocks, of the final norm and of the head.

Start: Trained tensors start at the model's values. A fresh adapter is the identity.

Differs from the authors' code: No difference is known.

Use it: `peftcore.apply(model, "partial_k")`, as the strong baseline on fixed low-level features; k = 0 would be a
linear probe, k = L nearly full fine-tuning.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import PositiveInt
from torch import nn

from peftcore.author import LearningRate, Method, MethodConfig, Site, Surgeon, Tags
from peftcore.errors import TargetError


class PartialKConfig(MethodConfig):
    """Options of partial-k."""

    method: Literal["partial_k"] = "partial_k"
    k: PositiveInt = 1
    """Number of blocks that train, counted from the end of each stack. All blocks of a shorter stack train."""
    final_norm: bool = True
    """Train the norm after the last block too."""
    head: bool = True
    """Train the head too, unless it is tied."""


class PartialK(Method):
    """Train the last blocks."""

    name = "partial_k"
    Config = PartialKConfig
    tags = Tags(category="selective", paper="2203.12119", mergeable=True)
    learning_rate = LearningRate(
        3.75e-3, "KMnP/vpt@4410440, configs/finetune/cub.yaml", on="ViT-B/16, CUB, batches of 384"
    )
    target = "*"

    def inject(self, model: nn.Module, config: PartialKConfig, surgeon: Surgeon) -> None:
        last = _last_blocks(surgeon, config.k)
        roles = [role for role, wanted in (("norm.final", config.final_norm), ("head", config.head)) if wanted]
        paths = {site.module_path for role in roles for site in surgeon.at(role)}
        for site in surgeon.sites():
            in_block = f"{site.module_path}.".startswith(last)
            for each in map(site.at, site.tensors() if in_block or site.module_path in paths else ()):
                if not site.missing(each.tensor) and (in_block or not _is_table(each, surgeon)):
                    surgeon.replace(each)

    @staticmethod
    def parameter_count(site: Site, config: PartialKConfig) -> int:
        return site.numel


def _last_blocks(surgeon: Surgeon, k: int) -> tuple[str, ...]:
    """Return the paths of the last k blocks of each stack, each with a dot at the end. Without a user's target, only
    the main tower counts.

    Raises:
        TargetError: no stack has k blocks.
    """
    host, stacks = surgeon.resolver.host, dict[str, list[str]]()
    tower = host.main_tower() if surgeon.wishes.target is None else None
    for entry in host.entries:
        if entry.role == "block" and tower in (None, entry.tower):
            stack = re.sub(r"\d+", "*", entry.path)  # the same for all blocks of a stack
            stacks.setdefault(stack, []).append(f"{entry.path}.")
    longest = max(map(len, stacks.values()), default=0)
    if k > longest:
        raise TargetError(f"k={k}, but this {type(surgeon.model).__name__} has at most {longest} blocks in one stack")
    return tuple(path for paths in stacks.values() for path in paths[-k:])


def _is_table(site: Site, surgeon: Surgeon) -> bool:
    """Return whether the tensor is also the table of a token embedding."""
    tables = {entry.module for entry in surgeon.resolver.host.entries if entry.role == "embed"}
    tensor = site.module.get_parameter(site.tensor)
    return any(path in tables for path, _ in surgeon.resolver.holders(tensor))
