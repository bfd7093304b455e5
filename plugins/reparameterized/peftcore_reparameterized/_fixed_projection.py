"""LoRA-FA's fixed projection: A stays as it was drawn."""

from __future__ import annotations

from peftcore.author import Operator, Site
from peftcore.errors import UnsupportedSite


def fix_projection(operator: Operator, site: Site) -> None:
    """Make the factor A of an operator a buffer, which no optimizer sees.

    Raises:
        UnsupportedSite: it is zero there, so that B alone would never train.
    """
    if site.layer.one_hot:
        raise UnsupportedSite(f"{site.path} is an embedding, whose A is zero: B alone would never train it")
    A = operator.get_tensor("A").detach()
    del operator.A
    operator.register_buffer("A", A)
