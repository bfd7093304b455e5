"""Methods in files of kohya: rank and alpha from tensors, the simplest first, and one module that is several here."""

import math

import pytest
import torch
from torch import Size, Tensor

from peftcore.errors import CheckpointError, ExportError
from peftcore.files.formats.kohya_method import Held, KohyaMethod, Piece, added, kohya_methods, method_of, spelled

DOWN, UP = "lora_down.weight", "lora_up.weight"


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


def of(*names: str) -> KohyaMethod:
    shapes = dict.fromkeys(names, Size([4, 4]))
    return next(each for each in kohya_methods() if each.reads(shapes))


def test_methods_are_told_by_names_of_tensors_the_simplest_first() -> None:
    methods = kohya_methods()
    assert len(methods) > 1 and [len(each.below) for each in methods] == sorted(len(each.below) for each in methods)
    assert of(UP, DOWN, "alpha").methods[0] == "lora"
    assert not any(each.reads({"alpha": Size()}) or each.reads({"weight": Size([4])}) for each in methods)


def test_what_stands_beside_a_method_is_told_from_its_own() -> None:
    methods = kohya_methods()
    shapes = {UP: Size([4, 2]), DOWN: Size([2, 4]), "diff_b": Size([4])}
    found = method_of(methods, shapes)
    assert added(methods, shapes) == {"diff_b": "bias"} and found is not None and found.methods[0] == "lora"
    assert added(methods, {"diff": Size([4, 4]), "diff_b": Size([4])}) == {}
    assert method_of(methods, shapes | {"dora_scale": Size([4, 1])}) is None


def piece(rank: int, outputs: int, alpha: float | None = 3.0, seed: int = 0) -> Piece:
    torch.manual_seed(seed)
    return Piece(alpha, {DOWN: torch.randn(rank, 6).double(), UP: torch.randn(outputs, rank).double()})


def update(given: Piece | None, outputs: int) -> Tensor:
    """The change of a weight, by the equation of the format."""
    if given is None:
        return torch.zeros(outputs, 6).double()
    rank = len(given.tensors[DOWN])
    return (rank if given.alpha is None else given.alpha) / rank * given.tensors[UP] @ given.tensors[DOWN]


def assert_parts(method: KohyaMethod, given: Piece, sizes: list[int]) -> list[Piece | None]:
    """The parts together change the weight as the whole does."""
    parts = method.cut(given, sizes)
    now = torch.cat([update(part, size) for part, size in zip(parts, sizes, strict=True)])
    torch.testing.assert_close(now, update(given, sum(sizes)), rtol=0, atol=1e-13)
    return parts


@pytest.mark.parametrize("alpha", [3.0, None])
def test_factors_that_all_modules_share(alpha: float | None) -> None:
    given = piece(6, 12, alpha)
    parts = assert_parts(of(UP, DOWN), given, [2, 4, 6])
    assert [len(part.tensors[DOWN]) for part in parts if part] == [6, 6, 6]
    again = of(UP, DOWN).joined(parts, [2, 4, 6])
    assert again.alpha == alpha and all(torch.equal(again.tensors[name], given.tensors[name]) for name in (UP, DOWN))


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 3, 2), (2, None, 3), (None, 4, None)])
@pytest.mark.parametrize("alphas", [(1.0, 1.0, 1.0), (0.5, 3.0, 7.0)], ids=["scales", "other_scales"])
def test_factors_beside_each_other(ranks: tuple[int | None, ...], alphas: tuple[float, ...]) -> None:
    """Block-diagonally, and each module gets its own ranks again."""
    method, sizes = of(UP, DOWN), [2, 4, 6]
    before = [
        None if rank is None else piece(rank, size, alpha * rank, seed=size)
        for rank, size, alpha in zip(ranks, sizes, alphas, strict=True)
    ]
    whole = method.joined(before, sizes)
    expected = torch.cat([update(each, size) for each, size in zip(before, sizes, strict=True)])
    torch.testing.assert_close(update(whole, 12), expected, rtol=0, atol=1e-13)
    parts = assert_parts(method, whole, sizes)
    assert [None if part is None else len(part.tensors[DOWN]) for part in parts] == list(ranks)


