"""Tensors of an idle adapter that somebody holds, such as an optimizer: what is away cannot be read or written."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from core_toys import Shift, token_ids, transformer
from torch import Tensor, nn

import peftcore
from peftcore.errors import IdleAdapter
from peftcore.injection.idle_adapters import IdleValues, MemoryStore

ONES = torch.ones(8, 8)


def held(method: Any = "lora") -> tuple[nn.Module, IdleValues, list[Tensor]]:
    """A model, the values of its adapter, and all its tensors."""
    model = transformer()
    options = {"rank": 8, "target": ["attn.q"]} if method == "lora" else {}
    injection = peftcore.apply(model, method, name="one", **options)
    injection.trainable(False)
    tensors = [each for _, module in injection.modules() for each in (*module.parameters(), *module.buffers())]
    return model, IdleValues(injection, MemoryStore(), 0), tensors


def set_data(each: Any) -> None:
    each.data = ONES


def set_row(each: Any) -> None:
    each[0] = 1.0


READS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda each: each.norm(),
    "item": lambda each: each[0, 0].item(),
    "float": lambda each: float(each.sum()),
    "compared": lambda each: each == ONES,
    "compared with itself": lambda each: torch.equal(each, each),
    "close": lambda each: torch.allclose(each, ONES),
    "summed in a list": lambda each: torch._foreach_norm([each]),
    "multiplied": lambda each: F.linear(ONES, each),
    "looked up": lambda each: F.embedding(torch.tensor([1]), each),
    "in a call": lambda each: torch.func.functional_call(nn.Linear(8, 8, bias=False), {"weight": each}, ONES),
    "a view": lambda each: each.view(-1),
    "a column": lambda each: each[:, 0],
    "detached": lambda each: each.detach(),
    "its data": lambda each: each.data,
    "its address": lambda each: each.data_ptr(),
    "numpy": lambda each: numpy.asarray(each),
    "a list": lambda each: each.tolist(),
    "dlpack": lambda each: torch.from_dlpack(each),
    "moved": lambda each: each.to("meta"),
    "cast": lambda each: each.double(),
    "cloned": lambda each: each.clone(),
    "copied": copy.copy,
    "copied deeply": copy.deepcopy,
    "copied into": lambda each: torch.zeros(8, 8).copy_(each),
    "pickled": pickle.dumps,
    "saved": lambda each: safetensors.torch.save({"each": each}),
    "in a state dict": lambda each: nn.ParameterList([each]).state_dict(),
    "a vector": lambda each: nn.utils.parameters_to_vector([each]),
}
WRITES: dict[str, Callable[[Any], Any]] = {
    "added": lambda each: each.add_(1.0),
    "added in a statement": lambda each: each.__iadd__(1.0),
    "zeroed": lambda each: each.zero_(),
    "filled": lambda each: nn.init.ones_(each),
    "drawn": lambda each: each.normal_(),
    "copied": lambda each: each.copy_(ONES),
    "a row": set_row,
    "its data": set_data,
    "resized": lambda each: each.resize_(8, 8),
    "an output": lambda each: torch.mm(ONES, ONES, out=each),
    "from a vector": lambda each: nn.utils.vector_to_parameters(torch.ones(64), [each]),
    "an average": lambda each: torch.optim.swa_utils.get_ema_multi_avg_fn()([each], [ONES], 1),
    "in a list": lambda each: torch._foreach_add_([each], 1.0),
}


@pytest.mark.parametrize("act", [*READS, *(f"write: {name}" for name in WRITES)])
def test_what_is_away_cannot_be_read_or_written(act: str) -> None:
    model, values, tensors = held()
    first = tensors[0]
    before = first.clone()
    values.take_out()
    run = WRITES[act.removeprefix("write: ")] if act.startswith("write: ") else READS[act]
    with torch.no_grad(), pytest.raises(IdleAdapter, match=r"'one' is idle.*peftcore\.using"):
        run(first)
    values.put_back(values.fetch())
    assert torch.equal(first, before) and first in {*model.parameters()}


OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "sgd": lambda each: torch.optim.SGD(each, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda each: torch.optim.AdamW(each, lr=0.1, foreach=False),
    "adamw, foreach": lambda each: torch.optim.AdamW(each, lr=0.1, foreach=True),
    "adamw, fused": lambda each: torch.optim.AdamW(each, lr=0.1, fused=True),
    "adagrad": lambda each: torch.optim.Adagrad(each, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_an_optimizer_takes_no_step_over_it(optimizer: str) -> None:
    """With gradients of before; without any it passes over it, and when all is back it takes the step."""
    model, values, tensors = held()
    first = tensors[0]
    first.grad = torch.ones_like(first)
    steps = OPTIMIZERS[optimizer]([first])
    steps.step()
    before = first.clone()
    values.take_out()
    with pytest.raises(IdleAdapter, match="'one' is idle"):
        steps.step()
    state = steps.state_dict()
    steps.load_state_dict(state)
    values.put_back(values.fetch())
    assert torch.equal(first, before)
    steps.step()
    assert not torch.equal(first, before)
    steps.zero_grad()
    values.take_out()
    steps.zero_grad()
    steps.step()
    assert len(tensors) == len([*model.parameters()]) - len([*transformer().parameters()])


@pytest.mark.parametrize("method", ["lora", "vera", "houlsby_adapter", "bitfit", Shift])
def test_it_tells_what_it_is_and_comes_back_as_it_was(method: Any) -> None:
    model, values, tensors = held(method)
    told = [(type(each), each.shape, each.dtype, each.device, each.requires_grad, id(each)) for each in tensors]
    with torch.no_grad():
        before = model(token_ids())
    values.take_out()
    for each, (cls, shape, dtype, device, trains, _) in zip(tensors, told, strict=True):
        assert isinstance(each, cls) and each.is_leaf and each.requires_grad is trains
        assert (each.shape, each.size(), each.dtype, each.device) == (shape, shape, dtype, device)
        assert (each.numel(), each.dim()) == (shape.numel(), len(shape))
        assert {each: 1}[each] == 1 and each.untyped_storage().nbytes() == 0
        assert "idle adapter 'one'" in repr(each)
    values.put_back(values.fetch())
    now = [(type(each), each.shape, each.dtype, each.device, each.requires_grad, id(each)) for each in tensors]
    assert now == told and not any(vars(each) for each in tensors)
    with torch.no_grad():
        assert torch.equal(model(token_ids()), before)


def test_what_it_is_cast_to_meanwhile_is_told_too() -> None:
    model, values, tensors = held()
    first = tensors[0]
    values.take_out()
    model.double()
    assert first.dtype == torch.float64 and first.shape == (8, 8)
    values.put_back(values.fetch())
    assert first.dtype == torch.float64 and type(first) is nn.Parameter and first.isfinite().all()
