"""MiSS beside peft's and beside its equation, column by column."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, assert_equation, hosted
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from two_layers import Two

from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import against, conformance


# The default rank is above the width of these hosts, where D would have the shape of weights; 3 leaves a last shard.
@conformance("miss", options={"*": {"rank": 3}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("miss", hosts=["llama"], options={"llama": {"rank": 4, "outputs": 2}})
def test_conformance_of_repeated_outputs(check: Callable[[], None]) -> None:
    check()


def shared(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    columns = weight.flatten(1).T
    rank = len(tensors["D"])
    return torch.stack([column + tensors["D"][j % rank] for j, column in enumerate(columns)], 1).view(weight.shape)


@pytest.mark.parametrize("rank", [1, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str, rank: int) -> None:
    """Of 12 columns, 5 leave a shard of 2."""
    assert_equation(kind, "miss", shared, rank=rank)


def repeated(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    D = tensors["D"]
    return shared(weight, {"D": torch.stack([D[:, o % D.shape[1]] for o in range(len(weight))], 1)})


def in_blocks(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    matrix, D = weight.flatten(1), tensors["D"]
    rank, changed = D.shape[-1], weight.flatten(1).clone()
    for i in range(0, matrix.shape[0], rank):
        for j in range(0, matrix.shape[1], rank):
            block = matrix[i : i + rank, j : j + rank]
            changed[i : i + rank, j : j + rank] = block + block @ D[i // rank] + D[i // rank]
    return changed.view(weight.shape)


def test_variants() -> None:
    """Of what these layers have, 3 divides 6 outputs, 9 and 24 columns; 5, 1 and 7 divide the others."""
    for kind, outputs in {"linear": 7, "convolution": 3, "grouped": 3, "embedding": 5, "experts": 7}.items():
        assert_equation(kind, "miss", repeated, rank=5, outputs=outputs)
    assert_equation("convolution", "miss", repeated, rank=5, outputs=2)
    for kind, rank in {"convolution": 3, "grouped": 3, "experts": 1, "embedding": 1, "linear": 1}.items():
        assert_equation(kind, "miss", in_blocks, rank=rank, bat=True)


def test_variants_need_even_sides() -> None:
    with pytest.raises(UnsupportedSite, match="7 outputs, which are not a multiple of outputs=2"):
        adapted("linear", "miss", outputs=2)
    with pytest.raises(UnsupportedSite, match="7 x 12, which blocks of rank=3 do not divide"):
        adapted("linear", "miss", rank=3, bat=True)
    with pytest.raises(ConfigError, match="bat does not work with dropout and outputs"):
        adapted("linear", "miss", rank=1, bat=True, dropout=0.1)


def test_a_rank_above_the_columns_is_a_full_update() -> None:
    """As much as there is, and no more: every row of D has its column."""
    assert_equation("linear", "miss", shared, rank=64)
    assert adapted("linear", "miss", rank=64)[2].D.shape == (12, 7)
    assert adapted("convolution", "miss", rank=64)[2].D.shape == (24, 6)


def two() -> Two:
    """Widths that shards of 4 divide, and that they do not."""
    return Two(nn.Linear(12, 7), nn.Linear(7, 9))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.D", operator.D, layer.miss_block[ADAPTER], lambda t: t)


@against("peft 0.21", "miss")
def test_beside_peft() -> None:
    torch.manual_seed(0)
    config = peft.MissConfig(r=4, target_modules=["first", "second"])
    both = Both(two(), "miss", {"target": ["first", "second"], "rank": 4}, config, pairs)
    x = torch.randn(2, 3, 12)
    both.assert_same(lambda model: model(x))


def test_dropout_drops_inputs_of_the_update_alone() -> None:
    """Where D is zero nothing changes, however much is dropped; later it does, in training alone."""
    host, _, operator = adapted("linear", "miss", rank=4, dropout=0.5)
    base, x = hosted("linear")
    assert torch.equal(host.train()(x), base(x))
    nn.init.ones_(operator.D)
    torch.manual_seed(0)
    kept = (host(x) - base(x))[..., 0] / 2  # of doubled inputs, of which each is there or not
    sums = torch.stack([x @ torch.tensor(list(map(int, f"{mask:012b}"))).double() for mask in range(2**12)], -1)
    assert ((sums - kept[..., None]).abs().amin(-1) <= 1e-12).all()
    assert difference(host.eval()(x), base(x) + x.sum(-1, keepdim=True)) <= 1e-12
    with pytest.raises(UnsupportedSite, match="dropout"):
        adapted("experts", "miss", dropout=0.5)
