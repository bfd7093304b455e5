"""QLoRA beside peft's LoRA on a base of bitsandbytes, and in the three states of its host."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from packed_hosts import (
    SCHEMES,
    STATES,
    TARGET,
    adapted,
    assert_packed_is_simulated,
    assert_same,
    assert_saved_fits,
    assert_trains_and_merges,
    dense,
    gradients,
    inputs,
)
from peft_pairs import ADAPTER, MERGED, MOVED, Both, Pair, difference
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import against, conformance

RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


# A large update brings experts so near each other that rounding to half precision picks another one.
@conformance("qlora", options={"*": {"rank": 3}, "moe": {"rank": 3, "alpha": 1.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RUNS: dict[str, tuple[Callable[[], nn.Module], list[str], Callable[[nn.Module], Tensor]]] = {
    "mlp": (dense, TARGET, lambda model: model(inputs())),
    "llama": (llama, LINEAR, lambda model: model(torch.arange(24).view(2, 12) * 7 % 96).logits),
}


def beside(host: str, double_quant: bool) -> tuple[Both, Callable[[nn.Module], Tensor]]:
    """The host packed by bitsandbytes, adapted by both; all linear layers in the blocks."""
    build, target, run = RUNS[host]
    base: Any = peftcore.quantize(build(), "bnb-nf4", target=target, double_quant=double_quant)
    base.is_loaded_in_4bit = True  # as transformers marks it, and peft asks
    config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=target)
    return Both(base.train(), "qlora", {"target": target, **OPTIONS}, config, pairs), run


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("host", RUNS)
@against("peft 0.21", "qlora")
@against("bitsandbytes 0.50", "qlora")
def test_beside_peft(host: str, double_quant: bool) -> None:
    """Outputs and gradients; merged into floating point, what peft packs again; merged into the same format, its
    codes."""
    both, run = beside(host, double_quant)
    both.assert_same_gradients(*both.assert_same_outputs(run))
    layers = {site.path: both.tuner.model.get_submodule(site.module_path) for site in both.injection.sites}
    before = {path: dequantize_4bit(each.weight, each.weight.quant_state) for path, each in layers.items()}
    expected = {path: before[path] + each.get_delta_weight(ADAPTER) for path, each in layers.items()}
    both.injection.merge(into="float")
    for path, weight in expected.items():
        ours = both.ours.get_submodule(path).weight
        assert difference(ours, before[path]) >= MOVED
        assert difference(ours, weight) <= MERGED
    both.injection.unmerge()
    both.injection.merge(into="same", max_error=1)
    both.tuner.merge_adapter()
    for path, layer in layers.items():
        ours, theirs = both.ours.get_submodule(path).weight, layer.get_base_layer().weight
        assert ours.quant_state.nested == theirs.quant_state.nested == double_quant
        assert (ours.data != theirs.data).float().mean() <= 1e-3, "but for ties in rounding"


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("state", STATES)
@against("peft 0.21", "qlora")
@against("bitsandbytes 0.50", "qlora")
def test_reference_scheme_beside_peft(state: str, double_quant: bool) -> None:
    """The same numbers where nf4 is ours, and where the host is dense and packing is simulated."""
    both, _ = beside("mlp", double_quant)
    model, options = dense(), {"double_quant": double_quant}
    if state == "others":
        peftcore.quantize(model, "nf4", target=TARGET, **options)
    injection = peftcore.apply(model, "qlora", target=TARGET, scheme_options=options, **OPTIONS)
    for ours, pair in zip(injection.parameters(), both.pairs, strict=True):
        ours.data.copy_(pair.ours)
    if state == "quantize":
        peftcore.quantize(model, "nf4", target=TARGET, **options)
    expected = gradients(both.tuner.model, [pair.theirs for pair in both.pairs])
    assert_same(gradients(model, injection.parameters()), expected)


def test_starts_as_lora_on_the_packed_base() -> None:
    """B is zero, so the output is that of the packed host; the scale is alpha / rank."""
    injection = peftcore.apply(dense(), "qlora", target=TARGET, **OPTIONS)
    for operator in injection.operators.values():
        assert not operator.B.any()
        assert 0 < operator.A.abs().max() <= operator.A.shape[1] ** -0.5
        assert operator.scale == ALPHA / RANK


@SCHEMES
def test_packed_is_simulated(scheme: str) -> None:
    assert_packed_is_simulated("qlora", scheme, **OPTIONS)


@SCHEMES
@pytest.mark.parametrize("state", STATES)
def test_trains_and_merges(state: str, scheme: str) -> None:
    assert_trains_and_merges(state, "qlora", scheme, **OPTIONS)


@pytest.mark.parametrize("loaded", STATES)
@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("scheme", ["nf4", "bnb-nf4", "hqq-4"])
def test_saved_in_one_state_fits_the_others(tmp_path: Path, scheme: str, saved: str, loaded: str) -> None:
    assert_saved_fits(tmp_path, saved, loaded, "qlora", scheme, **OPTIONS)


def test_dropout_acts_on_the_update_in_training_alone() -> None:
    """And only where the base is packed: elsewhere the update is part of a weight."""
    model, _ = adapted("others", "qlora", "nf4", **OPTIONS, dropout=0.5)
    plain = adapted("others", "qlora", "nf4", **OPTIONS)[0](inputs())
    assert difference(model.eval()(inputs()), plain) <= 1e-6
    assert difference(model.train()(inputs()), plain) > 0.01
    with pytest.raises(UnsupportedSite, match="quantize first"):
        adapted("dense", "qlora", "nf4", **OPTIONS, dropout=0.5)
