"""Mixers, the modules that mix tokens (attention, state space), and the roles of their matrices.

Rules R3 to R7 of `docs/roles.md`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from peftcore.roles import vocabulary as V
from peftcore.roles.survey import Kind, Node, Ordered, Survey

MULTIHEAD_OPERANDS = {"in_proj_weight": "qkv", "q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v"}


@dataclass(slots=True, eq=False)
class Attention:
    """An attention, the operands (q, k, v) of its input matrices, and its outputs. For nn.MultiheadAttention there are
    no separate input matrices."""

    node: Node
    operands: dict[Node, str]
    outputs: list[Node] = field(default_factory=list)

    @property
    def width(self) -> int | None:
        """The width of the input. It is the input width of the query matrix, or without a query matrix, of the first
        matrix."""
        if self.node.kind is Kind.MHA:
            return int(getattr(self.node.module, "embed_dim", 0)) or None
        queries = self.queries or list(self.operands)
        return queries[0].fan_in if queries else None

    @property
    def queries(self) -> list[Node]:
        return [node for node, operand in self.operands.items() if operand.startswith("q")]

    @property
    def separate_query(self) -> bool:
        return "q" in self.operands.values()


class Mixers:
    """All token mixers of a host."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.ssm = [node for node in survey.nodes if is_state_space(node)]
        self.ssm_set = set(self.ssm)
        self.attentions = find_attentions(survey, self.ssm_set)
        self.by_node = {attention.node: attention for attention in self.attentions}
        self.nodes = Ordered([*self.by_node, *self.ssm])

    def attentions_under(self, top: Node) -> list[Attention]:
        return [self.by_node[node] for node in self.nodes.under(top) if node in self.by_node]

    def attention_around(self, node: Node) -> Attention | None:
        """Returns the attention at `node`, otherwise the nearest attention that contains `node`."""
        around = next((a for a in (node, *node.ancestors()) if a in self.by_node), None)
        return self.by_node[around] if around is not None else None

    def assign(self) -> None:
        all_body = not any(node.is_block for node in self.survey.nodes)
        for attention in self.attentions:
            if attention.node.kind is Kind.MHA:
                assign_multihead(attention, all_body)
            else:
                AttentionRoles(self.survey, attention).assign()
        for node in self.ssm:
            assign_state_space(node)


def is_state_space(node: Node) -> bool:
    """R5: whether a node is a state-space or gated-convolution mixer. Such a mixer has a depthwise Conv1d and at least
    two matrices as children."""
    if len(node.children) < 3 or not any(
        isinstance(child.module, nn.Conv1d) and child.module.groups == child.module.in_channels > 1
        for child in node.children
    ):
        return False
    return sum(child.kind is Kind.LINEAR for child in node.children) >= 2


def find_attentions(survey: Survey, ssm: set[Node]) -> list[Attention]:
    """R3, R4: returns the attentions of a host. A module is an attention if its matrices are called q, k and v, or if
    its class name says attention and a matrix in it is called v.

    Feed-forwards are left out, because gated MLPs often call their halves v and w.
    """
    groups: dict[Node, dict[Node, str]] = {}
    for node in survey.matrices:
        operand = V.operands(node.label.partition(".")[0])
        if operand and node.holder is not None and not V.is_feed_forward(node.holder.name.lower()):
            groups.setdefault(node.holder, {})[node] = operand
    found = []
    for holder, operands in groups.items():
        letters = set("".join(operands.values()))
        named = "v" in letters and V.ATTENTION_CLASS.search(holder.class_name)
        if holder not in ssm and (letters >= set("qkv") or named):
            found.append(Attention(holder, operands))
    return found + [Attention(node, {}) for node in survey.nodes if node.kind is Kind.MHA]


def is_cross(attention: Attention) -> bool:
    """R6: whether an attention is a cross-attention. If the module declares a flag, the flag decides. Otherwise it is
    one if its name says so, or if keys read another width than queries."""
    node = attention.node
    declared = getattr(node.module, "is_cross_attention", None)
    if declared is not None:
        return bool(declared)
    relative = node.below(node.block) if node.block is not None else node.name
    if V.CROSS.search(relative.lower()) or (V.CROSS_CLASS.search(node.class_name) and node.name != "attn1"):
        return True
    queries, keys = attention.queries, [key for key, operand in attention.operands.items() if operand == "k"]
    return len(queries) == len(keys) == 1 and queries[0].fan_in != keys[0].fan_in


