"""The static rules that derive the host map of a model, in one walk over its modules: no forward runs, and no weights
are read.

`docs/roles.md` describes the rules, R1 to R17.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import chain

from torch import nn

from peftcore.roles.embeddings_norms_heads import Rest
from peftcore.roles.entries import HostEntry, Layout
from peftcore.roles.hostmap import HostMap, moved
from peftcore.roles.layouts import logical_shape, static_layout
from peftcore.roles.mixers import Mixers
from peftcore.roles.mlps import FeedForwards
from peftcore.roles.repeated_blocks import Blocks
from peftcore.roles.stacks import find
from peftcore.roles.survey import Kind, Node, Survey
from peftcore.roles.towers import Towers, layers
from peftcore.roles.vocabulary import FUSED_ROLES, OTHER
from peftcore.roles.weight_readers import reader_of


def derive(model: nn.Module) -> HostMap:
    """Returns the host map: the roles of all modules and bare parameters, derived from structure and names.

    The order of the steps matters: mixers make blocks recognizable, blocks bound the search for feed-forward branches,
    and the other modules are classified by their place relative to mixers, blocks and branches.
    """
    with closing(Survey(model)) as survey:
        entries = judged(survey)
        if not are_told_apart(survey, entries):
            return HostMap(tuple(unfolded(survey.root, entries)))
    with closing(Survey(model, each=True)) as survey:
        return HostMap(tuple(unfolded(survey.root, judged(survey))))


Entries = list[list[HostEntry]]
"""The list of entries of each node, by the node's number."""


def judged(survey: Survey) -> Entries:
    """Returns the entries of each node, found by applying all rules."""
    mixers = Mixers(survey)
    blocks = Blocks(survey, mixers)
    mixers.assign()
    mlps = FeedForwards(survey, mixers, blocks)
    mlps.assign()
    Rest(survey, mixers, blocks, mlps).assign()
    towers = Towers(survey, blocks).of(survey)
    layer_of = layers(blocks)
    entries: Entries = []
    for node in survey.nodes:
        entries.append([])
        roles = (["block"] if node.is_block else []) + ([node.role] if node.role else [])
        for role in roles or [OTHER]:
            layout = static_layout(node, mixers.attention_around(node)) if role in FUSED_ROLES else None
            layer = layer_of[node.block] if node.block is not None else None
            entries[-1].append(entry_of(node, role, towers[node.index], layer, layout))
    return with_stacks(survey, entries)


def with_stacks(survey: Survey, entries: Entries) -> Entries:
    """Returns the entries, with the role "stack" for modules that take token ids, or "stack.decoder" if the module
    reads another stack. The tensor of these entries is the token table."""
    modules = {node.path: node.module for node in survey.nodes if node.tensor is None}
    stacks = {stack.path: stack for stack in find(modules, chain.from_iterable(entries))}
    return [
        [
            replace(entry, role=stacks[entry.path].role, tensor=f"{stacks[entry.path].table}.weight")
            if entry.role == OTHER and entry.path in stacks
            else entry
            for entry in each
        ]
        for each in entries
    ]


def are_told_apart(survey: Survey, entries: Entries) -> bool:
    """Whether the rules gave different roles to two list elements of equal structure, of which the second represents
    the elements after it. Then the represented elements may have different roles too (for example matrices of one shape
    that alternate between two roles)."""
    for node in survey.nodes:
        if node.twins and node.parent is not None:
            before = node.parent.children[node.parent.children.index(node) - 1]
            here, there = (list(chain.from_iterable(entries[n.index : n.end])) for n in (node, before))
            if here != list(moved(there, before.path, [node.name])):
                return True
    return False


def unfolded(node: Node, entries: Entries) -> list[HostEntry]:
    """Returns the entries of a node and of all nodes below it. If a node represents further list elements, their
    entries are included."""
    found = entries[node.index].copy()
    for below in (*node.tensors, *node.children):
        inside = unfolded(below, entries)
        found += inside
        if below.twins:
            found += moved(inside, below.path, below.twins)
    return found


def entry_of(node: Node, role: str, tower: str, layer: int | None, layout: Layout | None) -> HostEntry:
    (module, tensor), reader = owner(node), reader_of(node)
    return HostEntry(
        path=node.path,
        module=module,
        tensor=tensor,
        role=role,
        stream="context" if node.context else "main",
        tower=tower,
        block=node.block.path if node.block is not None else None,
        layer=layer,
        layout=layout,
        called=tensor is None and reader is None,
        reader=reader,
        kind=node.kind.value,
        shape=logical_shape(node),
        among_experts=any(each.lists_experts for each in node.ancestors()),
    )


def owner(node: Node) -> tuple[str, str | None]:
    """Returns the path of the module that uses a node's weight, and the weight's name in that module. The name is None
    for the module's plain `weight`."""
    parent = node.parent
    if parent is not None and node.tensor is not None:
        return parent.path, node.tensor
    if parent is not None and parent.kind is Kind.MHA and node.name == "out_proj":
        return parent.path, "out_proj.weight"
    return node.path, None
