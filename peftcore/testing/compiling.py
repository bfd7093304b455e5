"""A backend of torch.compile for checks. It runs graphs unchanged, and finds operations that inductor, the default
backend, compiles wrongly."""

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
    """A backend of torch.compile that runs graphs unchanged.

    Attributes:
        graphs: the compiled graphs, forward and backward.
    """

    def __init__(self) -> None:
        self.graphs: list[fx.Graph] = []

    def __call__(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        # Both take seconds to import, which collecting tests need not wait for.
        from functorch.compile import make_boxed_func  # type: ignore[import-untyped]
        from torch._dynamo.backends.common import aot_autograd

        def compiler(part: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
            self.graphs.append(part.graph)
            boxed: Callable[..., Any] = make_boxed_func(part.forward)
            return boxed

        compiled: Callable[..., Any] = aot_autograd(fw_compiler=compiler)(module, inputs)
        return compiled

    @property
    def lost(self) -> list[str]:
        """Return the operations in the graphs whose `alpha` or `beta` inductor would ignore when it fuses or splits a
        sum and a product (https://github.com/pytorch/pytorch/issues/167313). Its results would then be wrong without an
        error."""
        return [node.format_node() or "" for graph in self.graphs for node in graph.nodes if _loses(node)]


def _loses(node: fx.Node) -> bool:
    if all(node.kwargs.get(name, 1) == 1 for name in ("alpha", "beta")):
        return False
    return node.target in _PRODUCTS or (node.target in _SUMS and any(map(_is_product, node.args)))


def _is_product(value: Any) -> bool:
    while isinstance(value, fx.Node) and value.target in _VIEWS:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target in _PRODUCTS
