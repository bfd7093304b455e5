"""Files of kohya and LyCORIS: rank and alpha from tensors, dots from the host, the simplest method first."""

import math

import pytest
from torch import Size

from peftcore.errors import CheckpointError
from peftcore.files.formats.kohya import Held, kohya_methods, spelled


def held(alpha: float | None = None) -> Held:
    return Held({"lora_down.weight": Size([4, 8, 1, 1])}, alpha, Size([6, 8]), "file.safetensors: lora_unet_a")


def test_alpha_is_the_rank_where_the_file_has_none() -> None:
    assert held().alpha(4) == 4.0 and held(2.0).alpha(4) == 2.0


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.inf, math.nan])
def test_an_alpha_that_is_not_above_zero_is_refused(alpha: float) -> None:
    with pytest.raises(CheckpointError, match=r"file\.safetensors: lora_unet_a: alpha is"):
        held(alpha).alpha(4)


def test_sizes_of_what_lacks_are_one() -> None:
    assert held().size("lora_down.weight", 0) == 4
    assert held().size("lora_down.weight", 7) == held().size("lora_up.weight", 0) == 1


def test_pointwise_matrices_are_written_flat_or_as_convolutions() -> None:
    assert spelled((4, 8)) == [(4, 8), (4, 8), (4, 8, 1), (4, 8, 1, 1), (4, 8, 1, 1, 1)]
    assert spelled((4, 8, 3, 3)) == [(4, 8, 3, 3)]


def test_methods_are_told_by_names_of_tensors_the_simplest_first() -> None:
    methods = kohya_methods()
    assert len(methods) > 1 and [len(each.below) for each in methods] == sorted(len(each.below) for each in methods)
    shapes = dict.fromkeys(["lora_up.weight", "lora_down.weight", "alpha"], Size([4, 4]))
    first = next(each for each in methods if each.reads(shapes))
    assert first.methods[0] == "lora"
    assert not any(each.reads({"alpha": Size()}) or each.reads({"weight": Size([4])}) for each in methods)
