"""Whether adapted modules still are in the model: one that was replaced, taken out, or resized in place is an error in
the next forward.

`resize_token_embeddings`, a new head, a layer that is exchanged: the new module runs without the adapter. Modules that
were wrapped (compiled, checkpointed) or moved to another place are there still, and act.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcore.errors import InactiveSite
from peftcore.layers.fsdp import MANAGED, in_group
from peftcore.layers.pieces import is_cut
from peftcore.libraries.save_pretrained import saving_base
from peftcore.utils.journal import Journal

if TYPE_CHECKING:
    from peftcore.forward.state.host_state import HostState
    from peftcore.injection.injection import Injection
    from peftcore.surgery.surgeon import Graft
    from peftcore.targets.sites import Site

Step = tuple[dict[str, nn.Module | None], str, nn.Module]
"""The children of a module, the name of one, and that child: a step of the way from the model to an adapted module."""


class Placement:
    """The ways from the model to the modules of each injection that has acted, as they were last."""

    def __init__(self) -> None:
        self.ways: dict[str, list[Step]] = {}
        self.tables: dict[str, list[tuple[Site, torch.Size]]] = {}
        """The token tables of each injection, with the shapes that they had when it came: resizing changes these in
        place."""

    def expect(self, journal: Journal, name: str, grafts: Iterable[Graft]) -> None:
        """Remember the token tables at which a new injection acts."""
        sites = (site for graft in grafts for site in graft.holders if site.form in ("activation", "weight"))
        tables = [(each, each.layer.shape(each.module, each.tensor)) for each in sites if _is_table(each)]
        journal.put(self, "tables", name, tables)

    def check(self, model: nn.Module, state: HostState, acting: Iterable[str]) -> None:
        """Check that the modules of the named injections are still in the model, at their old place or at another.

        Raises:
            InactiveSite: a module is not in the model any more, a token table was resized, or a tensor was cut over
                processes (tensor parallelism) by code that does not gather it for the forward.
        """
        for name in acting:
            ways = self.ways.get(name)
            if ways is None or _changed(ways):
                self.ways[name] = list(_steps(model, state.injections[name]))
            if in_group():
                _check_whole(name, state.injections[name])
            for site, shape in self.tables.get(name, ()):
                if (now := site.layer.shape(site.module, site.tensor)) != shape:
                    raise InactiveSite(
                        f"{site.path}: resized from {list(shape)} to {list(now)} since {name!r} was applied, which "
                        "does not fit any more. Save and remove() it before the model is resized; then load it again"
                    )

    def forget(self, journal: Journal, name: str) -> None:
        """Forget the modules of a removed injection."""
        self.ways.pop(name, None)  # found again where it is missing
        journal.drop(self, "tables", name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "ways": {}}


def _check_whole(name: str, injection: Injection) -> None:
    """Check that an injection computes with whole tensors where it was made for whole ones."""
    for graft in injection.grafts:
        for site in graft.holders:
            held = site.module._parameters.get(site.tensor)
            if held is not None and is_cut(held) and not site.layer.in_pieces and MANAGED not in vars(site.module):
                raise InactiveSite(
                    f"{site.path}: cut over processes since {name!r} was applied. Save and remove() it before the "
                    "model is made tensor-parallel; then load it again, or apply it to that model"
                )


def _is_table(site: Site) -> bool:
    """Whether a site's tensor is a table by tokens. The layer of a tensor that is replaced does not say so."""
    return site.layer.one_hot or (site.form == "weight" and site.layer_of(site.module, site.tensor).one_hot)


def _changed(ways: list[Step]) -> bool:
    return any(children.get(key) is not child for children, key, child in ways)


def _steps(model: nn.Module, injection: Injection) -> Iterator[Step]:
    """Yields the steps to the injection's modules, each once.

    Raises:
        InactiveSite: some are not in the model.
    """
    modules = {site.module: site.path for graft in injection.grafts for site in graft.holders}
    with saving_base():  # operators are no target modules, and there may be many
        paths = {module: path for path, module in model.named_modules() if module in modules}
    if gone := [path for module, path in modules.items() if module not in paths]:
        shown = ", ".join(gone[:4]) + (" …" if len(gone) > 4 else "")
        raise InactiveSite(
            f"{shown}: replaced or taken out of the model since {injection.name!r} was applied, so the adapter does "
            "not act there. Save or merge it, and remove() it, before the model is changed; then apply or load it again"
        )
    seen: set[tuple[int, str]] = set()
    for path in paths.values():
        at = model
        for key in path.split(".") if path else ():
            child = at._modules[key]
            assert child is not None
            if (id(at), key) not in seen:
                seen.add((id(at), key))
                yield at._modules, key, child
            at = child
