"""Heads over classes, which the authors of some methods train whole beside what the methods are named for."""

from __future__ import annotations

from peftcore.author import Surgeon


def train_classifiers(surgeon: Surgeon) -> None:
    """Train the heads of the host whole, unless they give tokens (they have a row for each of the table's) or the host
    is a denoiser, whose blocks are modulated by a time: that has no classes."""
    host = surgeon.resolver.host
    tokens = {entry.shape[0] for entry in host.entries if entry.role == "embed" and entry.shape}
    given = {entry.module: entry.shape[0] for entry in host.entries if entry.role == "head" and entry.shape}
    for site in () if host.knows("mod") else surgeon.at("head"):
        if given.get(site.module_path) not in tokens:
            surgeon.train(site.module_path)
