"""What the operators of many sites make at once: the same numbers and gradients as each by itself, in all the ways in
which hosts run and are differentiated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from call_toys import fill, host
from core_toys import transformer
from torch import Tensor, nn

import peftcore
from peftcore import together
from peftcore.contract.operators import WeightOperator
from peftcore.layers.fsdp import MANAGED
from peftcore_reparameterized.oft import OFTOperator

IDS = torch.arange(12).view(2, 6) % 11
TARGET = ["q_proj", "v_proj", "up_proj", "down_proj"]
"""Eight sites in two layers, of two widths."""
ALL, ONE = [8], [1] * 8
"""How many are prepared at once, in one forward."""
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {},
    "series": {"series": 5},
    "long series": {"series": 8},
    "shared": {"series": 5, "block_share": True},
    "constrained": {"eps": 0.01},
}


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many operators are prepared at once, each time."""
    several, one, numbers = OFTOperator.prepare_all.__func__, OFTOperator.rotation, []  # type: ignore[attr-defined]

    def of_several(cls: type[OFTOperator], operators: list[OFTOperator]) -> Any:
        numbers.append(len(operators))
        return several(cls, operators)

    def of_one(operator: OFTOperator) -> Tensor:
        numbers.append(1)
        return one(operator)

    monkeypatch.setattr(OFTOperator, "prepare_all", classmethod(of_several))
    monkeypatch.setattr(OFTOperator, "rotation", of_one)
    return numbers


@contextmanager
def alone() -> Iterator[None]:
    """Within, each prepares by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OFTOperator, "alike", WeightOperator.alike)
        yield


def turned(model: nn.Module, **options: Any) -> peftcore.Injection:
    """An OFT injection with random entries."""
    injection = peftcore.apply(model, "oft", **{"target": TARGET, "block_size": 4, "series": 5, **options})
    fill(injection, 0)
    return injection


def gradients(injection: peftcore.Injection) -> list[Tensor | None]:
    """What backward has left, which goes."""
    found = [each.grad for each in injection.parameters()]
    for each in injection.parameters():
        each.grad = None
    return found


def loss(output: Any) -> Tensor:
    return (output["logits"] if isinstance(output, dict) else output).square().sum()


@pytest.mark.parametrize("name", OPTIONS)
def test_all_at_once_are_what_each_is(name: str, numbers: list[int]) -> None:
    model = transformer().train()
    injection = turned(model, **{"series": None, **OPTIONS[name]})
    (at_once := loss(model(IDS))).backward()
    found = gradients(injection)
    assert numbers == ALL
    with alone():
        (apart := loss(model(IDS))).backward()
    assert numbers == ALL + ONE
    torch.testing.assert_close(at_once, apart)
    torch.testing.assert_close(found, gradients(injection))
    assert all(each is not None and each.any() for each in found)
    assert all(each.untyped_storage().nbytes() == each.nbytes for each in found)  # no part of anything


def test_sites_of_two_widths_of_blocks(numbers: list[int]) -> None:
    model = transformer().train()
    turned(model, overrides={"*.down_proj": {"block_size": 8}, "*.v_proj": {"series": 7}})
    loss(model(IDS)).backward()
    assert sorted(numbers) == [2, 2, 4]


@pytest.mark.parametrize(("most", "groups"), [(1, ONE), (24, [2, 1, 1] * 2), (10**4, ALL)])
def test_many_sites_are_prepared_in_groups(
    most: int, groups: list[int], numbers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of so many numbers at most, but for one that has more by itself."""
    monkeypatch.setitem(together.MOST, "cpu", most)
    model = transformer().train()
    injection = turned(model)
    assert [each.numel() for each in injection.parameters()] == [12, 12, 12, 24] * 2
    loss(model(IDS)).backward()
    found = gradients(injection)
    assert numbers == groups
    with alone():
        loss(model(IDS)).backward()
    torch.testing.assert_close(found, gradients(injection))


def test_another_forward_has_a_graph_of_its_own(numbers: list[int]) -> None:
    """Two micro-batches, each differentiated when both have run."""
    model = transformer().train()
    injection = turned(model)
    first, second = (loss(model(ids)) for ids in (IDS, IDS.flip(1)))
    first.backward()
    second.backward()
    found = gradients(injection)
    assert numbers == ALL * 2
    with alone():
        (loss(model(IDS)) + loss(model(IDS.flip(1)))).backward()
    torch.testing.assert_close(found, gradients(injection))


