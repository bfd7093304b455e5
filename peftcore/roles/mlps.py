"""Feed-forward branches: up and down matrices, gates, stacks of experts and their router.

Rules R9 to R11 of `docs/roles.md`.
"""

from __future__ import annotations

from torch import nn

from peftcore.roles import vocabulary as V
from peftcore.roles.mixers import Mixers
from peftcore.roles.repeated_blocks import Blocks
from peftcore.roles.survey import Kind, Node, Ordered, Survey


class FeedForwards:
    """Assigns the roles of all feed-forward branches. It runs after `Mixers`, so matrices of mixers have roles
    already."""

    def __init__(self, survey: Survey, mixers: Mixers, blocks: Blocks) -> None:
        self.survey = survey
        self.mixers = mixers
        self.blocks = blocks

    def assign(self) -> None:
        for node in self.survey.nodes:
            if node.kind is Kind.EXPERTS:
                self._assign_experts(node)
        for scope in self._scopes():
            Pairing(self, scope).assign()
        for node in self.survey.nodes:
            if isinstance(node.module, nn.ModuleList | nn.ModuleDict):
                self._assign_listed_experts(node)

    def _scopes(self) -> list[Node]:
        """Returns the modules in which feed-forwards are searched: all blocks, and attentions outside of blocks with
        their parents (pooling heads have an MLP too)."""
        lone = [attention.node for attention in self.mixers.attentions if attention.node.block is None]
        around = {node.parent for node in lone if node.parent is not None and node.parent.block is None}
        return [*self.blocks.blocks, *Ordered({*lone, *around})]

    def width(self, scope: Node) -> int | None:
        """Returns the width of the residual stream. It is the width of a mixer's input, or without a mixer, the width
        of the first norm of the scope."""
        for attention in self.mixers.attentions_under(scope):
            if attention.width and attention.node.kind is not Kind.MHA:
                return attention.width
        for mixer in self.mixers.nodes.under(scope):
            if mixer not in self.mixers.by_node:
                first = self.survey.matrices.first(mixer)
                return first.fan_in if first else None
        own_norm = next((child for child in scope.children if child.kind is Kind.NORM), None)
        return own_norm.shape[0] if own_norm else None

    def _assign_experts(self, node: Node) -> None:
        """R11: assign the roles of the parameters of stacked experts, by name. Stacked experts inside an attention are
        its query and output matrices (JetMoe)."""
        whole = [node] if node.shape else []
        in_attention = self.mixers.attention_around(node) is not None
        for tensor in [*whole, *node.tensors]:
            if "bias" in tensor.name:
                continue
            part = expert_part(tensor)
            tensor.role = f"experts.{part}" if not in_attention else "attn.q" if part == "gate_up" else "attn.out"
        self._assign_router(node, expert_count(node))

    def _assign_listed_experts(self, node: Node) -> None:
        """R11: assign the roles of a mixture of experts that is a list of MLPs (Switch). A matrix next to the list,
        with one output for each MLP, is its router."""
        experts = [child for child in node.children if child.children]  # NLLB has a dropout among them
        branch, count = node.parent, sum(1 + len(child.twins) for child in experts)
        if branch is None or branch.is_block or count < 2 or any(child.role != "mlp" for child in experts):
            return
        for matrix in self.survey.matrices.under(branch):
            if matrix.fan_out == count and matrix.role is None:
                matrix.role = "router"
                branch.role = branch.role or "mlp"
                node.lists_experts = True

    def _assign_router(self, node: Node, count: int | None) -> None:
        """R11: assign the role of the router, which is a matrix next to the experts with one output for each expert.
        The router and the experts form one MLP branch."""
        for scope in node.ancestors():
            if scope is node.block or not scope.path:
                return
            beside = [m for m in self.survey.matrices.under(scope) if m.kind is Kind.LINEAR and m.fan_out == count]
            if beside:
                break
        else:
            return
        if self.mixers.attention_around(scope) is None and scope.role is None:
            scope.role = "mlp"
        for matrix in beside:
            if V.words(matrix.below(scope)) & {"gate", "router"}:
                matrix.role = "router"


def expert_part(tensor: Node) -> str:
    """Returns which part of the experts a stacked tensor is, by its name: "gate_up", "gate", "up" or "down". In DBRX,
    w1 is the gate, v1 the up and w2 the down part."""
    named, name = V.words(tensor.name), tensor.name
    if named >= {"gate", "up"} or (tensor.tensor is None and "input" in named):
        return "gate_up"
    if named & {"down", "output"} or name == "w2":
        return "down"
    return "gate" if "gate" in named or name == "w1" else "up"


def expert_count(node: Node) -> int | None:
    stacks = [tensor.shape for tensor in node.tensors if len(tensor.shape) == 3] + [node.shape]
    if len(stacks[0]) == 3:
        return stacks[0][0]
    return getattr(node.module, "num_experts", None) or getattr(node.module, "moe_num_experts", None)


