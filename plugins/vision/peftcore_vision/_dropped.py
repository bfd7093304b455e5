"""The dropout of an update, by default where it can act."""

from __future__ import annotations

from peftcore.author import Site

AUTHORS = 0.1
"""The probability in the authors' code of FacT, RepAdapter and ARC."""


def own_dropout(site: Site, dropout: float | None) -> float:
    """Return the probability at a site: the option's, or the authors' where the module is called."""
    if dropout is not None:
        return dropout
    return 0.0 if site.form == "weight" else AUTHORS
