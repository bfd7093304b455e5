"""What is told of one of many modules that are built alike holds for all: folded and unfolded, the map is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from host_zoo import EXTRA, SURVEY, build
from torch import nn

import peftcore
from peftcore.forward.tensors import view
from peftcore.injection.request import host_map
from peftcore.registry.plugins import layer_of
from peftcore.roles import derive, equal_modules, survey
from peftcore.roles import find_roles as rules
from peftcore.roles.equal_modules import Run, Structure, runs
from peftcore.surgery import installation
from peftcore.targets.resolver import Resolver

torch.set_num_threads(1)

MORE = 4
"""Copies of the last element that each list gets."""


def each_by_itself(elements: Run, taken: Callable[[int], bool]) -> Iterator[Run]:
    for element in elements:
        yield [element]


def deeper(model: nn.Module) -> nn.Module:
    """The host with more elements in each list; what its modules hold besides numbers stays the same object, as in a
    host that was built so."""
    held = [value for module in model.modules() for value in vars(module).values()]
    same = {id(value): value for value in held if hasattr(value, "to_dict") or callable(value)}
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList | nn.Sequential) and len(module) and module[-1]._modules:
            for _ in range(MORE):
                module.append(copy.deepcopy(module[-1], memo=dict(same)))
    return model


def told_apart(model: nn.Module) -> bool:
    """Whether all elements of lists have to be judged."""
    folded = survey.Survey(model)
    return rules.are_told_apart(folded, rules.judged(folded))


@pytest.mark.share(3)
@pytest.mark.parametrize("name", [*SURVEY, *EXTRA])
def test_the_map_is_the_one_that_judges_each_element(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = deeper(build(name)[0])
    found, folded = derive(model), len(survey.Survey(model).nodes)
    assert not told_apart(model)  # then nothing would be folded
    monkeypatch.setattr(survey, "runs", each_by_itself)
    assert found == derive(model)
    paths = [entry.path for entry in found.entries]
    assert len(set(zip(paths, (entry.role for entry in found.entries), strict=True))) == len(paths)
    unfolded = len(survey.Survey(model).nodes)
    assert (folded == unfolded) == (name in NOT_FOLDED)


NOT_FOLDED = {"timm_regnet", "dit"}
"""Hosts whose elements hold objects of their own in attributes, or a table."""


class Plain(nn.Module):
    """A part without attributes."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def listed(count: int, make: Callable[[], nn.Module]) -> nn.ModuleList:
    return nn.ModuleList(make() for _ in range(count))


