"""Each loss that an operator adds is its own injection's, whoever else acts, and of its own rows."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from call_toys import TapMethod, fill, gradients, host
from core_toys import token_ids
from fleet_toys import applied, llama, texts
from torch import Tensor, nn

import peftcore
from peftcore import Average, Stack, Sum, activate, route
from peftcore.author import Operator, forward_context
from peftcore.errors import RouteError, TrainingError

ADDING: dict[str, tuple[str, dict[str, Any]]] = {
    "pvera": ("kl", {"sample": "never"}),
    "monteclora": ("kl", {"samples": 4}),
    "text_to_lora": ("decay", {"vector_width": 6, "dropout": 0.0, "network_dropout": 0.0}),
    "shadow": ("guest_weight", {}),
    "loramoe": ("balance", {"dropout": 0.0}),
    "pha": ("contrast", {"tasks": ["x", "y"]}),
    "sapt": ("replay", {"tasks": 2}),
    "infoprompt": ("representation_weight", {"head_weight": 0.0, "kl_weight": 0.0}),
}
"""Methods whose operators add losses, by the option that is their factor."""
RETURNING: dict[str, dict[str, Any]] = {
    "adamix": {"consistency": 1.0},
    "mola": {"balance": 1.0, "dropout": 0.0},
    "moa_adapters": {"balance": 1.0, "top_k": 2},
    "adalora": {},
}
"""Methods that have losses of what the model returned, of what was left for each other, or of parameters."""
WHOLE = ("sapt", "infoprompt")
"""Those that act on the whole batch, so that rows are not routed to them."""


def told(method: str, rows: slice = slice(None)) -> dict[str, Any]:
    """What a call tells a method for rows of a batch of four."""
    every = {
        "text_to_lora": {"task_vector": torch.linspace(-1, 1, 24, dtype=torch.float64).view(4, 6)},
        "pha": {"task": ["x", "y", "x", "x"]},
        "sapt": {"attention": torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)},
    }
    return {name: value[rows] for name, value in every.get(method, {}).items()}


def tokens(seed: int, rows: int = 4) -> Tensor:
    (batch,) = texts(seed, count=1, rows=rows)
    return batch["input_ids"]


def run(model: Any, chosen: Any, ids: Tensor, method: str, rows: slice = slice(None)) -> None:
    """One forward in training without a loss of the model's, so that all wait."""
    with ExitStack() as blocks:
        blocks.enter_context(chosen)
        if context := told(method, rows):
            blocks.enter_context(peftcore.call(model, **context))
        torch.manual_seed(3)
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids if method == "shadow" else None)
    assert output.loss is None or method == "shadow"


def waiting(*found: peftcore.Injection) -> list[float]:
    return [each.losses().item() for each in found]


