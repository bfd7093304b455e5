"""KaSA beside peft's and beside its equation: what is taken away, the update, the losses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, assert_equation, experts, fill, hosted
from peft_folders import assert_reads, assert_writes
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from two_layers import Two

import peftcore
from peftcore.errors import UnsupportedSite
from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


@conformance("kasa", options={"*": {"rank": 3, "alpha": 3.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_taken_away(kind: str) -> None:
    """By the eigenvectors of W W', another algorithm."""
    operator = adapted(kind, "kasa", **OPTIONS)[2]
    for W, tensors in experts(kind, operator):
        matrix = W.flatten(1)
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
        kept = vectors[:, len(matrix) - (min(matrix.shape) - RANK) :]
        taken = tensors["B0"] @ tensors["A0"].flatten(1)
        assert difference(matrix - taken, kept @ kept.T @ matrix) <= 1e-8
        assert difference(tensors["A0"].flatten(1) @ tensors["A0"].flatten(1).T, torch.eye(RANK).double()) <= 1e-10


def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    U, S, V = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    truncated = (U[:, :-RANK] * S[:-RANK]) @ V[:-RANK]
    update = tensors["B"] @ torch.diag(tensors["d"]) @ tensors["A"].flatten(1)
    return (truncated + ALPHA / RANK * update).view(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    assert_equation(kind, "kasa", changed, **OPTIONS)


def test_dropout_drops_inputs_of_the_update_alone() -> None:
    host, _, operator = adapted("linear", "kasa", dropout=0.5, **OPTIONS)
    x = hosted("linear")[1]
    assert difference(host.train()(x), host.eval()(x)) <= 1e-12
    fill(operator)
    assert difference(host.train()(x), host.eval()(x)) > 1e-3


def test_rank_is_below_that_of_the_weight() -> None:
    operator = adapted("linear", "kasa", rank=64)[2]
    assert (operator.A.shape, operator.B0.shape) == ((6, 12), (7, 6))
    with pytest.raises(UnsupportedSite, match="no part of it would remain"):
        peftcore.plan(nn.Sequential(nn.Linear(4, 1)), "kasa", target="0")


def two() -> Two:
    """Two linear layers."""
    return Two(nn.Linear(12, 7), nn.Linear(7, 9, bias=False))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    layer: Any = theirs.get_submodule(site.module_path)
    yield Pair(f"{site.path}.A", operator.A, layer.lora_A[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.B", operator.B, layer.lora_B[ADAPTER].weight, lambda t: t)
    yield Pair(f"{site.path}.d", operator.d, layer.lora_diag[ADAPTER], lambda t: t)


def both(training: bool = False, beta: float = 1e-4, gamma: float = 1e-3) -> Both:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=5,
        kasa_config=peft.tuners.lora.config.KasaConfig(beta=beta, gamma=gamma),
        target_modules=["first", "second"],
    )
    options = {"target": ["first", "second"], "beta": beta, "gamma": gamma, **OPTIONS}
    compared = Both(two().train(training), "kasa", options, config, pairs)
    for pair in compared.pairs:
        compared.change(pair.name, lambda value: value.mul_(3))
    return compared


@pytest.mark.parametrize("training", [False, True])
@against("peft 0.21", "kasa")
def test_beside_peft(training: bool) -> None:
    compared = both(training)
    count = sum(p.numel() for p in compared.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in compared.injection.parameters()) == RANK * (12 + 7 + 1 + 7 + 9 + 1)
    x = torch.randn(4, 12)
    compared.accepted = 3e-6  # what is cut off a weight comes of its singular vectors, which both make in float32
    compared.assert_same(lambda model: model(x))


@pytest.mark.parametrize(("beta", "gamma"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@against("peft 0.21", "kasa")
def test_losses_beside_peft(beta: float, gamma: float) -> None:
    """The mean of two modules, where peft sums; and their gradients."""
    compared = both(beta=beta, gamma=gamma)
    ours = compared.injection.method.aux_loss(compared.injection)
    expected = compared.tuner._get_kasa_loss(ADAPTER) / 2
    assert ours is not None and ours.item() == pytest.approx(expected.item(), rel=1e-5)
    ours.backward()
    expected.backward()
    for pair in compared.pairs:
        if pair.theirs.grad is not None and pair.theirs.grad.any():
            assert difference(pair.ours.grad, pair.theirs.grad) <= 1e-5
        else:
            assert pair.ours.grad is None or not pair.ours.grad.any()


def test_no_losses() -> None:
    _, injection, _ = adapted("linear", "kasa", beta=0.0, gamma=0.0)
    assert injection.method.aux_loss(injection) is None
    _, injection, _ = adapted("linear", "kasa", gamma=0.0)
    assert injection.method.aux_loss(injection) > 0


LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_written_as_lora_of_twice_the_rank(name: str, tmp_path: Path) -> None:
    build, shape = LAYERS[name]
    x = torch.randn(shape)
    written = assert_writes(
        One(build()), "kasa", {"target": "layer", "rank": 3, "alpha": 5.0}, lambda model: model(x), tmp_path
    )
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (6, 10.0, True)


@pytest.mark.parametrize("rslora", [False, True])
def test_read(rslora: bool, tmp_path: Path) -> None:
    """The base that peft truncates is not the host's; loaded again it loses the same part."""
    model, inputs = HOSTS["llama"].build()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        kasa_config=peft.tuners.lora.config.KasaConfig(beta=0.5),
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    injection = assert_reads(model, config, lambda adapted: adapted(**inputs).logits, tmp_path)
    assert injection.method.name == "kasa" and (injection.config.beta, injection.config.gamma) == (0.5, 1e-3)
    assert injection.config.alpha == (12.0 if rslora else 6.0)
