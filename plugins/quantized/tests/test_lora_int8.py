"""LoRA on an 8-bit base beside peft's on bitsandbytes, and beside its equation."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, assert_equation
from packed_bases import SCHEMES, assert_lives_on, dense, fill
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance

OTHER_CODES = "a weight that was cast to bfloat16 has other codes, and the choice of experts carries that on"
RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


@conformance(
    "lora_int8",
    options={"*": {"rank": 3}},
    expected_failures={"low_precision_hosts_keep_their_dtype-moe": OTHER_CODES},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    """Absmax of each row, written a second time."""

    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        rows = weight.detach().float().flatten(1)
        step = rows.abs().amax(1, keepdim=True) / 127
        rounded = (rows / step).round() * step
        delta = ALPHA / RANK * tensors["B"] @ tensors["A"].flatten(1)
        return (rounded.double() + delta).reshape(weight.shape)

    assert_equation(kind, "lora_int8", changed, **OPTIONS)


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("outliers", [False, True])
@against("peft 0.21", "lora_int8")
@against("bitsandbytes 0.50", "lora_int8")
def test_beside_peft_on_bitsandbytes(outliers: bool) -> None:
    """Outputs and gradients on LLM.int8, with and without columns of the input above the threshold; and merged into the
    same format, which peft does always."""
    pytest.importorskip("bitsandbytes")
    base, x = dense()
    if outliers:
        x[..., 7] = 20.0
    peftcore.quantize(base, "bnb-int8").is_loaded_in_8bit = True  # by this peft takes its layer for them
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["0", "2"])
    both = Both(base, "lora_int8", {"target": ["0", "2"], **OPTIONS}, config, pairs)
    both.assert_same_gradients(*both.assert_same_outputs(lambda model: model(x)))
    ours, theirs = both.ours, both.tuner.merge_and_unload()
    both.injection.merge(into="same")
    with torch.no_grad():
        for path in ("0", "2"):
            codes = [each.get_submodule(path).weight for each in (base, ours, theirs)]
            assert (codes[0].data != codes[1].data).any()
            assert torch.equal(codes[1].data, codes[2].data)
        assert difference(ours(x), theirs(x)) <= 1e-6


@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_packed_bases(scheme: str, tmp_path: Path) -> None:
    assert_lives_on(scheme, "lora_int8", tmp_path)


def test_a_merge_into_8_bits_keeps_what_4_bits_lose() -> None:
    errors = {}
    for scheme in ("int8", "nf4"):
        injection = peftcore.apply(peftcore.quantize(dense()[0], scheme), "lora_int8", target=["0", "2"])
        fill(injection)
        errors[scheme] = injection.merge(into="same").repacked["0"].error
    assert errors["int8"] <= 0.01
    assert errors["nf4"] >= 5 * errors["int8"]


def test_dropout_is_of_the_inputs_and_wants_a_packed_base() -> None:
    model, x = dense()
    with pytest.raises(UnsupportedSite, match="quantize first"):
        peftcore.apply(deepcopy(model), "lora_int8", target="0", dropout=0.5)
    injection = peftcore.apply(peftcore.quantize(model[:1], "int8"), "lora_int8", target="0", dropout=0.5, **OPTIONS)
    fill(injection)
    (operator,) = injection.operators.values()
    torch.manual_seed(1)
    ours = injection.model.train()(x)
    torch.manual_seed(1)
    dropped = nn.functional.dropout(x, 0.5)
    with injection.disabled():
        expected = injection.model(x) + ALPHA / RANK * dropped @ operator.A.T @ operator.B.T
    torch.testing.assert_close(ours, expected)
