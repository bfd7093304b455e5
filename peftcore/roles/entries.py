"""The entries of a host map. An entry has the role of one module or bare parameter, and the slices of a fused
projection."""

from __future__ import annotations

from dataclasses import dataclass

Slices = tuple[tuple[int, int], ...]
"""Half-open ranges of the logical output dimension."""


@dataclass(frozen=True)
class Layout:
    """The slices of each part of a fused projection, such as q, k and v of a qkv matrix."""

    parts: tuple[tuple[str, Slices], ...]

    def slices(self, part: str) -> Slices:
        return dict(self.parts)[part]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)


@dataclass(frozen=True)
class HostEntry:
    """One module or bare parameter of the host.

    Attributes:
        path: the path of the module, or "module.param" for a bare parameter (3-D experts, `in_proj_weight`).
        module: the path of the module that owns or reads the weight; "" is the root. For `out_proj` of
            `nn.MultiheadAttention`, which is read and never called, it is the path of the attention.
        tensor: the parameter's name in that module, such as "out_proj.weight"; None for the module's plain `weight`.
        role: one role of `ROLES`, or "other". A module that is both a block and an attention has two entries.
        stream: "main", or "context" for the second stream of joint attention.
        tower: the path of the nearest sub-model that contains blocks; "" if the host has only one.
        block: the path of the enclosing block.
        layer: the index of the enclosing block among the blocks of its list.
        layout: the slices of a fused projection, None when it is not fused or the order is not known without a probe.
        called: False when the weight is known to be read without its module being called.
        reader: the nearest enclosing module that is called, if the module that holds the weight is known never to be
            called.
        kind: "container", "linear", "conv", "norm", "table", "experts", "mha", "raw" or "tensor".
        shape: the shape of the weight; (out, in) for a matrix, independent of its storage.
        among_experts: whether the entry is inside a list of experts, each of which gets only the tokens routed to it.
    """

    path: str
    module: str
    tensor: str | None
    role: str
    stream: str = "main"
    tower: str = ""
    block: str | None = None
    layer: int | None = None
    layout: Layout | None = None
    called: bool = True
    reader: str | None = None
    kind: str = "container"
    shape: tuple[int, ...] = ()
    among_experts: bool = False

    @property
    def rows(self) -> int:
        """The size of the logical output dimension."""
        return self.shape[-2] if len(self.shape) >= 2 else 0
