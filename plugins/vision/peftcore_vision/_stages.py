"""The stages of a vision transformer: a convolution that embeds patches, a norm behind it, and the blocks after it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from peftcore.author import BlockSite, Site, Surgeon
from peftcore.errors import UnsupportedSite

NORM = "norm"
"""The form of the norm behind the convolution."""


@dataclass(frozen=True, eq=False)
class StageSite(Site):
    """The convolution in front of a stage."""

    number: int = 0
    """The number of the stage, from 0 on."""
    before: int = 0
    """Features of the stage before, of which the convolution makes those of this one; 0 in front of the first."""
    normed: bool = False
    """Whether a norm is behind it."""


@dataclass(frozen=True)
class Stage:
    """A stage with its blocks among the targets, which may be none."""

    site: StageSite
    norm: tuple[Site, ...]
    blocks: tuple[BlockSite, ...]


def stages_of(surgeon: Surgeon, targets: list[BlockSite]) -> list[Stage]:
    """Return the stages of the tower in which blocks are, up to the last one that has any of them.

    Raises:
        UnsupportedSite: the blocks are in several towers; or not all of them read what a convolution before them made
            of a picture, or of the stage before.
    """
    host, wanted = surgeon.resolver.host, {site.module_path: site for site in targets}
    [tower, *others] = dict.fromkeys(host.at(path)[0].tower for path in wanted)
    if others:
        raise UnsupportedSite(f"{tower} and {others[0]} are two towers; target the blocks of one")
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
                raise UnsupportedSite(f"{site.path} is no plain convolution, of which a second one could be made")
            before = stages[-1].site.out_features if stages else 0
            whole = StageSite(**vars(site), number=len(stages), before=before, normed=bool(norm))
            stages.append(Stage(whole, norm, ()))
            found = 0
        elif entry.role == "block":
            found += 1
            block = wanted.pop(entry.path, None)
            if block is not None and (not stages or stages[-1].site.out_features != block.width):
                raise UnsupportedSite(
                    f"{entry.path} is {block.width} wide, and no convolution in front of its stage makes as many "
                    "features of patches of a picture"
                )
            if block is not None:
                stages[-1] = replace(stages[-1], blocks=(*stages[-1].blocks, block))
    if wanted:
        raise UnsupportedSite(f"several convolutions embed the picture in front of {next(iter(wanted))}")
    while not stages[-1].blocks:
        stages.pop()
    return stages
