"""The skip connections of a UNet: encoder outputs that the resnets of its decoder read."""

from __future__ import annotations

import dataclasses
import re

from peftcore.author import Site, Surgeon
from peftcore.errors import UnsupportedSite

RESNET = re.compile(r"((?:.*\.)?)up_blocks\.(\d+)\.resnets\.(\d+)")


@dataclasses.dataclass(frozen=True)
class Skip:
    """One skip connection."""

    width: int
    halved: bool
    """Whether the resolution was halved just before it leaves the encoder."""


@dataclasses.dataclass(frozen=True, eq=False)
class SkipSite(Site):
    """A resnet of the decoder, which is given the channels of the layer before it and behind them those of a skip."""

    number: int = dataclasses.field(kw_only=True)
    """The number of the skip that the resnet is given, counted in the encoder."""
    skips: tuple[Skip, ...] = dataclasses.field(kw_only=True)
    """All skips, as the encoder leaves them."""

    @property
    def width(self) -> int:
        """The number of channels of its skip."""
        return self.skips[self.number].width


def skip_sites(surgeon: Surgeon) -> dict[str, list[SkipSite]]:
    """Return the sites of a method as resnets of decoders, by the prefix of their UNet's paths, first to last.

    Raises:
        UnsupportedSite: a site is not a resnet of a decoder, or the decoder does not read the skips one by one.
    """
    stacks: dict[str, list[Site]] = {}
    for site in surgeon.sites():
        matched = RESNET.fullmatch(site.module_path)
        if matched is None:
            raise UnsupportedSite(f"{site.path or 'the host'} is no resnet in the decoder of a UNet")
        stacks.setdefault(matched[1], []).append(site)
    found = {}
    for root, sites in stacks.items():
        skips, resnets = tuple(_skips(surgeon, root)), _decoder(surgeon, root)
        _check(surgeon, root, skips, resnets)
        behind = {path: len(skips) - 1 - place for place, path in enumerate(resnets)}  # the last skip is read first
        read = [SkipSite(**vars(site), number=behind[site.module_path], skips=skips) for site in sites]
        found[root] = sorted(read, key=lambda site: -site.number)
    return found


def _skips(surgeon: Surgeon, root: str) -> list[Skip]:
    """Return what the encoder leaves: the first convolution's output, and that of each resnet and each downsampler."""
    modules, widths = surgeon.resolver.modules, _widths(surgeon)
    skips = [Skip(widths.get(f"{root}conv_in", (0, 0))[0], False)]
    for block in _numbered(surgeon, f"{root}down_blocks"):
        for resnet in _numbered(surgeon, f"{block}.resnets"):
            skips.append(Skip(widths.get(f"{resnet}.conv2", (0, 0))[0], False))
        skips += [Skip(skips[-1].width, True)] if f"{block}.downsamplers" in modules else []
    return skips


def _decoder(surgeon: Surgeon, root: str) -> list[str]:
    """Return the paths of the decoder's resnets, in the order in which they run."""
    blocks = _numbered(surgeon, f"{root}up_blocks")
    return [resnet for block in blocks for resnet in _numbered(surgeon, f"{block}.resnets")]


def _check(surgeon: Surgeon, root: str, skips: tuple[Skip, ...], resnets: list[str]) -> None:
    widths = _widths(surgeon)
    middle = _numbered(surgeon, f"{root}mid_block.resnets")
    before = [widths.get(f"{path}.conv2", (0, 0))[0] for path in [*middle[-1:], *resnets[:-1]]]
    before = before if middle else [skips[-1].width, *before]
    wanted = [width + skip.width for width, skip in zip(before, reversed(skips), strict=False)]
    if len(skips) != len(resnets) or wanted != [widths.get(f"{path}.conv1", (0, 0))[1] for path in resnets]:
        raise UnsupportedSite(f"{root}up_blocks does not read {len(skips)} skip connections, one in each resnet")


def _widths(surgeon: Surgeon) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of each convolution of the host, by path."""
    entries = surgeon.resolver.host.entries
    return {entry.module: (entry.shape[0], entry.shape[1]) for entry in entries if len(entry.shape) == 4}


def _numbered(surgeon: Surgeon, stack: str) -> list[str]:
    """Return the paths of what stands in a list of modules, as it is numbered."""
    numbers = (re.fullmatch(rf"{re.escape(stack)}\.(\d+)", path) for path in surgeon.resolver.modules)
    return [f"{stack}.{number}" for number in sorted(int(each[1]) for each in numbers if each)]