class Silent(nn.Module):
    """A Llama that keeps its loss for itself, though labels are given."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = llama()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        return output


def silent() -> Any:
    return Silent().double().train()


@functools.cache
def one_alone(method: str) -> float:
    model = silent()
    own = applied(model, method, "own", 5, **ADDING[method][1], **{ADDING[method][0]: 0.5})
    run(model, activate(model, "own"), tokens(1), method)
    return waiting(own)[0]


@pytest.mark.parametrize("method", ADDING)
def test_beside_another_method_it_has_what_it_has_alone(method: str) -> None:
    """Whoever is asked first. The other one is fresh, so that it changes nothing that the losses are made of."""
    factor, options = ADDING[method]
    for first in ("lora", "own"):
        model = silent()
        lora = peftcore.apply(model, "lora", name="lora", dtype=torch.float64, dropout=0.0)
        own = applied(model, method, "own", 5, **options, **{factor: 0.5})
        run(model, activate(model, "lora", "own"), tokens(1), method)
        taken = waiting(lora, own) if first == "lora" else waiting(own, lora)[::-1]
        assert taken[0] == 0
        assert taken[1] == pytest.approx(one_alone(method), rel=1e-9) and abs(taken[1]) > 1e-3
        assert waiting(lora, own) == [0, 0]


@pytest.mark.parametrize("method", ADDING)
def test_of_two_of_one_method_each_has_its_own(method: str) -> None:
    """Which is in proportion to its own factor: that changes the loss alone."""
    factor, options = ADDING[method]

    def two(one: float, other: float) -> list[float]:
        model = silent()
        found = [
            applied(model, method, name, seed, **options, **{factor: each})
            for name, seed, each in (("a", 5, one), ("b", 6, other))
        ]
        run(model, activate(model, "a", "b"), tokens(1), method)
        return waiting(*found)

    one, other = two(0.5, 0.25)
    assert two(1.0, 0.25) == pytest.approx([2 * one, other], rel=1e-9)
    assert two(0.5, 1.0) == pytest.approx([one, 4 * other], rel=1e-9)
    assert min(abs(one), abs(other)) > 1e-4 and one != pytest.approx(2 * other)


@pytest.mark.parametrize("method", [each for each in (*ADDING, *RETURNING) if each not in WHOLE])
def test_in_a_route_it_is_of_its_own_rows(method: str) -> None:
    """Those of others, whatever they hold, in front of them or behind, change nothing."""
    factor, options = ADDING.get(method, ("", RETURNING.get(method, {})))
    model = silent()
    lora = applied(model, "lora", "lora", 1)
    own = applied(model, method, "own", 5, **options, **({factor: 0.5} if factor else {}))
    ids = tokens(1)
    run(model, route(model, ["own"] * 2, seeds={"own": 3}), ids[:2], method, slice(2))
    alone = waiting(lora, own)
    assert alone[0] == 0 and abs(alone[1]) > 1e-5
    for seed in (2, 3):
        others = torch.cat([ids[:2], tokens(seed)[2:]])
        run(model, route(model, ["own", "own", "lora", "lora"], seeds={"own": 3}), others, method)
        assert waiting(lora, own) == pytest.approx(alone, rel=1e-9)


COMPOSITIONS: dict[str, Callable[[str, str], Any]] = {
    "stack": Stack,
    "sum": Sum,
    "average": Average,
    "of two levels": lambda a, b: Sum(Stack(a, b), b),
}


@pytest.mark.parametrize("kind", COMPOSITIONS)
def test_in_a_composition_each_has_its_own(kind: str) -> None:
    model = llama()
    lora = peftcore.apply(model, "lora", name="lora", dtype=torch.float64)
    own = applied(model, "loramoe", "own", 5, balance=0.5, dropout=0.0, target=["model.layers.0.mlp.up_proj"])
    run(model, activate(model, "own"), tokens(1), "loramoe")
    (alone,) = waiting(own)
    run(model, activate(model, COMPOSITIONS[kind]("lora", "own")), tokens(1), "loramoe")

    assert waiting(lora, own) == [0, pytest.approx(alone, rel=1e-9)]


def test_of_a_hybrid_it_is_the_hybrids() -> None:
    model = llama()
    lora = applied(model, "lora", "lora", 1)
    parts = [{"method": "loramoe", "balance": 0.5, "dropout": 0.0}, {"method": "pvera", "kl": 0.5, "sample": "never"}]
    own = applied(model, parts, "own", 5)
    run(model, activate(model, "lora", "own"), tokens(1), "hybrid")
    taken = waiting(lora, own)
    assert taken[0] == 0 and taken[1] > 0.1


@pytest.mark.parametrize("reentrant", [None, False])
def test_what_backward_repeats_adds_nothing_and_gradients_go_to_its_author(reentrant: bool | None) -> None:
    model = host(reentrant)
    first, second = (peftcore.apply(model, TapMethod, name=name) for name in "ab")
    for seed, each in enumerate((first, second)):
        fill(each, seed)
    with activate(model, "a", "b"):
        model(token_ids(2))
    one = first.losses()
    one.backward()
    assert any(each.any() for each in gradients(first))
    other = second.losses()
    assert other > 0 and other != one
    assert waiting(first, second) == [0, 0]


def test_parts_of_the_model_that_run_alone_leave_each_its_own() -> None:
    model = host()
    first, second = (peftcore.apply(model, TapMethod, name=name) for name in "ab")
    for seed, each in enumerate((first, second)):
        fill(each, seed)
    with activate(model, "a", "b"):
        model(token_ids(2))
        wanted = waiting(first, second)
        model.trunk(token_ids(2))
        assert waiting(second, first)[::-1] == pytest.approx(wanted)
    assert waiting(first, second) == [0, 0]


class Adding(Operator):
    """Adds the square of what it sees to the loss, as a loss of what it is told."""

    def __init__(self, site: Any, of: str = "itself", stackable: bool = False) -> None:
        super().__init__(site)
        self.stackable, self.of = stackable, of
        self.gain = nn.Parameter(torch.full((site.out_features,), 0.5))
        self.inside = nn.Linear(1, 1)

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y = call(x)
        forward_context().add_loss((self.gain * y).square().mean(), self if self.of == "itself" else self.inside)
        return y * (1 + self.gain)


class AddingMethodConfig(peftcore.author.MethodConfig):
    method: Any = "toy_adding"
    of: str = "itself"
    stackable: bool = False


class AddingMethod(peftcore.author.Method):
    name, target = "toy_adding", ("all-linear",)
    Config = AddingMethodConfig
    tags = peftcore.author.Tags(category="additive", paper="none", identity_at_init=False)

    def inject(self, model: nn.Module, config: AddingMethodConfig, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, functools.partial(Adding, of=config.of, stackable=config.stackable))

    @staticmethod
    def parameter_count(site: Any, config: Any) -> int:
        return int(site.out_features)


class Shared(nn.Module):
    """Uses one table for all rows, and a layer for each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.of_all, self.of_rows = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.of_rows(x + self.of_all(x.new_ones(1, 3)))


