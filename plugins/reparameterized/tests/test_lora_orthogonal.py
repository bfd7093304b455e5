"""The start="orthogonal" of LoRA (preset lora_orthogonal) beside peft's: no factor is zero, and their product is."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, adapted, experts, hosted
from one_layer import One
from peft_folders import assert_reads, assert_writes
from peft_pairs import Both, difference
from torch import nn

import peftcore
from peftcore.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
START: dict[str, Any] = {"start": "orthogonal"}


@pytest.mark.parametrize("kind", KINDS)
def test_the_product_is_zero_and_no_factor_is(kind: str) -> None:
    host, _, operator = adapted(kind, "lora", rank=4, **START)
    base, x = hosted(kind)
    assert difference(host(x), base(x)) <= 1e-6
    for _, tensors in experts(kind, operator):
        A, B = tensors["A"].flatten(1), tensors["B"]
        assert [torch.linalg.matrix_rank(each, rtol=1e-5) for each in (A, B)] == [2, 2], "half of the rank each"
        assert (B @ A).abs().max() <= 1e-6
        assert A.abs().max() > 1e-3 and B.abs().max() > 1e-3
    host(x).sum().backward()
    assert operator.A.grad.abs().max() > 0 and operator.B.grad.abs().max() > 0


def test_the_size_of_the_factors_is_that_of_peft() -> None:
    """Of 400 inputs and 300 outputs, by their mean squares."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=16, init_lora_weights="orthogonal", target_modules=["layer"])
    theirs: Any = peft.LoraModel(One(nn.Linear(400, 300)), config, "default").model.layer
    injection = peftcore.apply(One(nn.Linear(400, 300)), "lora_orthogonal", target="layer", rank=16)
    (ours,) = injection.operators.values()
    for own, other in ((ours.A, theirs.lora_A["default"].weight), (ours.B, theirs.lora_B["default"].weight)):
        assert own.shape == other.shape
        assert own.square().mean().item() == pytest.approx(other.square().mean().item(), rel=0.15)
        assert own.square().mean().item() == pytest.approx(0.01 / 2, rel=0.15)
    assert ours.factors()[2] == theirs.scaling["default"]


def test_trained_beside_peft() -> None:
    """A start is all that it is."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, init_lora_weights="orthogonal", target_modules=["layer"])
    both = Both(One(nn.Linear(12, 7)), "lora", {"target": "layer", "rank": 4, "alpha": 6.0, **START}, config)
    x = torch.randn(3, 12)
    both.assert_same(lambda model: model(x))


def test_files_of_peft(tmp_path: Path) -> None:
    x = torch.randn(3, 12)
    config = peft.LoraConfig(r=4, init_lora_weights="orthogonal", target_modules=["layer"])
    assert_reads(One(nn.Linear(12, 7)), config, lambda model: model(x), tmp_path / "read")
    written = assert_writes(
        One(nn.Linear(12, 7)), "lora", {"target": "layer", "rank": 4, **START}, lambda model: model(x), tmp_path
    )
    assert written["init_lora_weights"] is True


def test_an_odd_rank_has_no_halves() -> None:
    with pytest.raises(ConfigError, match="3 is odd"):
        peftcore.apply(One(nn.Linear(12, 7)), "lora_orthogonal", target="layer", rank=3)
    with pytest.raises(ConfigError, match="5 is odd"):
        peftcore.apply(One(nn.Linear(12, 7)), "lora_orthogonal", target="layer", overrides={"layer": {"rank": 5}})
