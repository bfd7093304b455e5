"""The default dropout probability of updates: that of the authors' code, or 0 for weights on which dropout cannot
act."""

from __future__ import annotations

from peftcore.author import Site

AUTHORS = 0.1
"""The dropout probability in the authors' code of FacT, RepAdapter and ARC."""


def own_dropout(site: Site, dropout: float | None) -> float:
    """Return the dropout probability at a site: `dropout` if it is set. Otherwise return `AUTHORS` if the model calls
    the site's module, and 0 if it only reads the weight."""
    if dropout is not None:
        return dropout
    return 0.0 if site.form == "weight" else AUTHORS
