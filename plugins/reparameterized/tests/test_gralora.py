"""GraLoRA beside peft's and beside its equation, block by block."""

from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import adapted, assert_equation, logical
from peft_pairs import ADAPTER, Both, Pair
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

import peftcore
from peftcore.errors import ConfigError, UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK, ALPHA = 6, 9.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


# The default rank is above what these hosts have.
@conformance("gralora", options={"*": {"rank": 4, "alpha": 8.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@conformance("gralora", hosts=["llama"], options={"llama": {"rank": 4, "alpha": 12.0, "hybrid_rank": 2}})
def test_conformance_of_the_hybrid(check: Callable[[], None]) -> None:
    check()


def equation(k: int, scale: float) -> Callable[[Tensor, dict[str, Tensor]], Tensor]:
    def blocks(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        A, B = tensors["A"], tensors["B"]
        part = A.shape[-2] // k
        rows = []
        for j in range(k):
            row = [B[j][:, n * part : (n + 1) * part] @ A[n][j * part : (j + 1) * part] for n in range(k)]
            rows.append(torch.cat(row, 1))
        update = torch.cat(rows)
        if "hybrid_A" in tensors:
            update = update + tensors["hybrid_B"] @ tensors["hybrid_A"].flatten(1)
        return weight + scale * update.view(weight.shape)

    return blocks


CUT = {"convolution": 3, "grouped": 3, "linear": 1, "wide": 1, "experts": 1, "embedding": 1}
"""How many parts both sides of each layer's weight have."""


@pytest.mark.parametrize("hybrid_rank", [0, 2])
@pytest.mark.parametrize("kind", CUT)
def test_equation(kind: str, hybrid_rank: int) -> None:
    scale = ALPHA / (RANK + hybrid_rank)
    assert_equation(kind, "gralora", equation(CUT[kind], scale), **OPTIONS, blocks=CUT[kind], hybrid_rank=hybrid_rank)


def test_start() -> None:
    """Nothing, of LoRA's size in each block; an embedding starts from the other side."""
    _, _, operator = adapted("convolution", "gralora", **OPTIONS, blocks=2)  # 6 x 24
    assert operator.A.shape == (2, RANK, 12)
    assert operator.B.shape == (2, 3, RANK)
    bound = (2 / 24) ** 0.5
    assert 0.95 * bound < operator.A.abs().max() <= bound
    assert not operator.B.any()
    _, _, table = adapted("embedding", "gralora", **OPTIONS, blocks=1)
    assert not table.A.any()
    assert table.B.std() > 0.5


def test_the_update_has_a_higher_rank_than_lora() -> None:
    model = nn.Sequential(nn.Linear(40, 48)).double()
    before = model[0].weight.detach().clone()
    injection = peftcore.apply(model, "gralora", target="0", rank=8, blocks=4, dtype="float64")
    nn.init.normal_(injection.operators["0"].B)
    injection.merge()
    assert torch.linalg.matrix_rank(model[0].weight - before) == 32


def test_what_does_not_cut_evenly_is_refused() -> None:
    with pytest.raises(UnsupportedSite, match="7 x 12, which blocks=2 does not divide"):
        adapted("linear", "gralora", **OPTIONS, blocks=2)
    with pytest.raises(ConfigError, match="rank=6 is not a multiple of blocks=4"):
        adapted("linear", "gralora", **OPTIONS, blocks=4)


def two() -> Two:
    """Stored one way and the other."""
    return Two(nn.Linear(12, 6), Conv1D(9, 6))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.gralora_A[ADAPTER], lambda t: t.mT)
    yield Pair(f"{site.path}.B", operator.B, layer.gralora_B[ADAPTER], lambda t: t.mT)
    if operator.hybrid:
        for mine, other in ((operator.hybrid_A, layer.gralora_A_general), (operator.hybrid_B, layer.gralora_B_general)):
            yield Pair(f"{site.path}.hybrid", mine, other[ADAPTER].weight, lambda t: t)


def both(base: nn.Module, target: list[str], blocks: int, hybrid_rank: int, dropout: float = 0.0) -> Both:
    config = peft.GraloraConfig(
        target_modules=target, r=RANK, alpha=9, gralora_k=blocks, hybrid_r=hybrid_rank, gralora_dropout=dropout
    )
    ours = {"target": target, **OPTIONS, "blocks": blocks, "hybrid_rank": hybrid_rank, "dropout": dropout}
    return Both(base, "gralora", ours | {"dtype": str(next(base.parameters()).dtype)[6:]}, config, pairs)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("blocks", "hybrid_rank"), [(3, 0), (3, 2), (1, 0)])
@against("peft 0.21", "gralora")
def test_beside_peft(blocks: int, hybrid_rank: int, training: bool) -> None:
    """Outputs, gradients, merged weights, and as many parameters."""
    torch.manual_seed(0)
    compared = both(two().double().train(training), ["first", "second"], blocks, hybrid_rank)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == (RANK + hybrid_rank) * (12 + 6 + 6 + 9)
    x = torch.randn(2, 3, 12).double()
    compared.assert_same(lambda model: model(x))


@against("peft 0.21", "gralora")
def test_dropout_beside_peft() -> None:
    torch.manual_seed(0)
    compared = both(two().double().train(), ["first"], 3, 0, dropout=0.4)
    x = torch.randn(2, 3, 12).double()
    compared.assert_same_outputs(lambda model: model(x))


@against("peft 0.21", "gralora")
def test_a_model_beside_peft() -> None:
    model, inputs = HOSTS["llama"].build()
    both(model.eval(), ["q_proj", "v_proj"], 2, 0).assert_same(lambda adapted: adapted(**inputs).logits)


def test_factors_are_the_update() -> None:
    host, _, operator = adapted("convolution", "gralora", **OPTIONS, blocks=3, hybrid_rank=2)
    weight = logical("convolution", host)
    nn.init.normal_(operator.B)
    A, B, scale = operator.factors()
    assert A.shape == (3 * RANK + 2, *weight.shape[1:])
    torch.testing.assert_close(operator.merged(weight), weight + scale * (B @ A.flatten(1)).view(weight.shape))