def assign_multihead(attention: Attention, all_body: bool) -> None:
    """Assign the roles of nn.MultiheadAttention, whose parameters have fixed names. Outside of blocks it pools tokens
    (SigLIP's head), except in a host without blocks (a single nn.TransformerEncoderLayer).

    If a module next to it is called self_attn, this attention is the cross-attention (nn.TransformerDecoderLayer).
    """
    node = attention.node
    siblings = [child for child in node.parent.children if child.kind is Kind.MHA] if node.parent is not None else []
    beside_self = "self" not in V.words(node.name) and any("self" in V.words(child.name) for child in siblings)
    node.role = "cross" if beside_self or V.CROSS.search(node.name.lower()) else "attn"
    family = node.role if node.block is not None or all_body else "pool"
    for tensor in node.tensors:
        operand = MULTIHEAD_OPERANDS.get(tensor.name)
        tensor.role = f"{family}.{operand}" if operand else None
    for child in node.children:
        if child.name == "out_proj":
            child.role = f"{family}.out"


class AttentionRoles:
    """Assigns the roles of one attention, by the rules R4, R6 and R7."""

    def __init__(self, survey: Survey, attention: Attention) -> None:
        self.survey = survey
        self.attention = attention
        self.node = attention.node
        self.family = "cross" if is_cross(attention) else "attn"

    def assign(self) -> None:
        single_stream = False
        for node, operand in self.attention.operands.items():
            if operand == "qkv" and "mlp" in node.words:
                node.role, single_stream = "attn_mlp.in", True  # R10: one matrix makes q, k, v and the hidden MLP
                continue
            node.role = f"{self.family}.{self.operand_role(node, operand)}"
            node.context = bool(node.words & V.CONTEXT)
        scope, outputs = self.outputs()
        self.attention.outputs = outputs
        for node in outputs:
            node.context = bool(node.words & V.CONTEXT)
            node.role = "attn_mlp.out" if single_stream else f"{self.family}.out"
        module = scope if outputs and all(node.inside(scope) for node in outputs) else self.node
        module.role = self.family

    def operand_role(self, node: Node, operand: str) -> str:
        """R4: returns the role of an input matrix, without the family: q, kv, q_a and so on. If there is a separate
        query matrix, a matrix called qkv computes only k and v. The letters a and b mark the two factors of a low-rank
        pair."""
        if operand == "qkv" and self.attention.separate_query:
            operand = "kv"
        if operand in ("q", "kv"):
            return operand + next((f"_{half}" for half in "ab" if half in node.words), "")
        return operand

    def outputs(self) -> tuple[Node, list[Node]]:
        """R7: returns the module that contains the output matrices, and these matrices. An output matrix returns the
        width that the query reads, and is called out, proj, dense, o, ...

        In BERT the output matrix is one level above the attention (attention.self, attention.output), in SqueezeBERT
        next to the attention.
        """
        scope, block, parent = self.node, self.node.block, self.node.parent
        found = self.candidates(scope)
        outer = (block is not None and parent is not block) or self.node.name == "self"
        if not found and parent is not None and self.node is not block and outer:
            scope = parent
            found = self.candidates(scope)
        if not found and block is not None:
            beside = {"attention", "attn"}
            found = [
                node
                for node in self.survey.matrices.under(block)
                if node.role is None and node.words & beside and node.words & V.OUT
            ]
        width = self.attention.width
        fitting = [node for node in found if node.fan_out == width or node.words & V.CONTEXT] or found
        return scope, [node for node in fitting if node.words & V.OUT] or fitting[-1:]

    def candidates(self, scope: Node) -> list[Node]:
        return [
            node
            for node in self.survey.matrices.under(scope)
            if node.role is None
            and not V.words(node.below(scope)) & V.POSITION
            and not V.is_feed_forward(node.below(scope))
        ]


def assign_state_space(mixer: Node) -> None:
    """R5: assign the roles ssm.in, ssm.conv, ssm.x, ssm.dt and ssm.out by name. The matrices q, k and v of linear
    attention (Qwen3-Next) get the roles attn.q, attn.k and attn.v. If there is a q, the output matrix is attn.out."""
    mixer.role = "ssm"
    attends = any(V.operands(child.name) == "q" for child in mixer.children)
    for child in mixer.children:
        if child.kind not in (Kind.LINEAR, Kind.CONV):
            continue
        operand = V.operands(child.name)
        if isinstance(child.module, nn.Conv1d):
            child.role = "ssm.conv"
        elif operand in ("q", "k", "v"):
            child.role = f"attn.{operand}"
        elif V.words(child.name) & {"out", "o"}:
            child.role = "attn.out" if attends else "ssm.out"
        else:
            first = V.tokens(child.name)[:1]
            child.role = f"ssm.{first[0]}" if first in (("x",), ("dt",)) else "ssm.in"
