"""Small methods for tests of the seams of training: two learning rates, gradient rules, a schedule, a look at data."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from peftcore import Injection
from peftcore.author import Batches, GradientRule, Method, MethodConfig, Operator, Site, Surgeon, Tags

WIDTH = 6


class Toy(nn.Module):
    """Two linear maps; the output is the loss where there are labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 8)
        self.drop = nn.Dropout(0.5)
        self.down = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.down(self.drop(torch.tanh(self.up(x))))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def toy() -> Toy:
    """Seeded, in eval mode."""
    torch.manual_seed(0)
    return Toy().eval()


def batch(seed: int = 1, rows: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, WIDTH, generator=generator), "labels": torch.arange(rows) % 3}


class LowRank(Operator):
    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.A = nn.Parameter(torch.randn(2, site.in_features))
        self.B = nn.Parameter(torch.randn(site.out_features, 2))
        self.register_buffer("found", torch.zeros(()))
        self.register_buffer("kept", torch.zeros(()), persistent=False)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        return call(x) + x @ self.A.T @ self.B.T


class Halve(GradientRule):
    """Half of each gradient of a matrix."""

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        self.state[param]["seen"] = self.state[param].get("seen", 0) + 1
        return grad / 2


class FirstRow(GradientRule):
    """The optimizer sees the first row alone; its update goes to every row, doubled."""

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        return grad[:1]

    def restore(self, update: Tensor, param: nn.Parameter) -> Tensor:
        return 2 * update.expand(param.shape)


class Breaks(FirstRow):
    """The rule fails at its second parameter."""

    def project(self, grad: Tensor, param: nn.Parameter) -> Tensor:
        self.state[param]["seen"] = True
        if len(self.state) == 2:
            raise ZeroDivisionError
        return grad[:1]


def method(label: str, tags: dict[str, Any] | None = None, **members: Any) -> type[Method]:
    """A low-rank method with other members."""
    quickly = ConfigDict(use_attribute_docstrings=False)  # pydantic would look for its source, at length
    fields = {"__annotations__": {"method": Literal[label]}, "method": label, "model_config": quickly}
    config = type("Config", (MethodConfig,), fields)

    def inject(self: Method, model: nn.Module, config: Any, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, LowRank, config)

    defaults = {"name": label, "Config": config, "target": ["up", "re:down"], "inject": inject}
    defaults["tags"] = Tags(category="reparameterized", paper="none", identity_at_init=False, **(tags or {}))
    defaults["parameter_count"] = staticmethod(lambda site, config: 2 * (site.in_features + site.out_features))
    return type(label, (Method,), {**defaults, **members})


def two_rates(self: Method, injection: Injection, *, lr: float, **defaults: Any) -> list[dict[str, Any]]:
    """LoRA+: B faster than A."""
    operators = [operator for operator in injection.operators.values() if isinstance(operator, LowRank)]
    named = {name: [operator.get_parameter(name) for operator in operators] for name in "AB"}
    rates = {"A": lr, "B": 16 * lr}
    return [{"params": named[name], "lr": rates[name], **defaults} for name in "AB"]


def mean_loss(self: Method, model: nn.Module, data: Batches, config: Any, injection: Injection) -> None:
    losses = [each.loss().detach() for each in data]
    for operator in injection.operators.values():
        operator.get_buffer("found").copy_(torch.stack(losses).mean())


def counts(self: Method, injection: Injection, step: int, total: int) -> None:
    """Keeps what it saw where only the optimizer saves it."""
    for operator in injection.operators.values():
        operator.get_buffer("kept").add_(step / total)


Plain = method("plain")
Plus = method("plus", parameter_groups=two_rates)
Halved = method("halved", gradient_rule=lambda self, injection: Halve())
ByRow = method("by_row", gradient_rule=lambda self, injection: FirstRow())
Broken = method("broken", gradient_rule=lambda self, injection: Breaks())
Looks = method("looks", {"needs_data": True}, calibrate=mean_loss)
Steps = method("steps", {"scheduled": True}, on_step=counts)


def found(injection: Injection) -> float:
    """What the method found: the mean loss."""
    (value,) = {float(operator.get_buffer("found")) for operator in injection.operators.values()}
    return value
