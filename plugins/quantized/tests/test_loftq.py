"""LoftQ beside peft's, and in the three states of its host."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
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
    fill,
    gradients,
    inputs,
    packed,
)
from peft_pairs import ADAPTER, MERGED, MOVED, OUTPUTS, difference
from torch import nn
from torch.overrides import TorchFunctionMode

import peftcore
from peftcore.injection.quantization import round_trip, scheme_key
from peftcore.testing import against, conformance

NOISE = "what rounding loses is noise: with the weight in bfloat16 its principal directions are others"
MOVED_HOSTS = ("llama", "t5", "gpt2", "moe", "mistral", "vit", "dit")
RANK = 4


@conformance(
    "loftq",
    options={"*": {"rank": 3}},
    expected_failures={f"low_precision_hosts_keep_their_dtype-{host}": NOISE for host in MOVED_HOSTS},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


class OnCPU(TorchFunctionMode):
    """peft computes LoftQ on "cuda", whatever there is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            kind = value.type if isinstance(value, torch.device) else value
            return "cpu" if isinstance(kind, str) and kind == "cuda" else value

        return func(*map(here, args), **{key: here(value) for key, value in (kwargs or {}).items()})


def theirs(iterations: int, host: nn.Module, rank: int = RANK) -> Any:
    """A dense host by peft: its base weights become Q."""
    loftq = peft.LoftQConfig(loftq_bits=4, loftq_iter=iterations)
    config = peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=TARGET, init_lora_weights="loftq", loftq_config=loftq
    )
    with OnCPU():
        return peft.LoraModel(host, config, ADAPTER).model


@pytest.mark.filterwarnings("ignore:::peft")
@against("peft 0.21", "loftq")
def test_beside_peft_with_one_iteration() -> None:
    """Q bit for bit; the same product to start from (peft decomposes in float32, signs are free); then with the same
    numbers in A and B, outputs, gradients, merged weights."""
    model, reference = dense(), theirs(1, dense())
    injection = peftcore.apply(model, "loftq", target=TARGET, rank=RANK, iterations=1)
    pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
    for path, operator in injection.operators.items():
        layer, weight = reference.get_submodule(path), model.get_submodule(path).weight
        A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        assert torch.equal(operator.held(weight), layer.base_layer.weight)
        assert difference(operator.B @ operator.A, B @ A) <= 1e-4
        assert difference(A @ A.T, B.T @ B) <= 1e-4 and difference(operator.A @ operator.A.T, A @ A.T) <= 1e-4
        pairs += [(operator.A, A), (operator.B, B)]
    assert difference(model(inputs()), reference(inputs())) <= OUTPUTS
    fill(injection)
    for mine, other in pairs:
        other.data.copy_(mine)
    assert_same(gradients(model, [mine for mine, _ in pairs]), gradients(reference, [other for _, other in pairs]))
    injection.merge(into="float")
    for path in TARGET:
        layer = reference.get_submodule(path)
        expected = layer.base_layer.weight + layer.get_delta_weight(ADAPTER)
        assert difference(expected, dense().get_submodule(path).weight) >= MOVED
        assert difference(model.get_submodule(path).weight, expected) <= MERGED


