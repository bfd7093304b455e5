"""The default probability of dropout on an update: the authors' value, or 0 where dropout cannot act."""

from __future__ import annotations

from peftcore.author import Site

AUTHORS = 0.1
"""The probability in the authors' code of FacT, RepAdapter and ARC."""


def own_dropout(site: Site, dropout: float | None) -> float:
    """Return the dropout probability at a site: the option's value; without one, the authors' value if the site's
    module is called, else 0."""
    if dropout is not None:
        return dropout
    return 0.0 if site.form == "weight" else AUTHORS
