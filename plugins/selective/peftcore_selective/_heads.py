"""Classification heads, which the authors of some methods train whole in addition to the method's own parameters."""

from __future__ import annotations

from peftcore.author import Surgeon


def train_classifiers(surgeon: Surgeon) -> None:
    """Train the heads of the host whole, unless they predict tokens (one row for each row of the token table) or the
    host is a denoiser, whose blocks are modulated by a time step: a denoiser lacks classes."""
    host = surgeon.resolver.host
    tokens = {entry.shape[0] for entry in host.entries if entry.role == "embed" and entry.shape}
    given = {entry.module: entry.shape[0] for entry in host.entries if entry.role == "head" and entry.shape}
    for site in () if host.knows("mod") else surgeon.at("head"):
        if given.get(site.module_path) not in tokens:
            surgeon.train(site.module_path)