class Towers(nn.Module):
    """Two that share nothing, the second of which can be left out; one of its layers runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(2))

    def forward(self, x: Tensor, right: bool = True) -> tuple[Tensor, ...]:
        return (self.left(x), self.right[0](self.right(x))) if right else (self.left(x),)


X = torch.linspace(-1, 1, 40).view(5, 8)
LINEAR = ["left.0", "left.2", "right.0", "right.2"]


def test_losses_of_parts_are_differentiated_one_after_the_other(numbers: list[int]) -> None:
    model = Towers().train()
    injection = turned(model, target=LINEAR)
    for each in model(X):
        loss(each).backward()
    found = gradients(injection)
    assert numbers == [4]
    with alone():
        left, right = model(X)
        (loss(left) + loss(right)).backward()
    torch.testing.assert_close(found, gradients(injection))


class Twice(nn.Module):
    """One layer, of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [self.layer(x), self.layer(x.flip(0))]


def test_uses_of_one_site_are_differentiated_one_after_the_other(numbers: list[int]) -> None:
    model = Twice().train()
    injection = turned(model, target="layer")
    for each in model(X):
        loss(each).backward()
    found = gradients(injection)
    assert numbers == [1]
    with alone():
        sum(map(loss, model(X))).backward()
    torch.testing.assert_close(found, gradients(injection))


@pytest.mark.parametrize("way", ["marked", "empty"])
def test_what_is_there_when_its_module_runs_is_not_asked_for_before(way: str, numbers: list[int]) -> None:
    """As FSDP marks what it cuts, and DeepSpeed empties what it has cut."""
    model = Towers().train()
    last = turned(model, target=LINEAR).operators["right.2"]
    expected = model(X)[1]
    value = last.K.data
    if way == "marked":
        setattr(last, MANAGED, True)
    else:
        last.K.data = value.new_empty(0)
        model.right.register_forward_pre_hook(lambda *_: setattr(last.K, "data", value))
    numbers.clear()
    torch.testing.assert_close(model(X)[1], expected)
    assert set(numbers) == {1}


def test_what_did_not_run_has_no_gradient() -> None:
    model = Towers().train()
    injection = turned(model, target=LINEAR)
    model(X)
    loss(model(X, right=False)[0]).backward()
    assert [each is None for each in gradients(injection)] == [False, False, True, True]


def test_gradients_of_gradients(numbers: list[int]) -> None:
    model = Towers().double().train()
    injection = turned(model, target=LINEAR, dtype="float64")

    def twice() -> list[Tensor | None]:
        first = torch.autograd.grad(loss(model(X.double())[1]), list(injection.parameters())[2:], create_graph=True)
        sum(each.square().sum() for each in first).backward()
        return gradients(injection)

    found = twice()
    assert numbers == [4]
    with alone():
        torch.testing.assert_close(found, twice())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_recomputed_is_prepared_at_each_site(reentrant: bool, nested: bool, numbers: list[int]) -> None:
    model, plain = host(reentrant, nested), host()
    recomputed, kept = turned(model), turned(plain)
    for _ in range(2):
        loss(model(IDS)).backward()
    assert set(numbers) == {1}
    numbers.clear()
    for _ in range(2):
        loss(plain(IDS)).backward()
    assert numbers == ALL * 2
    torch.testing.assert_close(gradients(recomputed), gradients(kept))