def shared(**options: Any) -> tuple[nn.Module, list[peftcore.Injection]]:
    model = Shared().train()
    target = options.pop("target", ["of_all", "of_rows"])
    return model, [peftcore.apply(model, AddingMethod, name=name, target=target, **options) for name in "ab"]


def test_a_loss_of_what_all_rows_share_is_refused_in_a_route() -> None:
    model, [a, b] = shared()
    with route(model, ["a", "b", "a"]), pytest.raises(RouteError, match=r"rows of other adapters.*exclude that module"):
        model(torch.randn(3, 3))
    with route(model, ["a", "a", "a"]):  # all rows are its own
        model(torch.randn(3, 3))
    assert a.losses() > 0 and b.losses() == 0
    model, [a, b] = shared(target=["of_rows"])
    with route(model, ["a", "b", "a"]):
        model(torch.randn(3, 3))
    assert a.losses() > 0 and b.losses() > 0


def test_a_loss_of_what_is_no_operator_is_refused() -> None:
    model, _ = shared(of="what is inside", target=["of_rows"])
    with (
        activate(model, "a"),
        pytest.raises(TrainingError, match=r"Linear that is not an operator.*add_loss\(loss"),
    ):
        model(torch.randn(3, 3))


def test_operators_that_run_as_one_are_told_not_to() -> None:
    model, _ = shared(stackable=True, target=["of_rows"])
    with route(model, ["a", "b"]), pytest.raises(TrainingError, match="stackable = False"):
        model(torch.randn(2, 3))


@pytest.mark.slow
def test_compiled_each_has_its_own_and_routes_are_refused() -> None:
    torch.compiler.reset()
    model, found = shared(target=["of_rows"])
    for seed, each in enumerate(found):
        fill(each, seed)
    x = torch.randn(3, 3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with activate(model, "a", "b"):
        model(x)
        wanted = waiting(*found)
        assert wanted[0] != wanted[1]
        for _ in range(2):
            compiled(x)
            assert waiting(*found[::-1])[::-1] == pytest.approx(wanted)
    with route(model, ["a", "b", "a"]), pytest.raises(Exception, match="rows of other adapters"):
        compiled(x)
    torch.compiler.reset()
