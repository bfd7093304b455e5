"""Roles of the modules that are neither mixers nor feed-forwards: embeddings, norms, patches, modulation, convolutions,
heads.

Rules R12 to R14 of `docs/roles.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from peftcore.roles import vocabulary as V
from peftcore.roles.mixers import Mixers
from peftcore.roles.mlps import FeedForwards
from peftcore.roles.repeated_blocks import Blocks
from peftcore.roles.survey import Kind, Node, Survey

# A lone r marks a relative parameter in an operand's name, and nothing elsewhere.
POSITION = V.POSITION - {"r"}


@dataclass(slots=True)
class NodeFacts:
    """The facts about a node that the rules below use."""

    node: Node
    relative: frozenset[str]  # words of the path within the block, or of the whole path
    before: bool  # before the first block of the nearest ancestor that holds blocks
    after: bool  # after the last one
    in_element: bool  # strictly under an element of a list of modules
    in_stage: bool  # ... that holds blocks
    in_head: bool  # in what the host declares to be its head
    under_norm: bool  # under something named norm, so no norm itself (adaLN's linear)


class Rest:
    """Assigns a role to every weight that does not have one yet."""

    def __init__(self, survey: Survey, mixers: Mixers, blocks: Blocks, mlps: FeedForwards) -> None:
        self.survey = survey
        self.mixers = mixers
        self.blocks = blocks
        self.mlps = mlps
        self.inputs, self.heads = survey.inputs, survey.heads
        self.input_weights = {id(m.weight) for m in self.inputs if isinstance(getattr(m, "weight", None), nn.Parameter)}
        self.root_matrices = [m for m in survey.matrices if m.parent is survey.root]
        self._elements = set(blocks.elements)
        self._mlp_nodes = {node for node in survey.nodes if node.role == "mlp"}
        self._spans: dict[Node, tuple[int, int]] = {}

    def assign(self) -> None:
        for place in self._places():
            place.node.role = _RULES[place.node.kind](self, place)
        self._longest_table()
        self._mark_context()

    # Places: facts inherited from above are carried down in the order of the walk.

    def _places(self) -> Iterator[NodeFacts]:
        """Yields the nodes that still need a role, with the facts that they inherit from above."""
        inherited: list[tuple[bool, bool, bool, bool]] = []
        for node in self.survey.nodes:
            in_element = in_stage = in_head = under_norm = False
            if node.parent is not None:
                in_element, in_stage, in_head, under_norm = inherited[node.parent.index]
                if node.parent in self._elements:
                    in_element = True
                    in_stage = in_stage or self.blocks.blocks.count(node.parent) > 0
                under_norm = not node.parent.is_block and (under_norm or "norm" in node.parent.name)
            in_head = in_head or node.module in self.heads
            inherited.append((in_element, in_stage, in_head, under_norm))
            if node.role is None and node.kind in _RULES:
                first, last = self._span(node)
                before, after = node.index < first, node.index > last
                relative = V.words(node.below(node.block))
                yield NodeFacts(node, relative, before, after, in_element, in_stage, in_head, under_norm)

    def _span(self, node: Node) -> tuple[int, int]:
        """Returns the numbers of the first and last block under the nearest ancestor that contains blocks."""
        parent = node.parent
        if parent is None:
            return len(self.survey.nodes), -1
        if parent not in self._spans:
            first, last = self.blocks.blocks.first(parent), self.blocks.blocks.last(parent)
            self._spans[parent] = (first.index, last.index) if first and last else self._span(parent)
        return self._spans[parent]

    def _tensor(self, place: NodeFacts) -> str | None:
        """R12: returns "embed.pos" for a bare parameter that is named for positions, otherwise None."""
        return "embed.pos" if V.words(place.node.name) & POSITION else None

    def _table(self, place: NodeFacts) -> str:
        """R12: returns the role of a table. Tables of positions and segments are recognized by name. A table of words
        is one that the host declares, one that shares the parameter of a declared table (T5 and BART declare a table
        that is never called), or one that is named for words.
        """
        node = place.node
        if node.words & POSITION:
            return "embed.pos"
        if node.words & V.SEGMENT:
            return "embed.type"
        shared = id(getattr(node.module, "weight", None)) in self.input_weights
        return "embed" if node.module in self.inputs or shared or node.words & V.WORD else V.OTHER

    def _norm(self, place: NodeFacts) -> str:
        """R13: returns the role of a norm. Inner norms act on a part of a mixer or MLP. Outside of the blocks, name and
        order distinguish embedding norms from final norms.
        """
        node = place.node
        if self._is_inner(node):
            return "norm.inner"
        in_part = place.in_element and place.in_stage
        if node.block is not None or not len(self.blocks.blocks) or in_part or self._is_resampling(place):
            return "norm"
        if V.words(node.name) & V.LATE:
            return "norm.final"
        return "norm.embed" if place.before or place.relative & V.EARLY else "norm.final"

    def _is_inner(self, node: Node) -> bool:
        """Whether a norm acts on a part of a mixer or MLP. In a state-space mixer every norm does. In an MLP, a norm
        does if its width is not that of the residual stream. In an attention, a norm does if it is named for q, k or v,
        if no operand reads its width, or if it is paired with an operand's matrix (the linear layers and batch norms of
        LeViT)."""
        above = list(node.ancestors())
        width = node.shape[0]
        if any(ancestor in self.mixers.ssm_set for ancestor in above):
            return True
        if any(ancestor in self._mlp_nodes for ancestor in above):
            residual = self.mlps.width(node.block if node.block is not None else self.survey.root)
            if width != residual:
                return True
        attentions = [self.mixers.by_node[a] for a in above if a in self.mixers.by_node]
        if not attentions:
            return False
        if V.words(node.name) & (V.QUERY | V.KEY | V.VALUE | V.KEY_VALUE):
            return True
        read = {matrix.fan_in for attention in attentions for matrix in attention.operands}
        return width not in read or self._is_paired(node)

    def _is_paired(self, node: Node) -> bool:
        pair = node.parent
        if pair is None or pair in self.mixers.by_node:
            return False
        return any(
            matrix.parent is pair and matrix.holder is not pair and (matrix.role or "").startswith(("attn.", "cross."))
            for matrix in self.survey.matrices.under(pair)
        )

    def _weight(self, place: NodeFacts) -> str:
        """R14: returns the role of the first description that fits. The most specific names are tried first, and the
        place alone last."""
        node = place.node
        for fits, role in (
            (self._is_resampling, "down"),
            (self._is_patch, "patch"),
            (self._is_position, "pos.proj" if node.kind is Kind.LINEAR and node.block else "embed.pos"),
            (self._is_excitation, "se"),
            (self._is_router, "router"),
            (self._is_modulation, V.OTHER if "emb" in node.below(node.block).split(".") else "mod"),
            (self._is_convolution, "conv"),
            (self._is_stem, "patch"),
            (self._is_inner_other, V.OTHER),
            (self._is_declared_head, "head" if node.fan else V.OTHER),
            (self._is_token_embedder, "patch"),
            (self._is_head, "head"),
        ):
            if fits(place):
                return role
        return V.OTHER

    def _is_resampling(self, place: NodeFacts) -> bool:
        """Whether a weight is part of a change of resolution. Either its name says so, or it is named for merging or
        reduction and meets one of two conditions: it has a stride; or it is between stages, reads the features of
        several patches at once and reduces the number of features."""
        if not place.relative & V.MAY_RESAMPLE:
            return bool(place.relative & V.RESAMPLE)
        if place.relative & V.RESAMPLE:
            return True
        node = place.node
        named = next(each for each in (node, *node.ancestors()) if V.words(each.name) & V.MAY_RESAMPLE)
        within = [*self.survey.matrices.under(named), *self.survey.convs.under(named)]
        between = place.in_stage or not place.after or bool(V.words(node.path) & V.PATCH)
        merges = node.block is None and between and any(each.fan_in > each.fan_out for each in within)
        return merges or any(max(getattr(each.module, "stride", (1,))) > 1 for each in within)

    def _is_patch(self, place: NodeFacts) -> bool:
        """Whether a weight before the blocks is a convolution with equal kernel and stride, or the projection of a
        patch embedding."""
        node = place.node
        stride, kernel = getattr(node.module, "stride", (1,)), getattr(node.module, "kernel_size", ())
        tiles = node.kind is Kind.CONV and max(stride) > 1 and tuple(kernel) == tuple(stride)
        named = node.parent is not None and V.PATCH_CLASS.search(node.parent.class_name) and node.name == "proj"
        return node.block is None and place.before and bool(tiles or named)

    def _is_position(self, place: NodeFacts) -> bool:
        return bool(place.relative & POSITION)

    def _is_excitation(self, place: NodeFacts) -> bool:
        return place.node.block is not None and "se" in place.relative

    def _is_router(self, place: NodeFacts) -> bool:
        return "router" in place.relative

    def _is_modulation(self, place: NodeFacts) -> bool:
        """Whether a matrix computes scales and shifts from a time or a condition. Its name shows it, or a norm contains
        the matrix (adaLN)."""
        node = place.node
        if node.kind is not Kind.LINEAR:
            return False
        in_embedder = "embed" in " ".join(V.tokens(node.path))
        named = node.words & V.MODULATION and (node.block is not None or not in_embedder) and "proj" not in node.words
        timed = node.block is not None and "time" in node.words
        return bool(named or timed or place.under_norm)

    def _is_convolution(self, place: NodeFacts) -> bool:
        node = place.node
        first = node is self.survey.convs.nodes[0] if len(self.survey.convs) else False
        return node.kind is Kind.CONV and (node.block is not None or (not len(self.blocks.blocks) and not first))

    def _is_stem(self, place: NodeFacts) -> bool:
        """Whether a convolution computes the first features. Such a convolution is before the blocks, and has a stride
        or is outside of all stages."""
        node = place.node
        if node.kind is not Kind.CONV or not place.before or place.in_head or "neck" in place.relative:
            return False
        return max(getattr(node.module, "stride", (1,))) > 1 or not place.in_stage

    def _is_inner_other(self, place: NodeFacts) -> bool:
        return place.node.block is not None or place.in_stage

    def _is_declared_head(self, place: NodeFacts) -> bool:
        return place.in_head

    def _is_token_embedder(self, place: NodeFacts) -> bool:
        return place.node.kind is Kind.LINEAR and V.words(place.node.name) >= {"embedder", "x"}

    def _is_head(self, place: NodeFacts) -> bool:
        """Whether a matrix is a head. A head is near the root and after the last block. It is named for a head, or is
        the last matrix that is a child of the root."""
        node = place.node
        named = V.words(node.name) & V.HEAD
        last = node.kind is Kind.LINEAR and bool(self.root_matrices) and node is self.root_matrices[-1]
        return place.after and node.depth <= 2 and not V.words(node.path) & V.NO_HEAD and (bool(named) or last)

    def _longest_table(self) -> None:
        """R12: if the word embedding is neither declared nor recognized by name, it is the longest table whose path
        contains "embedding"."""
        if any(node.role == "embed" for node in self.survey.nodes):
            return
        tables = [n for n in self.survey.nodes if n.kind is Kind.TABLE and n.role == V.OTHER and "embedding" in n.path]
        if tables:
            max(tables, key=lambda node: node.shape[0]).role = "embed"

    def _mark_context(self) -> None:
        """Mark the nodes of the second stream. In a block with a second stream, these are all nodes that are named for
        it (ff_context, norm_added_q)."""
        double = {node.block for node in self.survey.matrices if node.context and node.block is not None}
        for block in double:
            for node in self.survey.nodes[block.index : block.end]:
                node.context = node.context or bool(V.words(node.below(block)) & V.CONTEXT_BRANCH)


_RULES: dict[Kind, Callable[[Rest, NodeFacts], str | None]] = {
    Kind.TENSOR: Rest._tensor,
    Kind.TABLE: Rest._table,
    Kind.NORM: Rest._norm,
    Kind.LINEAR: Rest._weight,
    Kind.CONV: Rest._weight,
}