def test_a_checkpoint_round_one_layer(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other layer's sites find what was made for their group; those that run again make their own, and nothing was
    made for a group of which all do."""
    monkeypatch.setitem(together.MOST, "cpu", 60)  # a layer
    model, plain = host(False), host()
    injections = [turned(each) for each in (model, plain)]
    one = model.layers[1]

    def layers(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(one, model.layers[0](x), use_reentrant=False)

    model._layers = layers  # type: ignore[method-assign]
    loss(model(IDS)).backward()
    assert numbers == [4] + [1] * 8
    loss(plain(IDS)).backward()
    torch.testing.assert_close(*map(gradients, injections))


def test_what_is_saved_elsewhere_is_saved_at_each_site(numbers: list[int]) -> None:
    model = transformer().train()
    turned(model)
    with torch.autograd.graph.save_on_cpu():
        loss(model(IDS)).backward()
    assert numbers == ONE


def test_parts_of_the_host_by_themselves(numbers: list[int]) -> None:
    """Nobody says when such a forward ends."""
    model = host()
    turned(model)
    first, second = (loss(model.trunk(IDS)) for _ in range(2))
    first.backward()
    second.backward()
    assert numbers == ONE * 2
    numbers.clear()
    model(IDS)
    loss(model.layers[0](torch.ones(1, 2, 8))).backward()
    assert numbers == ALL + [1] * 4


class Around(nn.Module):
    """Calls a part of another host, which is none of its own modules."""

    def __init__(self, other: Towers) -> None:
        super().__init__()
        self.others = [other]
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(self.others[0].left(x)))


def test_a_part_of_a_host_in_the_forward_of_another(numbers: list[int]) -> None:
    inner = Towers().train()
    outer = Around(inner).train()
    turned(inner, target=LINEAR), turned(outer, target=["one", "two"])
    loss(outer(X)).backward()
    assert numbers == [1, 1, 2]


def test_without_gradients_and_where_the_weight_is_made(numbers: list[int]) -> None:
    model = transformer().train()
    injection = turned(model)
    with torch.no_grad():
        model(IDS)
    assert numbers == ONE
    numbers.clear()
    injection.frugal = True
    model(IDS)
    assert numbers == ONE


def test_under_functional_transforms(numbers: list[int]) -> None:
    model = transformer().train()
    injection = turned(model)
    values = {name: each for name, each in model.named_parameters() if each.requires_grad}
    found = torch.func.grad(lambda values: loss(torch.func.functional_call(model, values, (IDS,))))(values)
    assert numbers == ONE
    loss(model(IDS)).backward()
    torch.testing.assert_close([each for name, each in found.items() if name.endswith("K")], gradients(injection))


def test_compiled(numbers: list[int]) -> None:
    model = transformer().train()
    injection = turned(model)
    loss(model(IDS)).backward()
    expected = gradients(injection)
    numbers.clear()
    loss(torch.compile(model, backend="aot_eager")(IDS)).backward()
    assert set(numbers) <= {1}
    torch.testing.assert_close(gradients(injection), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda operator: operator.K.mul_(2),
        lambda operator: setattr(operator, "K", nn.Parameter(operator.K * 2)),
    ],
)
def test_what_changes_before_its_site_runs_is_made_anew(change: Callable[[Any], Any]) -> None:
    model = Towers().train()
    last: Any = turned(model, target=LINEAR).operators["right.2"]

    def changing(module: nn.Module, args: Any) -> None:
        with torch.no_grad():
            change(last)

    handle = model.right.register_forward_pre_hook(changing)
    found = model(X)[1]
    handle.remove()
    torch.testing.assert_close(found, model(X)[1])


def test_what_stands_in_for_parameters_gets_the_gradients(numbers: list[int]) -> None:
    model = transformer().train()
    injection = turned(model)
    names = {each: name for name, each in model.named_parameters()}
    others = {names[each]: each.detach().clone().requires_grad_() for each in injection.parameters()}
    loss(torch.func.functional_call(model, others, (IDS,))).backward()
    assert numbers == ONE
    loss(model(IDS)).backward()
    torch.testing.assert_close([each.grad for each in others.values()], gradients(injection))


def test_frozen_ones_beside_those_that_train(numbers: list[int]) -> None:
    model = transformer().train()
    injection = turned(model)
    next(injection.parameters()).requires_grad_(False)
    loss(model(IDS)).backward()
    assert numbers == ONE
    assert [each is None for each in gradients(injection)] == [True] + [False] * 7


def test_two_injections_are_one_stack(numbers: list[int]) -> None:
    model = transformer().train()
    injections = [turned(model, name=name, target=target) for name, target in (("q", "q_proj"), ("v", "v_proj"))]
    with peftcore.activate(model, "q", "v"):
        loss(model(IDS)).backward()
        found = [gradients(each) for each in injections]
        assert numbers == [4]
        with alone():
            loss(model(IDS)).backward()
        torch.testing.assert_close(found, [gradients(each) for each in injections])
    for names in (("v",), ("q", "v")):
        numbers.clear()
        with peftcore.activate(model, *names):
            loss(model(IDS)).backward()
        assert max(numbers) == 2
        injections[0].frugal = True


def test_rows_that_go_to_different_ones(numbers: list[int]) -> None:
    model = transformer().train()
    for name in ("one", "other"):
        turned(model, name=name)
    with peftcore.route(model, ["one", "other"]):
        loss(model(IDS)).backward()
    assert set(numbers) == {1}


def test_a_forward_that_fails_leaves_nothing(numbers: list[int]) -> None:
    model = Towers().train()
    turned(model, target=LINEAR)
    with pytest.raises(RuntimeError):
        model(X[:, :3])
    loss(model(X)[0]).backward()
    assert numbers == [4] * 2


def test_copies_make_their_own(numbers: list[int]) -> None:
    model = transformer().train()
    turned(model)
    other = deepcopy(model)
    loss(other(IDS)).backward()
    assert numbers == ALL
    assert all(each.grad is None for each in model.parameters())
