"""What one module carries: plans for each choice, made once; and nothing computed goes along with a copy."""

import copy
import pickle

import torch
from core_toys import Doubling, Shift, perceptron, stir
from torch import nn

import peftcore
from peftcore.forward.state.slot import slot_of


def test_only_a_grafted_module_has_one() -> None:
    model = perceptron()
    injection = peftcore.apply(model, Shift, target="first")
    assert slot_of(model.first) is not None and slot_of(model.second) is None
    injection.remove()
    assert slot_of(model.first) is None


def test_a_choice_is_planned_once_and_anew_when_operators_change() -> None:
    model = perceptron()
    peftcore.apply(model, Doubling, name="one", target="first")
    peftcore.apply(model, Doubling, name="two", target="first")
    slot = slot_of(model.first)
    assert slot is not None
    both = slot.plan_for(slot.state.now())
    with peftcore.activate(model, "one"):
        alone = slot.plan_for(slot.state.now())
    assert alone is not both and slot.plan_for(slot.state.now()) is both
    peftcore.injections(model)["two"].remove()
    assert slot.plan_for(slot.state.now()) not in (both, alone)


def test_what_was_computed_stays_behind_when_a_module_is_copied() -> None:
    model, x = perceptron(), torch.randn(2, 4)
    stir(peftcore.apply(model, Shift, target="first"))
    with torch.no_grad():
        expected = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        slot = slot_of(twin.first)
        assert slot is not None and slot.plans == {} and slot.asked == {}
        assert torch.equal(twin(x), expected)


def test_the_effective_weight_is_that_of_the_injections_that_act_now() -> None:
    model = perceptron()
    base = model.first.weight.detach().clone()
    injection = peftcore.apply(model, Shift, target="first")
    slot = slot_of(model.first)
    assert slot is not None
    assert torch.equal(slot.with_active("weight", base), base + 1)
    assert torch.equal(slot.with_active("bias", base[0]), base[0])
    with injection.disabled():
        assert torch.equal(slot.with_active("weight", base), base)


def test_what_acts_on_a_forward_alone_leaves_the_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    peftcore.apply(model, Doubling, target="0")
    slot, weight = slot_of(model[0]), model[0].weight
    assert slot is not None and torch.equal(slot.with_active("weight", weight), weight)
