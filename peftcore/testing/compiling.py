"""A compiler for checks: it runs a graph as it stands, and notes what a common one would get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_PRODUCTS = (aten.mm.default, aten.addmm.default)
_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.t.default, aten.permute.default, aten.expand.default)


class AsItStands:
    """A backend of torch.compile: graphs of torch's own operations, forward and backward, run as they are.

    Attributes:
        lost: operations whose `alpha` or `beta` inductor drops, where it makes one of a sum and a product or two of
            one (https://github.com/pytorch/pytorch/issues/167313): its results are wrong then, and nothing says so.
    """

    def __init__(self) -> None:
        self.lost: list[str] = []

    def __call__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd  # seconds, which collecting tests need not wait for

        compiled: Callable[..., Any] = aot_autograd(fw_compiler=self._compile)(graph, inputs)
        return compiled

    def _compile(self, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.lost += [node.format_node() or "" for node in graph.graph.nodes if _loses(node)]
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]

        boxed: Callable[..., Any] = make_boxed_func(graph.forward)
        return boxed


def _loses(node: fx.Node) -> bool:
    if all(node.kwargs.get(name, 1) == 1 for name in ("alpha", "beta")):
        return False
    return node.target in _PRODUCTS or (node.target in _SUMS and any(map(_is_product, node.args)))


def _is_product(value: Any) -> bool:
    while isinstance(value, fx.Node) and value.target in _VIEWS:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target in _PRODUCTS
