"""Classification heads, which the authors of some methods train as a whole, in addition to the parameters of the
method."""

from __future__ import annotations

from peftcore.author import Surgeon


def train_classifiers(surgeon: Surgeon) -> None:
    """Make the classification heads of the host trainable as a whole. Heads that predict tokens stay frozen; they have
    one row for each row of the token embedding. All heads stay frozen if a time step modulates the blocks, since a
    denoiser lacks classes."""
    host = surgeon.resolver.host
    tokens = {entry.shape[0] for entry in host.entries if entry.role == "embed" and entry.shape}
    given = {entry.module: entry.shape[0] for entry in host.entries if entry.role == "head" and entry.shape}
    for site in () if host.knows("mod") else surgeon.at("head"):
        if given.get(site.module_path) not in tokens:
            surgeon.train(site.module_path)
