"""What is kept of a tensor brings it back, and a fingerprint tells what was written to it."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftcore.injection.originals import LANES, Remembered, brought_back, fingerprint, kept, stand_in

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.complex64, torch.bool]
SHAPES = [(), (1,), (3,), (7, 5), (0, 4), (LANES,), (2, LANES), (33, 67), (3, 5, 7, 11)]


def some(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_change_of_a_value_shows(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = some(shape, dtype)
    known = fingerprint(tensor)
    assert fingerprint(tensor.clone()) == known == fingerprint(nn.Parameter(tensor, requires_grad=False))
    bits = tensor.clone().reshape(-1).view(torch.uint8)
    for place in {0, len(bits) // 2, len(bits) - 1} if len(bits) else ():
        bits[place] ^= 1
        assert fingerprint(bits.view(dtype).view(shape)) != known
        bits[place] ^= 1
    assert fingerprint(bits.view(dtype).view(shape)) == known


@pytest.mark.parametrize("shape", [(33, 67), (128, 96), (64, 64)], ids=str)
def test_places_count_and_layouts_do_not(shape: tuple[int, int]) -> None:
    tensor, rows = some(shape), shape[0]
    known = fingerprint(tensor)
    assert fingerprint(tensor.mT.contiguous().mT) == known == fingerprint(torch.cat([tensor, tensor])[rows:])
    assert fingerprint(torch.cat([torch.zeros(1), tensor.flatten()])[1:].view(shape)) == known  # where no word begins
    for other in (tensor.flip(0), tensor.flip(1), tensor.roll(1, 0), tensor.roll(2, 1), -tensor, tensor + 1e-7):
        assert fingerprint(other) != known
    assert fingerprint(tensor.view(*reversed(shape), 1)) != known and fingerprint(tensor.view(torch.int32)) != known
    for other_row in (1, rows - 1):
        exchanged = tensor.clone()
        exchanged[[0, other_row]] = tensor[[other_row, 0]]
        assert fingerprint(exchanged) != known


def test_a_tensor_is_remembered_while_others_hold_it() -> None:
    tensor = nn.Parameter(torch.ones(3))
    remembered = Remembered(tensor)
    assert remembered() is tensor and Remembered()() is None
    assert copy.deepcopy(remembered)() is None and pickle.loads(pickle.dumps(remembered))() is None
    del tensor
    assert remembered() is None


def predicted_badly(tensor: Tensor) -> Tensor:
    """What subtracting a change gives: nearly the original."""
    return (tensor.detach() * (1 + 3e-7)).to(tensor.dtype)


@pytest.mark.parametrize("held", [False, True], ids=["let go", "held"])
@pytest.mark.parametrize("keep", ["cpu", "device", "record", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_every_bit_comes_back(keep: Any, dtype: torch.dtype, held: bool) -> None:
    old = nn.Parameter(some((7, 5), dtype), requires_grad=False)
    copy_of_old, prediction = old.detach().clone(), predicted_badly(old)
    original = kept(old, keep, lambda: prediction)
    new = stand_in(old, old + 1)
    holder = old if held else None
    del old
    back = brought_back(original, new, lambda: prediction)
    assert torch.equal(back, copy_of_old) and type(back) is nn.Parameter and back.dtype == dtype
    assert (back is holder) == held or keep != "record"
    assert (original.tensor is None) == (keep == "record" and not held)


def test_a_record_that_does_not_fit_brings_nothing_back() -> None:
    old = some((7, 5))
    prediction = predicted_badly(old)
    original, new = kept(old, "record", lambda: prediction), old + 1
    del old
    assert brought_back(original, new, lambda: new - 0.5) is None


def test_what_was_moved_comes_back_where_the_host_is() -> None:
    """The meta device stands for another one."""
    old = nn.Parameter(some((3, 2)))
    original = kept(old, "cpu", lambda: old)
    back = brought_back(original, stand_in(old, torch.empty(3, 2, device="meta")), lambda: old)
    assert back is not old and back.device.type == "meta" and old.device.type == "cpu"


class Marked(nn.Parameter):
    pass


def test_a_stand_in_is_like_the_tensor() -> None:
    old = Marked(some((3, 2)), requires_grad=False)
    old.decay = 0.5
    values = torch.ones(2, 3).mT
    new = stand_in(old, values)
    assert type(new) is Marked and new.decay == 0.5 and not new.requires_grad and new.is_contiguous()
    assert torch.equal(new, values) and type(stand_in(torch.ones(1), torch.zeros(1))) is Tensor
    assert stand_in(nn.Parameter(torch.ones(1)), torch.zeros(1)).requires_grad
