"""The schemes under the kit for quantizers, and under methods of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import peftcore
from peftcore.injection.quantization import scheme
from peftcore.registry.plugins import layer_of
from peftcore.testing import quantizer_conformance
from peftcore.testing.kit import fill
from peftcore.testing.quantizers import LINEAR, QuantizerCase

BNB = {"state_is_saved_and_loaded": "bitsandbytes cannot load the keys that its Linear4bit writes"}
AO = {"state_is_saved_and_loaded": "safetensors stores no subclasses of tensors"}
INPUTS_TOO = 0.03
"""LLM.int8 packs what goes into a layer as well."""


@quantizer_conformance("nf4")
def test_nf4(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("nf4", double_quant=True)
def test_nf4_with_double_quant(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("int8")
def test_int8(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("int4")
def test_int4(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("bnb-nf4", declared=BNB)
def test_bnb_nf4(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("bnb-nf4", declared=BNB, double_quant=True)
def test_bnb_nf4_with_double_quant(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("bnb-fp4", declared=BNB)
def test_bnb_fp4(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("bnb-int8", tolerance=INPUTS_TOO)
def test_bnb_int8(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("torchao-int8", declared=AO)
def test_torchao_int8(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("torchao-int4", declared=AO)
def test_torchao_int4(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("torchao-float8", declared=AO)
def test_torchao_float8(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("hqq-8")
def test_hqq_8(check: Callable[[], None]) -> None:
    check()


@quantizer_conformance("hqq-4")
def test_hqq_4(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("double", [False, True], ids=["plain", "double"])
def test_nf4_is_that_of_bitsandbytes_to_the_bit(double: bool) -> None:
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(96, 320, generator=torch.Generator().manual_seed(3))
    ours, theirs = scheme("nf4", double_quant=double), scheme("bnb-nf4", double_quant=double)
    read, expected = (each.layer.unpack(each.module(weight)).view(-1, 64) for each in (ours, theirs))
    other = (read != expected).any(1)
    assert other.sum() <= (5 if double else 0)  # of 480 blocks
    torch.testing.assert_close(read, expected, rtol=2e-3, atol=0)  # by one level of their absmax


METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "bitfit": {"add_missing_bias": True},
    "ia3": {},
}
PACKED = {"nf4": None, "int8": None, "bnb-nf4": None, "bnb-int8": INPUTS_TOO, "torchao-int8": None, "hqq-8": None}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("method", METHODS)
def test_methods_train_and_merge_as_on_the_dense_weights_that_are_read(method: str, name: str) -> None:
    pytest.importorskip({"bnb": "bitsandbytes", "tor": "torchao", "hqq": "hqq"}.get(name[:3], "torch"))
    case = QuantizerCase(name, {}, PACKED[name])
    model = case.packed()
    base, twin = case.run(model), case.twin(model)
    both = []
    for each in (model, twin):
        injection = peftcore.apply(each, method, target=list(LINEAR), seed=0, **METHODS[method])
        fill(injection)
        both.append((injection, case.train(each, injection)))
    (injection, gradients), (_, expected) = both
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0
        case.expect_near(gradients[key], gradient, key)
    adapted, before = case.run(model), case.state(model)
    case.expect_moved(adapted, base, "output")
    case.expect_near(adapted, case.run(twin), "output")
    injection.merge(into="float")
    case.expect_near(case.run(model), adapted, "output when merged")
    assert layer_of(model.first, "weight").packed == (method == "bitfit")
    injection.unmerge()
    case.expect_unchanged(before, model, "merged and unmerged")
    report = injection.merge(into="same")
    assert set(report.repacked) == (set() if method == "bitfit" else set(LINEAR))
    assert all(0 < each.error < 0.11 for each in report.repacked.values())
    injection.remove()
    assert torch.equal(case.run(model), base)