class Pairing:
    """Pairs the up and down matrices of feed-forwards in one block, by the rules R9 and R10. An up matrix reads the
    width h of the residual stream, a down matrix returns it. Their inner widths are equal, or the up matrix has twice
    the width because it includes a gate."""

    def __init__(self, owner: FeedForwards, scope: Node) -> None:
        self.owner = owner
        self.scope = scope
        self.width = owner.width(scope)
        self.mixers = [node for node in owner.mixers.nodes.under(scope) if node is not scope]
        survey = owner.survey
        self.convolutional = any(node.fan is None for node in survey.convs.under(scope))
        self.free = Ordered(node for node in survey.matrices.under(scope) if self._is_free(node))
        groups: dict[tuple[int, int], list[Node]] = {}
        for node in self.free:
            groups.setdefault((node.fan_in, node.fan_out), []).append(node)
        self.by_fan = {fan: Ordered(nodes) for fan, nodes in groups.items()}

    def _is_free(self, node: Node) -> bool:
        """Whether a matrix is still without a role, is outside side networks and norms, and is outside the mixers
        unless the name says feed-forward.

        In convolutional blocks 1x1 convolutions are steps of the convolution, so there the name must say feed-forward,
        too.
        """
        if node.role is not None:
            return False
        relative = node.below(self.scope)
        components = relative.split(".")
        if V.words(relative) & (V.POSITION | V.CONDITION) or any("norm" in component for component in components[:-1]):
            return False
        if any(V.is_feed_forward(component) for component in components):
            return True
        if any(node.inside(mixer) for mixer in self.mixers):
            return False
        return not self.convolutional or node.kind is Kind.LINEAR

    def assign(self) -> None:
        for down, ups, scope in self._plan():
            free_ups = [up for up in ups if up.role is None]
            exact = [up for up in free_ups if up.fan_out == down.fan_in]
            if free_ups and down.role is None:
                self._assign_pair(down, exact or free_ups, scope)
        self._assign_single_stream()

    def _plan(self) -> list[tuple[Node, list[Node], Node]]:
        """Returns the pairs to assign, each as a down matrix, its up matrices and the module around both. Pairs with
        the nearest common module are first, then exact widths before fused ones, then the order of registration
        counts."""
        plan = []
        for down in self.free:
            if down.fan_in == down.fan_out and down.words & (V.GATE | V.UP):
                continue  # of square matrices the shapes say nothing
            groups = [self.by_fan[fan] for fan in self._fans_of_ups(down) if fan in self.by_fan]
            ups, scope = self._nearest(down, groups)
            if ups:
                fused = all(up.fan_out != down.fan_in for up in ups)
                plan.append((-scope.depth, fused, down.index, down, ups, scope))
        return [entry[3:] for entry in sorted(plan, key=lambda entry: entry[:3])]

    def _nearest(self, down: Node, groups: list[Ordered]) -> tuple[list[Node], Node]:
        """Returns the up matrices in the nearest module around `down` that contains any, and that module. If `down` is
        square, only up matrices that were registered before it count."""
        square = down.fan_in == down.fan_out
        for scope in down.ancestors() if groups else ():
            ups = [up for group in groups for up in group.under(scope) if not square or up.index < down.index]
            if ups or scope is self.scope:
                return sorted(ups, key=lambda up: up.index), scope
        return [], self.scope

    def _fans_of_ups(self, down: Node) -> list[tuple[int, int]]:
        """R9: returns the widths (in, out) of matrices that can be the up matrix of `down`. An up matrix reads the
        width that `down` returns. It returns the width that `down` reads, or twice that width (gate and up in one
        matrix).

        If each of two matrices fits as the up matrix of the other, the one that reads the width h of the residual
        stream is the up matrix. If neither reads h, it is the one that widens.
        """
        inner, outer = down.fan_in, down.fan_out
        fans = [(outer, 2 * inner)]
        if inner == outer or (outer == self.width if self.width in (inner, outer) else inner > outer):
            fans.append((outer, inner))
        return fans

    def _assign_pair(self, down: Node, ups: list[Node], scope: Node) -> None:
        """Assign the roles of a down matrix and its up matrices. Of two up matrices, the one named gate is the gate. If
        neither is, the first one is the gate, because 42 of 42 surveyed pairs register the gate first."""
        down.role = "mlp.down"
        gates = [up for up in ups if up.words & V.GATE] or (ups[:1] if len(ups) == 2 else [])
        for up in ups:
            if up.fan_out == 2 * down.fan_in:
                up.role = "mlp.gate_up"
            else:
                up.role = "mlp.gate" if len(ups) == 2 and up in gates else "mlp.up"
        while isinstance(scope.module, nn.ModuleList) and scope is not self.scope and scope.parent is not None:
            scope = scope.parent
        if scope is not self.scope and scope.role is None:
            scope.role = "mlp"

    def _assign_single_stream(self) -> None:
        """R10: assign the roles in blocks whose attention has no output matrix. There, a matrix next to the attention
        reads the attention's output together with the hidden features of the MLP (Flux)."""
        matrices = self.owner.survey.matrices
        if all(any((m.role or "").endswith("out") for m in matrices.under(mixer)) for mixer in self.mixers):
            return
        for down in self.free:
            for up in self.free:
                reads_both = down.fan_in > up.fan_out > (self.width or 0)
                fits = up.fan_in == down.fan_out == self.width and reads_both
                if up.role is None and down.role in (None, "attn_mlp.out") and fits:
                    down.role, up.role = "attn_mlp.out", "mlp.up"
