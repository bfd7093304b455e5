"""A checkpoint repeats the forward that it had, whichever others came in between, and however its loss came about."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftcore
from peftcore.errors import AmbiguousBackward
from peftcore.testing.kit import fill

WAYS = ("plain", "reentrant", "non-reentrant")


class Body(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.layers, self.way = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), way

    def block(self, layer: nn.Module, x: Tensor) -> Tensor:
        return torch.tanh(layer(x)) + x

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.way == "plain":
                x = self.block(layer, x)
            else:
                x = checkpoint(self.block, layer, x, use_reentrant=self.way == "reentrant")
        return x


class Host(nn.Module):
    """A model whose body may be called alone."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.body, self.head = Body(way), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(x))
        return output


def adapted(way: str, method: str = "lora") -> nn.Module:
    torch.manual_seed(0)
    model = Host(way)
    for seed, name in enumerate(("a", "b")):
        fill(
            peftcore.apply(
                model, method, target="body.layers.*", name=name, **({"rank": 2} if method == "lora" else {})
            ),
            seed,
        )
    return model


def gradients(*models: nn.Module) -> dict[str, Tensor]:
    """The gradients of all adapters, by place."""
    return {
        f"{number}.{name}.{key}.{path}": parameter.grad
        for number, model in enumerate(models)
        for name, injection in peftcore.injections(model).items()
        for key, module in injection.modules()
        for path, parameter in module.named_parameters()
        if parameter.grad is not None
    }


def inputs() -> Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).requires_grad_()


def part_then_whole(model: Any, x: Tensor) -> Callable[[], Tensor]:
    with peftcore.activate(model, "a"):
        hidden = model.body(x)
    with peftcore.activate(model, "b"):
        output = model(x)
    return lambda: (hidden.square().sum() + output.square().sum()).backward()


def whole_then_part(model: Any, x: Tensor) -> Callable[[], Tensor]:
    with peftcore.activate(model, "a"):
        output = model(x)
    with peftcore.activate(model, "b"):
        hidden = model.body(x)
    return lambda: (hidden.square().sum() + output.square().sum()).backward()


def a_backward_in_between(model: Any, x: Tensor) -> Callable[[], Tensor]:
    with peftcore.activate(model, "a"):
        hidden = model.body(x)
    with peftcore.activate(model, "b"):
        model(x).square().sum().backward()
        model(x)
    return lambda: hidden.square().sum().backward()


def a_loss_of_a_hook(model: Any, x: Tensor) -> Callable[[], Tensor]:
    kept: list[Tensor] = []
    handle = model.body.register_forward_hook(lambda module, args, output: kept.append(output))
    with peftcore.activate(model, "a"):
        model(x)
    handle.remove()
    with peftcore.activate(model, "b"):
        model(x).square().sum().backward()
        other = model(x)
    return lambda: (kept[0].square().sum() + other.square().sum()).backward()


def of_rows(model: Any, x: Tensor) -> Callable[[], Tensor]:
    with peftcore.route(model, ["a", None, "b"]):
        hidden = model.body(x)
    with peftcore.activate(model, "b"):
        output = model(x)
    return lambda: (hidden.square().sum() + output.square().sum()).backward()


HISTORIES = (part_then_whole, whole_then_part, a_backward_in_between, a_loss_of_a_hook, of_rows)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("history", HISTORIES)
def test_each_way_gives_the_gradients_of_the_plain_one(
    history: Callable[[Any, Tensor], Callable[[], Tensor]], method: str, training: bool
) -> None:
    found = []
    for way in WAYS:
        model = adapted(way, method).train(training)
        history(model, inputs())()
        found.append(gradients(model))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, gradient in found[0].items():
            torch.testing.assert_close(other[key], gradient)


@pytest.mark.parametrize("way", WAYS[1:])
def test_a_choice_that_changes_inside_of_a_checkpoint_is_refused(way: str) -> None:
    model = adapted("plain")

    def run(x: Tensor) -> Tensor:
        with peftcore.activate(model, "a"):
            first = model.body.layers[0](x)
        with peftcore.activate(model, "b"):
            second: Tensor = model.body.layers[1](first)
        return second

    output = checkpoint(run, inputs(), use_reentrant=way == "reentrant")
    with pytest.raises(AmbiguousBackward, match="inside a checkpointed block"):
        output.square().sum().backward()


@pytest.mark.parametrize("outer", WAYS[1:])
@pytest.mark.parametrize("inner", WAYS[1:])
def test_checkpoints_inside_each_other(outer: str, inner: str) -> None:
    found = []
    for way in ("plain", inner):
        model, x = adapted(way), inputs()
        with peftcore.activate(model, "a"):
            hidden = model.body(x) if way == "plain" else checkpoint(model.body, x, use_reentrant=outer == "reentrant")
        with peftcore.activate(model, "b"):
            output = model(x)
        (hidden.square().sum() + output.square().sum()).backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)


def test_two_models_in_one_backward() -> None:
    found = []
    for way in ("plain", "non-reentrant"):
        first, x = adapted(way), inputs()
        second = copy.deepcopy(first)
        with peftcore.activate(first, "a"), peftcore.activate(second, "b"):
            loss = (second.body(first.body(x)) + first.body(x)).square().sum()
        loss.backward()
        found.append(gradients(first, second))
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient)
