"""A token stack as a site, for operators that add rows to its sequence. A token stack is a module that embeds token ids
and runs blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from peftcore.errors import UnsupportedSite
from peftcore.layers.layer import Layer
from peftcore.layers.pieces import whole
from peftcore.roles.stacks import TokenStack, arguments
from peftcore.targets.resolver import Resolver
from peftcore.targets.sites import Site

MASKING = frozenset({"attention_mask", "mask"})
"""Arguments that pass the padding mask to embeddings."""
FORM = "sequence"
ENTRY, BODY, READER = f"{FORM}.entry", f"{FORM}.body", f"{FORM}.reader"

NOWHERE = TokenStack("", "", "", "")


@dataclass(frozen=True, eq=False)
class SequenceSite(Site):
    """A token stack as a site. Its tensor is the token embedding table, so `out_features` is the width of an
    embedding."""

    stack: TokenStack = NOWHERE
    """The stack that embeds ids and runs blocks."""
    places: tuple[Site, ...] = ()
    """The other sites of the operator: the module that receives the embeddings, the module that contains all blocks,
    and the stacks that read this stack's output."""
    behind: bool = False
    """Whether the rows are inserted into the output of the embedding module, instead of into the input of the module
    that receives the embeddings."""

    @property
    def path(self) -> str:
        return f"{self.module_path}:{FORM}".lstrip(":")

    def behind_embeddings(self) -> SequenceSite:
        """Returns the site with `behind` set, so that rows are inserted after all embedding operations: positions,
        types and the norm.

        Raises:
            UnsupportedSite: the embeddings are not computed by a single module, or code outside the blocks would have
                to handle the rows.
        """
        name, below, _ = self.stack.table.partition(".")
        module = self.module.get_submodule(name)
        alone = not (self.stack.causal or self.stack.reads or self.stack.readers)
        if not below or not alone or MASKING & set(arguments(type(module))):
            raise UnsupportedSite(
                f"{self.module_path or 'the host'} cannot insert rows without positions after its embeddings: this "
                "needs an encoder without a decoder, in which one module computes the embeddings from ids alone"
            )
        path = f"{self.module_path}.{name}".lstrip(".")
        entry = Site(module, path, "", Layer(), form=ENTRY, meta=self.meta)
        others = tuple(place for place in self.places if place.form != ENTRY)
        return replace(self, stack=replace(self.stack, entry=path), places=(*others, entry), behind=True)

    def embedded(self, ids: Tensor) -> Tensor:
        """Returns the embeddings of token ids, scaled as the stack scales them. While planning, the result is on the
        meta device."""
        if self.meta:
            return torch.empty(*ids.shape, self.out_features, device="meta")
        table = self.module.get_submodule(self.stack.table)
        weight = whole(next(table.parameters()))  # of all processes, where they share it
        with torch.no_grad():
            embedded: Tensor = functional_call(table, {"weight": weight}, (ids.to(weight.device),))
        return embedded.detach()


def locate_stack(site: Site, resolver: Resolver) -> SequenceSite:
    """Returns the token stack at a site, as a `SequenceSite`.

    Raises:
        UnsupportedSite: the site is not a token stack.
    """
    stacks = {stack.path: stack for stack in resolver.token_stacks()}
    stack = stacks.get(site.module_path)
    if stack is None:
        known = ", ".join(map(repr, stacks)) or "none: it embeds no token ids, or does not only embed them"
        raise UnsupportedSite(
            f"{site.module_path or 'the host'} is not a stack of tokens; those of this host are {known}"
        )

    def place(path: str, form: str) -> Site:
        return Site(resolver.modules[path], path, "", Layer(), form=form, meta=site.meta)

    places = [place(path, READER) for path in stack.readers]
    if stack.entry != stack.path:
        places.append(place(stack.entry, ENTRY))
    if stack.body != stack.path and not stack.readers:
        places.append(place(stack.body, BODY))
    return SequenceSite(
        site.module,
        stack.path,
        f"{stack.table}.weight",
        site.layer_of(site.module.get_submodule(stack.table), "weight"),
        site.role,
        form=FORM,
        layer_of=site.layer_of,
        meta=site.meta,
        stack=stack,
        places=tuple(places),
    )