def experts() -> nn.Module:
    """Blocks with seven experts in a list: what has one output for each is their router."""

    def block() -> nn.Module:
        attention = Plain(**{name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        branch = Plain(
            choose=nn.Linear(8, 7), experts=listed(7, lambda: Plain(up=nn.Linear(8, 16), down=nn.Linear(16, 8)))
        )
        return Plain(attention=attention, norm=nn.LayerNorm(8), branch=branch)

    return Plain(blocks=listed(6, block))


def without_norms() -> nn.Module:
    """Blocks without norms are told by three weights with convolutions among them."""

    def block() -> nn.Module:
        return Plain(steps=listed(5, lambda: Plain(conv=nn.Conv2d(4, 4, 3))))

    return Plain(stages=nn.Sequential(*(block() for _ in range(6))))


def two_runs() -> nn.Module:
    """Blocks after a run of others are numbered on."""

    def block(hidden: int) -> nn.Module:
        attention = Plain(**{name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")})
        return Plain(attention=attention, norm=nn.LayerNorm(8), up=nn.Linear(8, hidden), down=nn.Linear(hidden, 8))

    return Plain(blocks=nn.ModuleList(block(hidden) for hidden in (16,) * 5 + (24,) + (16,) * 6))


def counterparts() -> nn.Module:
    """Blocks with seven square matrices in a list, of which rules take each second one for the first's counterpart."""

    def block() -> nn.Module:
        steps = listed(7, lambda: Plain(conv=nn.Conv2d(4, 4, 1, bias=False), bn=nn.BatchNorm2d(4)))
        return Plain(steps=steps, norm=nn.BatchNorm2d(4))

    return Plain(stages=nn.Sequential(*(block() for _ in range(6))))


COUNTED = (
    (experts, "router", 6, False),
    (without_norms, "block", 6, False),
    (two_runs, "block", 12, False),
    (counterparts, "mlp.up", 18, True),
)


@pytest.mark.parametrize(("make", "role", "count", "apart"), COUNTED)
def test_rules_that_count(
    make: Callable[[], nn.Module], role: str, count: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = derive(make())
    assert len(found.by_role[role]) == count
    assert told_apart(make()) == apart
    monkeypatch.setattr(survey, "runs", each_by_itself)
    assert found == derive(make())


class Block(nn.Module):
    def __init__(self, number: int = 0, width: int = 8) -> None:
        super().__init__()
        self.layer_idx, self.heads, self.names = number, 2, ("a", 1.5)
        self.q_proj, self.v_proj = nn.Linear(8, width), nn.Linear(8, width, bias=False)
        self.register_buffer("scale", torch.ones(3))


def changed(change: Callable[[Any], object]) -> nn.Module:
    block = Block(5)
    change(block)
    return block


def parametrized(block: Block) -> None:
    nn.utils.parametrizations.weight_norm(block.q_proj)


class QuantizedLayer(torch.Tensor):
    """A tensor that is more than its numbers."""


DIFFERENT: dict[str, Callable[[Any], object]] = {
    "another width": lambda block: setattr(block, "q_proj", nn.Linear(8, 9)),
    "another number": lambda block: setattr(block, "heads", 3),
    "a number of another type": lambda block: setattr(block, "heads", 2.0),
    "other names": lambda block: setattr(block, "names", ("a", 2.5)),
    "one more attribute": lambda block: setattr(block, "more", None),
    "a bias less": lambda block: setattr(block, "q_proj", nn.Linear(8, 8, bias=False)),
    "another class": lambda block: setattr(block, "q_proj", nn.Bilinear(8, 8, 8)),
    "a part less": lambda block: delattr(block, "v_proj"),
    "an empty part": lambda block: setattr(block, "v_proj", None),
    "another dtype": lambda block: block.v_proj.double(),
    "another buffer": lambda block: setattr(block, "scale", torch.ones(4)),
    "a packed tensor": lambda block: setattr(block, "scale", torch.ones(3).as_subclass(QuantizedLayer)),
    "a parametrization": parametrized,
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_is_built_otherwise_does_not_fit(what: str) -> None:
    assert not Structure(Block()).fits(changed(DIFFERENT[what]))


SAME: dict[str, Callable[[Any], object]] = {
    "values": lambda block: nn.init.ones_(block.q_proj.weight),
    "frozen": lambda block: block.requires_grad_(False),
    "evaluated": lambda block: block.eval(),
    "hooked": lambda block: block.q_proj.register_forward_hook(print),
}


@pytest.mark.parametrize("what", SAME)
def test_values_and_place_do_not_count(what: str) -> None:
    other, met = changed(SAME[what]), list[int]()
    assert Structure(Block()).fits(other, met)
    assert set(met) == {id(module) for module in other.modules()}


@pytest.mark.parametrize("register", ["register_module", "register_buffer", "register_parameter"])
def test_empty_places_have_names(register: str) -> None:
    one, other = Block(), Block()
    getattr(one, register)("first", None)
    getattr(other, register)("second", None)
    assert not Structure(one).fits(other)


def test_nothing_is_like_a_packed_or_lazy_tensor() -> None:
    one, other = changed(DIFFERENT["a packed tensor"]), changed(DIFFERENT["a packed tensor"])
    assert not Structure(one).fits(other)
    assert not Structure(nn.LazyLinear(3)).fits(nn.LazyLinear(3))


def named(*blocks: nn.Module) -> Run:
    return [(str(number), block, []) for number, block in enumerate(blocks)]


def lengths(*blocks: nn.Module, taken: Callable[[int], bool] = lambda module: False) -> list[int]:
    return [len(run) for run in runs(named(*blocks), taken)]


def test_runs_end_where_an_element_is_built_otherwise() -> None:
    assert lengths(Block(), Block(1), Block(2, width=9), Block(3), Block(4), Block(5)) == [2, 1, 3]
    assert lengths(*(nn.Linear(2, 2) for _ in range(3))) == [1, 1, 1]  # no parts: nothing to save
    assert lengths() == []


def test_an_element_that_has_a_module_of_others_stands_alone() -> None:
    first, second, third, fourth = (Block(number) for number in range(4))
    third.q_proj = second.q_proj
    assert lengths(first, second, third, fourth) == [2, 2]
    third.q_proj = first.q_proj  # what the first has as well, is told with the first
    assert lengths(first, second, third, fourth) == [4]
    third.v_proj = third.q_proj = nn.Linear(8, 8, bias=False)
    assert 4 not in lengths(first, second, third, fourth)
    assert lengths(first, second, first, second) == [2, 2]
    blocks = [Block(number) for number in range(4)]
    assert lengths(*blocks, taken=lambda module: module == id(blocks[2].v_proj)) == [2, 2]


def test_an_element_with_a_table_stands_alone() -> None:
    blocks = [nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 4)) for _ in range(3)]
    assert lengths(*blocks) == [1, 1, 1]


def test_a_shared_module_is_found_where_it_stands_first() -> None:
    blocks = [Block(number) for number in range(8)]
    model = nn.ModuleDict({"blocks": nn.ModuleList(blocks), "again": blocks[4].q_proj})
    paths = [entry.path for entry in derive(model).entries]
    assert "blocks.4.q_proj" in paths
    assert "again" not in paths


def test_the_head_that_a_host_declares_is_one_wherever_it_stands() -> None:
    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(Block(number) for number in range(8))

        def get_classifier(self) -> nn.Module:
            return self.parts[4].v_proj

    model = Host()
    nodes = [node.path for node in survey.Survey(model).nodes]
    assert "parts.4.v_proj" in nodes
    assert "parts.3.v_proj" not in nodes  # another one speaks for it


@pytest.mark.share(3)
@pytest.mark.parametrize("name", SURVEY)
def test_a_layer_is_the_one_that_plugins_tell(name: str) -> None:
    model, _ = build(name)
    resolver = Resolver(model, host_map(model), layer_of)
    for path, module in resolver.modules.items():
        assert resolver._layer(module, "weight") == layer_of(module, "weight"), path


def test_what_adapters_leave_on_a_host_is_known_by_its_name() -> None:
    assert equal_modules.SLOT == view.SLOT and equal_modules.ADAPTER_MODULES == installation.ADAPTER_MODULES
    one, other = Block(), Block(1)
    peftcore.apply(nn.ModuleList([one]), "lora", target="q_proj", rank=2)
    peftcore.apply(nn.ModuleList([other]), "lora", target="q_proj", rank=4)
    assert {"peft", "q_proj"} <= one._modules.keys()
    assert Structure(one).fits(other)
    assert not Structure(one).fits(Block())  # the class of what is adapted is another one


def test_attributes_are_those_of_torch() -> None:
    """The list that is made at import would leave out what a subclass sets."""
    assert {"training", "_parameters", "_forward_hooks"} <= equal_modules.TORCHS
    assert not equal_modules.TORCHS & vars(Block()).keys() - vars(nn.Module()).keys()