def test_a_rank_that_is_zero_everywhere_goes_by_the_order() -> None:
    """As where training has just begun: each module gets as many ranks."""
    parts = assert_parts(
        of(UP, DOWN), Piece(6.0, {DOWN: torch.ones(6, 6).double(), UP: torch.zeros(12, 6).double()}), [4] * 3
    )
    assert [(part.alpha, len(part.tensors[DOWN])) for part in parts if part] == [(2.0, 2)] * 3


def test_magnitudes_are_cut_and_none_is_lost() -> None:
    method = of(UP, DOWN, "dora_scale")
    assert method.methods[0] == "dora"
    before = [Piece(2.0, {**piece(2, 4, seed=index).tensors, "dora_scale": torch.rand(4, 1)}) for index in range(3)]
    whole = method.joined(before, [4, 4, 4])
    assert whole.tensors["dora_scale"].shape == (12, 1) and whole.tensors[DOWN].shape == (6, 6)
    for given, found in zip(before, method.cut(whole, [4, 4, 4]), strict=True):
        assert found is not None and found.alpha == 2.0
        assert all(torch.equal(found.tensors[name], given.tensors[name]) for name in given.tensors)
    with pytest.raises(ExportError, match=r"all of these modules must have the same dora_scale"):
        method.joined([before[0], None, before[2]], [4, 4, 4])
    alone = method.joined([piece(2, 4), piece(4, 4, seed=1)], [4, 4])
    magnitudes = Piece(alone.alpha, {**alone.tensors, "dora_scale": torch.rand(12, 1)})
    upper = torch.cat([alone.tensors[UP], torch.zeros(4, 6)])
    parts = method.cut(Piece(magnitudes.alpha, {**magnitudes.tensors, UP: upper}), [4, 4, 4])
    assert all(part is not None and len(part.tensors["dora_scale"]) == 4 for part in parts)


def test_halves_the_other_way_round() -> None:
    given = piece(2, 6)
    found = of(UP, DOWN).swapped(given)
    assert torch.equal(found.tensors[UP], given.tensors[UP].roll(3, 0)) and found.tensors[DOWN] is given.tensors[DOWN]


@pytest.mark.parametrize(
    "names", [("lokr_w1", "lokr_w2"), ("oft_blocks",), ("q_layer.weight", "p_layer.weight", "lambda_layer")]
)
def test_what_is_not_computed_output_by_output_is_not_cut_or_joined(names: tuple[str, ...]) -> None:
    method = next(each for each in kohya_methods() if each.methods[0] != "tlora" and set(names) <= set(each.below))
    given = Piece(1.0, {name: torch.ones(6, 6) for name in names})
    with pytest.raises(CheckpointError, match=rf"{names[0]} \(6, 6\).* cannot be split into modules with 2, 4 outputs"):
        method.cut(given, [2, 4])
    with pytest.raises(ExportError, match=names[0]):
        method.joined([given, given], [6, 6])


@pytest.mark.parametrize("up", [torch.ones(11, 4), torch.ones(12), torch.ones(()), torch.ones(12, 5)])
def test_tensors_of_other_sizes(up: Tensor) -> None:
    """They are refused here, or, where only the rank is wrong, when they are read."""
    given = Piece(1.0, {DOWN: torch.ones(4, 6), UP: up})
    if up.shape[:1] == (12,):
        assert len(of(UP, DOWN).cut(given, [6, 6])) == 2
    else:
        with pytest.raises(CheckpointError, match=r"cannot be split into modules with 6, 6 outputs"):
            of(UP, DOWN).cut(given, [6, 6])
    assert len(of(UP, DOWN).cut(Piece(1.0, {DOWN: torch.ones(()), UP: torch.ones(12, 4)}), [6, 6])) == 2
