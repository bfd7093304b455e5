"""Hosts and methods for the tests of calls: operators that read the context, tap each other, add losses, run twice."""

import functools
import threading
from collections.abc import Callable
from typing import Any, Literal

import torch
from core_toys import Layer, token_ids
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore import activate, route
from peftcore.author import Method, MethodConfig, Operator, Tags, Tap, forward_context

WIDTH = 8


class Checkpointed(nn.Module):
    """A transformer whose layers can be recomputed in backward; its trunk can also be called by itself."""

    def __init__(self, reentrant: bool | None = None, nested: bool = False) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(11, WIDTH)
        self.layers = nn.ModuleList(Layer(WIDTH) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, 11)
        self.reentrant, self.nested = reentrant, nested

    def trunk(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        if self.reentrant:
            x = x.requires_grad_(torch.is_grad_enabled())  # reentrant checkpoints need an input that does
        if self.nested:
            return checkpoint(self._layers, x, use_reentrant=self.reentrant)
        return self._layers(x)

    def _layers(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.lm_head(self.norm(self.trunk(ids)))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def host(reentrant: bool | None = None, nested: bool = False) -> Checkpointed:
    """A seeded host, in training mode (it has no dropout)."""
    torch.manual_seed(0)
    return Checkpointed(reentrant, nested).train()


class Config(MethodConfig):
    method: Literal["toy_caller"] = "toy_caller"


class TaskOperator(Operator):
    """Scales by what the caller says."""

    def __init__(self, site: Any, config: Config) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.full((site.out_features,), 0.5))

    def forward(self, call: Callable[..., Any], x: Tensor) -> Tensor:
        return call(x) * (1 + self.gain * forward_context().need("strength"))


def _method(label: str, inject: Callable[..., None], **tags: Any) -> type[Method]:
    members = {
        "name": label,
        "Config": Config,
        "tags": Tags(category="hybrid", paper="none", identity_at_init=False, **tags),
        "target": ("mlp.down",),
        "inject": inject,
        "parameter_count": staticmethod(lambda site, config: site.out_features),
    }
    return type(label, (Method,), members)


def _tasks(self: Method, model: nn.Module, config: Config, surgeon: Any) -> None:
    for site in surgeon.sites():
        surgeon.graft(site, TaskOperator, config)


class Writer(Operator):
    def __init__(self, site: Any, config: Config, tap: Tap) -> None:
        super().__init__(site)
        self.tap = tap

    def forward(self, call: Callable[..., Any], x: Tensor) -> Tensor:
        self.tap.put(x)
        return call(x)


class Reader(Operator):
    def __init__(self, site: Any, config: Config, tap: Tap) -> None:
        super().__init__(site)
        self.tap = tap
        self.gain = nn.Parameter(torch.full((site.out_features,), 0.5))

    def forward(self, call: Callable[..., Any], x: Tensor) -> Tensor:
        y, seen = call(x), self.tap.get()
        forward_context().add_loss((self.gain * seen).square().mean(), self)
        return y + self.gain * seen


def _taps(self: Method, model: nn.Module, config: Config, surgeon: Any) -> None:
    for first, last in zip(surgeon.sites("mlp.up"), surgeon.sites("mlp.down"), strict=True):
        tap = Tap()
        surgeon.graft(first, functools.partial(Writer, tap=tap), config)
        surgeon.graft(last, functools.partial(Reader, tap=tap), config)


class Twice(Operator):
    """The block, plus what it would have given without any of this injection."""

    def __init__(self, site: Any, config: Config) -> None:
        super().__init__(site)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        plain = forward_context().without(self, call, *args, **kwargs)
        output = call(*args, **kwargs)
        if isinstance(output, tuple):
            return output[0] + self.gain * plain[0], *output[1:]
        return output + self.gain * plain


def _twice(self: Method, model: nn.Module, config: Config, surgeon: Any) -> None:
    for site in surgeon.sites("mlp.down"):
        surgeon.graft(site, TaskOperator, config)
    for site in surgeon.sites("block"):
        surgeon.graft(site, Twice, config)


TaskMethod = _method("toy_tasks", _tasks)
TapMethod = _method("toy_taps", _taps)
TwiceMethod = _method("toy_twice", _twice)
WholeBatch = _method("toy_whole", _tasks, per_row=False)


def fill(injection: peftcore.Injection, seed: int) -> None:
    """Move every parameter by N(0, 0.3)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def gradients(*injections: peftcore.Injection) -> list[Tensor]:
    """Gradients of all parameters (zeros where there is none), which are then cleared."""
    found = []
    for injection in injections:
        for parameter in injection.parameters():
            found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
            parameter.grad = None
    return found


def adapted(*methods: str) -> tuple[nn.Module, list[peftcore.Injection]]:
    model = host()
    injections = [peftcore.apply(model, method, name=f"{method}{index}") for index, method in enumerate(methods)]
    for index, injection in enumerate(injections):
        fill(injection, index)
    return model, injections


def separately(model: nn.Module, ids: Tensor, names: list[str | None]) -> Tensor:
    rows = []
    for index, name in enumerate(names):
        with activate(model, *([] if name is None else [name])):
            rows.append(model(ids)["logits"][index])
    return torch.stack(rows)


def check_rows(
    model: nn.Module, injections: list[peftcore.Injection], names: list[str | None], training: bool = True
) -> None:
    """Rows of a route are those of separate passes, with their gradients."""
    ids, direction = token_ids(len(names)), torch.randn(len(names), 5, 11)
    for injection in injections:
        injection.trainable(True)
    model.train(training)
    expected = separately(model, ids, names)
    (expected * direction).sum().backward()
    wanted = gradients(*injections)
    with route(model, names):
        routed = model(ids)["logits"]
    (routed * direction).sum().backward()
    torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-6)
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted)
    for actual, gradient in zip(gradients(*injections), wanted, strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-5)


def in_the_middle(model: nn.Module, run: Callable[[], None]) -> Any:
    """Let something happen once, when the host's first layer has run."""

    def once(*_: Any) -> None:
        handle.remove()
        run()

    handle = model.layers[0].register_forward_hook(once)
    return handle


def in_a_thread(run: Callable[[], None]) -> None:
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