def host(spread: str, seed: int) -> nn.Module:
    """Weights drawn from a distribution."""
    model, generator = dense(), torch.Generator().manual_seed(seed)
    for path in TARGET:
        weight = model.get_submodule(path).weight.detach()
        weight.uniform_(-1, 1, generator=generator) if spread == "uniform" else weight.normal_(generator=generator)
        if spread == "heavy":
            weight.pow_(3)
    return model


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize(("spread", "rank"), [("uniform", 16), ("normal", 4), ("heavy", 4)])
@pytest.mark.parametrize("seed", range(2))
def test_best_of_the_iterates_of_peft(seed: int, spread: str, rank: int) -> None:
    """Beside peft with each number of iterations: the least distance of all of them, and so never farther than its
    last. Of uniform weights the distance grows again."""
    model, gaps = host(spread, seed), []
    weights = {path: model.get_submodule(path).weight.detach() for path in TARGET}
    for count in range(1, 6):
        reference = theirs(count, host(spread, seed), rank)
        layers = {path: reference.get_submodule(path) for path in TARGET}
        held = {path: each.base_layer.weight + each.get_delta_weight(ADAPTER) for path, each in layers.items()}
        gaps.append({path: float((held[path] - weights[path]).norm()) for path in TARGET})
    injection = peftcore.apply(model, "loftq", target=TARGET, rank=rank, iterations=5)
    for path, operator in injection.operators.items():
        distance = float((operator.merged(weights[path]) - weights[path]).norm())
        assert distance == pytest.approx(min(gap[path] for gap in gaps), rel=1e-4)
        assert distance <= gaps[-1][path] * (1 + 1e-6)
        assert (distance < 0.99 * gaps[-1][path]) == (spread == "uniform")
        assert distance < 0.99 * float((round_trip(weights[path], scheme_key("nf4", {})) - weights[path]).norm())


@SCHEMES
@pytest.mark.parametrize("iterations", [1, 3])
def test_packed_is_simulated(iterations: int, scheme: str) -> None:
    """What is packed is W - B0 A0, not W."""
    assert_packed_is_simulated("loftq", scheme, rank=RANK, iterations=iterations)


@SCHEMES
@pytest.mark.parametrize("state", STATES)
def test_trains_and_merges(state: str, scheme: str) -> None:
    assert_trains_and_merges(state, "loftq", scheme, rank=RANK, iterations=3)


@pytest.mark.parametrize("loaded", STATES)
@pytest.mark.parametrize("saved", STATES)
@pytest.mark.parametrize("scheme", ["nf4", "bnb-nf4", "hqq-4"])
def test_saved_in_one_state_fits_the_others(tmp_path: Path, scheme: str, saved: str, loaded: str) -> None:
    """With one iteration all hold round(W)."""
    assert_saved_fits(tmp_path, saved, loaded, "loftq", scheme, rank=RANK, iterations=1)


@pytest.mark.parametrize("loaded", ["dense", "quantize"])
@pytest.mark.parametrize("saved", STATES)
def test_what_was_taken_out_is_saved_too(tmp_path: Path, saved: str, loaded: str) -> None:
    assert_saved_fits(tmp_path, saved, loaded, "loftq", "nf4", rank=RANK, iterations=3)


@pytest.mark.parametrize("saved", ["dense", "quantize"])
def test_on_a_base_that_others_packed_it_is_taken_out_in_forward(tmp_path: Path, saved: str) -> None:
    """round(W) - B0 A0 + B A in place of round(W - B0 A0) + B A."""
    _, injection = adapted(saved, "loftq", "nf4", rank=RANK, iterations=3)
    injection.save(tmp_path)
    model = packed("nf4")
    loaded = peftcore.load(model, tmp_path)
    expected = dense()
    for path, operator in injection.operators.items():
        assert operator.B0.abs().max() > 0
        assert torch.equal(loaded.operators[path].B0, operator.B0)
        change = operator.B @ operator.A - operator.B0 @ operator.A0
        expected.get_submodule(path).weight.data = model.get_submodule(path).weight + change.detach()
    assert difference(model(inputs()), expected(inputs())) <= OUTPUTS
    loaded.merge(into="float")
    for path in TARGET:
        assert difference(model.get_submodule(path).weight, expected.get_submodule(path).weight) <= MERGED


def test_starts_as_lora_where_the_original_is_gone() -> None:
    injection = peftcore.apply(packed("nf4"), "loftq", target=TARGET, rank=RANK)
    for operator in injection.operators.values():
        assert not operator.B.any() and not operator.B0.any() and operator.A.abs().max() > 0


def test_autocast_does_not_round_what_it_starts_from() -> None:
    started = []
    for rounding in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64))
        with torch.autocast("cpu", torch.bfloat16, enabled=rounding):
            started.append(peftcore.apply(model, "loftq", target="0", rank=4).state_dict())
    assert all(torch.equal(one, other) for one, other in zip(*(each.values() for each in started), strict=True))
