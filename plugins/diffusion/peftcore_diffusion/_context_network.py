"""The network of a hypernetwork: a change of the inputs of keys or values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "linear": nn.Identity,
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,  # by this name in the webui
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
STARTS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda weight: nn.init.normal_(weight, std=0.01),
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "kaiming_uniform": lambda weight: nn.init.kaiming_uniform_(weight, nonlinearity="relu"),
    "kaiming_normal": lambda weight: nn.init.kaiming_normal_(weight, nonlinearity="relu"),
}


class Stage(nn.Module):
    """One linear layer, and the activation, norm and dropout after it."""

    def __init__(self, width: int, out: int, activation: str, norm: bool, start: str) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out)
        STARTS[start](self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.activation = ACTIVATIONS[activation]()
        self.norm = nn.LayerNorm(out) if norm else nn.Identity()
        for gain in [*self.norm.parameters()][:1]:
            nn.init.normal_(gain, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.activation(self.linear(x)))
        return y


class ContextNetwork(nn.Module):
    """A network with stages of the given widths. Names of tensors do not depend on the dropout, as they do in the
    webui's files; their order is the same."""

    def __init__(
        self, widths: list[int], activation: str, activate_output: bool, norm: bool, dropout: float, start: str
    ) -> None:
        super().__init__()
        ends = [activation] * (len(widths) - 2) + [activation if activate_output else "linear"]
        sizes = zip(widths, widths[1:], ends, strict=False)
        self.dropout, self.stages = dropout, nn.ModuleList(Stage(*size, norm, start) for size in sizes)

    def forward(self, context: Tensor) -> Tensor:
        for number, stage in enumerate(self.stages):
            if number and self.training and self.dropout:
                context = nn.functional.dropout(context, self.dropout)
            context = stage(context)
        return context
