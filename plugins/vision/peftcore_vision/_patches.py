"""The convolutions of a model that embed patches of pictures."""

from __future__ import annotations

from dataclasses import replace

from peftcore import Site, Surgeon


def patch_sites(surgeon: Surgeon, site: Site) -> list[Site]:
    """Return the convolutions that embed the patches of the tower in which a site is, with the form "patch"."""
    host = surgeon.resolver.host
    tower = next((entry.tower for entry in host.at(site.module_path)), "")
    patches = (e for e in host.entries if e.role == "patch" and e.tower == tower and e.called and len(e.shape) == 4)
    return [replace(surgeon.resolver.site(entry.module, "weight"), form="patch") for entry in patches]
