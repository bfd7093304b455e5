"""The order of slices in fused projections, found without a forward.

Every fused attention layout has one form: G groups, each a sequence of parts with their widths. ``[q|k|v]`` is one
group, GPT-NeoX has one group for each head, Falcon one for each key-value head. Most modules declare the form by a
flag, by widths, or by a name such as query_key_value. The few other modules are listed below by the package that
defines their class. If the form is unknown, the layout is None: a probe can find it, while a guess could silently adapt
the wrong slices.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from torch import nn

from peftcore.layers.detect import stacked_transposed
from peftcore.roles import vocabulary as V
from peftcore.roles.entries import Layout
from peftcore.roles.mixers import Attention
from peftcore.roles.survey import Kind, Node

HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
KEY_VALUE_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "kv_n_heads")
HEAD_WIDTH = ("head_dim", "head_size", "dim_head", "attention_head_size")

#: Packages whose plain fused projections were surveyed: contiguous unless the module says otherwise.
SURVEYED = ("transformers.", "timm.", "diffusers.")

# Classes (module and name, as prefixes) that read their slices in an order which no attribute tells.
QVK_IN_FOUR = ("transformers.models.codegen.",)  # cut for tensor parallelism over four devices
PER_HEAD = ("transformers.models.minimax.",)  # lightning attention
UP_FIRST = (
    "diffusers.models.activations.",
    "diffusers.models.transformers.sana_",
    "diffusers.models.transformers.transformer_sana_",
    "diffusers.models.transformers.transformer_stable_audio3.",
    "transformers.models.moonshine",
    "transformers.models.clvp.",
    "transformers.models.phi4_multimodal.modeling_phi4_multimodal.Phi4MultimodalAudio",
    "transformers.models.aya_vision.",
    "transformers.models.cohere2_vision.",
)
GATE_FIRST = ("transformers.", "diffusers.models.transformers.transformer_flux2.")


def static_layout(node: Node, attention: Attention | None) -> Layout | None:
    """Returns the layout of a matrix with a known role; None if the matrix is not fused or the order of parts is
    unknown."""
    _, _, part = (node.role or "").partition(".")
    if part == "gate_up":
        return gate_up(node)
    if node.role == "attn_mlp.in":
        return single_stream(node)
    if attention is None or part not in ("qkv", "kv", "kv_b", "q_b"):
        return None
    rules = {"qkv": query_key_value, "kv": key_value, "kv_b": latent_key_value, "q_b": whole_query}
    return rules[part](node, attention)


@lru_cache(maxsize=4096)
def grouped(groups: int, parts: tuple[tuple[str, int], ...]) -> Layout:
    """Returns the layout in which the parts with their widths are repeated `groups` times."""
    size = sum(width for _, width in parts)
    slices: dict[str, list[tuple[int, int]]] = {name: [] for name, _ in parts}
    for group in range(groups):
        start = group * size
        for name, width in parts:
            ranges = slices[name]
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], start + width)
            else:
                ranges.append((start, start + width))
            start += width
    return Layout(tuple((name, tuple(ranges)) for name, ranges in slices.items()))


def query_key_value(node: Node, attention: Attention) -> Layout | None:
    """Returns the layout of a q, k, v matrix: a declared form if there is one, else the contiguous form with
    grouped-query widths."""
    total, told = node.fan_out, Told(attention)
    if attention.node.kind is Kind.MHA:
        return thirds(node.shape[0])
    if told.defined_in(QVK_IN_FOUR):
        width = total // 12
        return grouped(4, (("q", width), ("v", width), ("k", width)))
    heads, query_width, key, value = told.heads, told.query_width, told.width("key_dim"), told.width("val_dim")
    if key and value:  # LeViT, TinyViT: values are wider than keys
        return per_head(told, total, (("q", key), ("k", key), ("v", value)))
    if heads is None or query_width is None or query_width % heads:
        return thirds(total) if query_width is not None and total == 3 * query_width else None
    head = query_width // heads
    if told.flag("new_decoder_architecture"):
        return by_key_value_group(told, total, head)
    if told.flag("multi_query"):
        return grouped(1, (("q", query_width), ("k", head), ("v", head))) if total == query_width + 2 * head else None
    spelled = {"query", "key", "value"} <= node.words
    if told.flag("head_first") or told.flag("multi_query") is False or spelled or told.defined_in(PER_HEAD):
        return per_head(told, total, (("q", head), ("k", head), ("v", head)))
    return contiguous(told, total, query_width, head)


def thirds(total: int) -> Layout:
    return grouped(1, (("q", total // 3), ("k", total // 3), ("v", total // 3)))


def by_key_value_group(told: Told, total: int, head: int) -> Layout | None:
    groups, heads = told.key_value_heads, told.heads
    if groups is None or heads is None or heads % groups or total != (heads + 2 * groups) * head:
        return None
    return grouped(groups, (("q", heads // groups * head), ("k", head), ("v", head)))


def per_head(told: Told, total: int, parts: tuple[tuple[str, int], ...]) -> Layout | None:
    """Returns a layout with one group for each head. A matrix for a single head has one group (cascaded attention).
    None if the sizes do not fit."""
    size = sum(width for _, width in parts)
    groups = total // size
    return grouped(groups, parts) if total % size == 0 and groups in (told.heads, 1) else None


def contiguous(told: Told, total: int, query_width: int, head: int) -> Layout | None:
    """Returns the layout [q|k|v]. Fewer key-value heads than query heads must be declared, because two-part matrices
    look the same (GCViT's [k|v])."""
    if total == 3 * query_width:
        return thirds(total)
    declared = told.key_value_heads
    if declared is None or total != query_width + 2 * declared * head or not told.defined_in(SURVEYED):
        return None
    width = declared * head
    return grouped(1, (("q", query_width), ("k", width), ("v", width)))


def key_value(node: Node, attention: Attention) -> Layout | None:
    """Returns the layout [k|v] in halves; if the module declares two widths, one [k|v] for each head (LeViT)."""
    total, told = node.fan_out, Told(attention)
    if told.width("key_dim") and told.width("val_dim"):
        return per_head(told, total, (("k", told.width("key_dim")), ("v", told.width("val_dim"))))
    return grouped(1, (("k", total // 2), ("v", total // 2))) if total % 2 == 0 else None


def latent_key_value(node: Node, attention: Attention) -> Layout | None:
    """Returns the layout of multi-head latent attention: for each head the key without position, then the value."""
    told = Told(attention)
    key, value = told.width("qk_nope_head_dim"), told.width("v_head_dim")
    return per_head(told, node.fan_out, (("k", key), ("v", value))) if key and value else None


def whole_query(node: Node, attention: Attention) -> Layout | None:
    """Returns the layout of the second factor of a low-rank query, whose outputs are the whole query."""
    return grouped(1, (("q", node.fan_out),))


def single_stream(node: Node) -> Layout | None:
    """Returns the layout of Flux.2: [q|k|v|gate|up] with declared widths."""
    module = node.parent.module if node.parent is not None else None
    inner, hidden = getattr(module, "inner_dim", None), getattr(module, "mlp_hidden_dim", None)
    if not isinstance(inner, int) or not isinstance(hidden, int) or node.fan_out != 3 * inner + 2 * hidden:
        return None
    return grouped(1, (("q", inner), ("k", inner), ("v", inner), ("gate", hidden), ("up", hidden)))


def gate_up(node: Node) -> Layout | None:
    """Returns the layout of a fused gate and up matrix. Attributes of the module, the module's name, and the package
    that defines its class show the order of gate and up."""
    half = (logical_shape(node)[-2] if node.kind is not Kind.LINEAR else node.fan_out) // 2
    holder = nearest_class(node)
    if getattr(holder, "is_concatenated", True) is False:  # gpt_oss: gate and up take turns
        return grouped(half, (("gate", 1), ("up", 1)))
    last = getattr(holder, "gate_last", None)
    order: tuple[str, ...] = ()
    if isinstance(last, bool):
        order = ("up", "gate") if last else ("gate", "up")
    elif defined_in(holder, UP_FIRST):
        order = ("up", "gate")
    else:
        order = tuple(token for token in V.tokens(node.name) if token in ("gate", "up"))
        if len(order) != 2:
            order = ("gate", "up") if defined_in(holder, GATE_FIRST) else ()
    return grouped(1, tuple((part, half) for part in order)) if order else None


def nearest_class(node: Node) -> nn.Module:
    """Returns the module whose forward reads the matrix: the nearest enclosing module that is not a list."""
    above = (ancestor.module for ancestor in node.ancestors())
    return next((m for m in above if not isinstance(m, (nn.ModuleList, nn.ModuleDict, nn.Sequential))), node.module)


def defined_in(module: nn.Module, prefixes: tuple[str, ...]) -> bool:
    """Whether a module's class, or one of its base classes, is defined in these packages. Subclasses keep the order of
    their base."""
    return any(f"{base.__module__}.{base.__qualname__}".startswith(prefixes) for base in type(module).__mro__)


def logical_shape(node: Node) -> tuple[int, ...]:
    """Returns (out, in) for a matrix and (experts, out, in) for stacked experts. Other shapes are returned as
    stored."""
    if node.kind is Kind.LINEAR and node.fan is not None:
        return node.fan[1], node.fan[0]
    experts, inner, outer = node.shape if len(node.shape) == 3 else (0, 0, 0)
    return (experts, outer, inner) if experts and is_transposed(node) else node.shape


def is_transposed(node: Node) -> bool:
    """Whether a stack is stored as (experts, in, out)."""
    parent = node.parent
    return parent is not None and parent.kind is Kind.EXPERTS and stacked_transposed(parent.module)


class Told:
    """Reads the numbers and flags that an attention module declares, in attributes or in its config."""

    def __init__(self, attention: Attention) -> None:
        self._attention = attention
        self._module = attention.node.module

    def defined_in(self, prefixes: tuple[str, ...]) -> bool:
        return defined_in(self._module, prefixes)

    def flag(self, name: str) -> bool | None:
        value = getattr(self._module, name, None)
        return value if isinstance(value, bool) else None

    def width(self, name: str) -> int:
        value = getattr(self._module, name, None)
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    @property
    def query_width(self) -> int | None:
        """The input width of the output matrix."""
        outputs = [node for node in self._attention.outputs if not node.context] or self._attention.outputs
        return outputs[0].fan_in if outputs else None

    @property
    def heads(self) -> int | None:
        declared = self._count(HEADS)
        width = next((found for name in HEAD_WIDTH if (found := self.width(name))), 0)
        return declared or (self.query_width // width if self.query_width and width else None)

    @property
    def key_value_heads(self) -> int | None:
        return self._count(KEY_VALUE_HEADS)

    def _count(self, names: tuple[str, ...]) -> int | None:
        """Returns the first of these attributes that is a positive number. The module's own attributes are tried before
        those of its config, since one config may serve two towers."""
        sources: list[Any] = [self._module, getattr(self._module, "config", None)]
        for source in sources:
            for name in names:
                value = getattr(source, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None
