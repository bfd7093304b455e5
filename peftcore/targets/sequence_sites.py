"""A stack of tokens as a site, for operators that add rows to its sequence."""

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
    """A stack; its tensor is the token table, so `out_features` is the width of a row."""

    stack: TokenStack = NOWHERE
    """The stack that embeds ids and runs blocks."""
    places: tuple[Site, ...] = ()
    """The other sites of the operator: the module that gets the embeddings, the module after the last block, and
    modules that read the stack's output."""
    behind: bool = False
    """Whether the rows are inserted in front of the output of the module that gets the embeddings, instead of its
    input."""

    @property
    def path(self) -> str:
        return f"{self.module_path}:{FORM}".lstrip(":")

    def behind_embeddings(self) -> SequenceSite:
        """Returns the stack as a site of rows that are inserted after all embedding operations of the tokens:
        positions, types and the norm.

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
        """Returns the stack's embeddings of ids, with the stack's scaling; while planning, a tensor without values."""
        if self.meta:
            return torch.empty(*ids.shape, self.out_features, device="meta")
        table = self.module.get_submodule(self.stack.table)
        weight = whole(next(table.parameters()))  # of all processes, where they share it
        with torch.no_grad():
            embedded: Tensor = functional_call(table, {"weight": weight}, (ids.to(weight.device),))
        return embedded.detach()


def locate_stack(site: Site, resolver: Resolver) -> SequenceSite:
    """Returns the stack at a site.

    Raises:
        UnsupportedSite: the site is not a stack.
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
