"""State-space mixers as sites: shapes determine which modules make their gate, the readout of their states, and their
output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from peftcore import HostEntry
from peftcore.author import Site, Surgeon
from peftcore.errors import UnsupportedSite

GATE, READOUT, OUT = "gate", "readout", "out"
"""Forms of sites: the matrix whose last outputs are the gate z, the module whose last outputs are C, which reads the
states, and the module whose input is the readout."""


@dataclass(frozen=True, eq=False)
class MixerSite(Site):
    """A whole state-space mixer as a site."""

    channels: int = 0
    """Channels d of its scan."""
    states: int = 0
    """States N of each channel; 0 where C is made inside the mixer, and nothing outside gets to see it."""
    places: tuple[Site, ...] = ()
    """The places inside it."""

    @property
    def weight_shape(self) -> torch.Size:
        """The numbers of channels and of states, which plans and files store as the shape."""
        return torch.Size([self.channels, self.states])

    @property
    def gates_first(self) -> bool:
        """True if the output of the scan is gated already."""
        return any(place.form == GATE for place in self.places)


def mixer_site(surgeon: Surgeon, site: Site) -> MixerSite:
    """Return a mixer with its places: of Mamba (S6) or of Mamba-2, in which a norm is given the scan and the gate.

    Raises:
        UnsupportedSite: it is neither.
    """
    path = site.module_path
    children = [each for each in surgeon.resolver.host.entries if path and each.path.rpartition(".")[0] == path]
    outs = [each for each in children if each.role == "ssm.out"]
    if len(outs) != 1:
        raise UnsupportedSite(f"{path or 'the host'} is no state-space mixer; target the role ssm")
    known = {**vars(site), "form": "activation", "channels": outs[0].shape[-1]}
    places = _selective(surgeon, children, outs[0])
    if places is not None:
        return MixerSite(**known, states=places[0], places=places[1])
    norms = [each for each in children if _is_gated_norm(surgeon, each, outs[0].shape[-1])]
    if len(norms) != 1:
        raise UnsupportedSite(
            f"{path}: nothing tells where this mixer gates what it reads of its states; Mamba, FalconMamba, Jamba and "
            "Mamba-2 tell, exclude= others"
        )
    return MixerSite(**known, places=(_place(surgeon, norms[0], OUT),))


def _selective(surgeon: Surgeon, children: list[HostEntry], out: HostEntry) -> tuple[int, tuple[Site, ...]] | None:
    """Return the number of states of a mixer of Mamba, and its places; None for all others.

    The first matrix returns the input of the convolution and the gate, x returns the steps, B and C. Norms of the
    steps, B and C may follow: then C is the output of the norm whose name begins with c.
    """
    by_role = {each.role: each for each in children}
    first, x, steps = (by_role.get(f"ssm.{name}") for name in ("in", "x", "dt"))
    if first is None or x is None or steps is None or first.rows != 2 * out.shape[-1]:
        return None
    states, rest = divmod(x.rows - steps.shape[-1], 2)
    mixer = surgeon.resolver.modules[x.path.rpartition(".")[0]]
    decays = [each.shape for each in mixer._parameters.values() if each is not None]
    if rest or (out.shape[-1], states) not in decays:
        return None
    norms = [each for each in children if each.kind == "norm"]
    readouts = [each for each in norms if each.path.rpartition(".")[2].startswith("c")] if norms else [x]
    if len(readouts) != 1:
        return None
    return states, tuple(
        _place(surgeon, each, form) for each, form in ((first, GATE), (readouts[0], READOUT), (out, OUT))
    )


def _is_gated_norm(surgeon: Surgeon, entry: HostEntry, channels: int) -> bool:
    return entry.kind == "norm" and entry.shape == (channels,) and "gate" in _site(surgeon, entry).arguments


def _site(surgeon: Surgeon, entry: HostEntry) -> Site:
    return surgeon.resolver.site(entry.module, "weight", entry.role)


def _place(surgeon: Surgeon, entry: HostEntry, form: str) -> Site:
    return replace(_site(surgeon, entry), form=form)
