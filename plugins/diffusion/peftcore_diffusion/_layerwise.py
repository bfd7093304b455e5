"""Separate text states for each cross-attention of a UNet: functions that find the attentions, and an operator that
selects the states of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from peftcore.author import InputOperator, Mine, Site, Surgeon
from peftcore.errors import ConfigError

PARTS = ("down_blocks", "mid_block", "up_blocks")
"""The parts of a UNet of diffusers, in the order in which they run. In the order of registration the middle block is
last."""
STATES = "encoder_hidden_states"


class LayerReader(InputOperator):
    """Selects the text states of one cross-attention, ``[batch, tokens, dim]``, out of ``[batch, layers, tokens,
    dim]``. States without the dimension of layers are used as they are.

    Args:
        site: the attention.
        layer: the number of the attention.
        layers: the number of cross-attentions.
        left_out: True if merging removes this operator. The merged model then accepts only states without the dimension
            of layers.
    """

    def __init__(self, site: Site, layer: int, layers: int, left_out: bool) -> None:
        super().__init__(site)
        self.index, self.layers, self.trains_only = layer, layers, left_out

    def arguments(self, given: dict[str, Any], mine: Mine) -> dict[str, Any]:
        """Return the arguments with the states of this layer.

        Raises:
            ConfigError: the states have another number of layers.
        """
        states = given.get(STATES)
        if states is None or states.dim() != 4:
            return given
        if states.shape[1] != self.layers:
            raise ConfigError(
                f"{STATES} has {states.shape[1]} layers, but the UNet has {self.layers} cross-attentions: pass [batch, "
                f"{self.layers}, tokens, dim], or one text for all of them, [batch, tokens, dim]"
            )
        return {**given, STATES: states[:, self.index]}


def cross_attentions(surgeon: Surgeon) -> list[Site]:
    """Return the cross-attention modules of the host's UNets of diffusers, in the order in which they run."""
    resolver = surgeon.resolver
    paths = {entry.module.rpartition(".")[0] for entry in resolver.host.entries if entry.role == "cross.k"}
    sites = [resolver.module_site(path) for path in resolver.modules if path in paths]
    found = [(part, site) for site in sites if (part := _part(site)) is not None and STATES in site.arguments]
    return [site for _, site in sorted(found, key=lambda each: each[0])]


def read_layers(surgeon: Surgeon, keys: Iterable[Site] | None = None, left_out: bool = False) -> tuple[int, set[str]]:
    """Make cross-attentions read separate text states: those that contain the matrices in `keys`, or all if `keys` is
    None. Return the number of all cross-attentions in the host, and the paths of those that read separate states."""
    every = cross_attentions(surgeon)
    wanted = {site.module_path for site in every} if keys is None else {around(site) for site in keys}
    reading = [(layer, site) for layer, site in enumerate(every) if site.module_path in wanted]
    for layer, site in reading:
        surgeon.graft(site, LayerReader, layer=layer, layers=len(every), left_out=left_out)
    return len(every), {site.module_path for _, site in reading}


def check_words(tokens: Sequence[int], layers: int) -> None:
    """Check that the number of tokens is a multiple of the number of cross-attentions, if the host has
    cross-attentions.

    Raises:
        ConfigError: a word would have too many or too few tokens.
    """
    if layers and len(tokens) % layers:
        raise ConfigError(
            f"{len(tokens)} ids are not a multiple of {layers}: a word needs one token id for each cross-attention, of "
            f"which the UNet has {layers}"
        )


def around(site: Site) -> str:
    """Return the path of the attention that contains a matrix."""
    return site.module_path.rpartition(".")[0]


def _part(site: Site) -> int | None:
    names = site.module_path.split(".")
    return next((PARTS.index(name) for name in names if name in PARTS), None)
