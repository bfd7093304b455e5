"""MiCA beside peft's and beside its equation: its frozen directions, and what it computes once it has trained."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from equation_in_float64 import KINDS, One, adapted, assert_equation, experts
from peft_folders import assert_reads, assert_writes
from peft_pairs import ADAPTER, Both, Pair, difference
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from two_layers import Two

from peftcore.testing import HOSTS, against, conformance

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
RANK, ALPHA = 3, 5.0
OPTIONS: dict[str, Any] = {"rank": RANK, "alpha": ALPHA}


@conformance("mica", options={"*": {"rank": 3, "alpha": 3.0}})
def test_conformance(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("kind", KINDS)
def test_directions_of_the_smallest_singular_values(kind: str) -> None:
    """By the eigenvectors of W W', another algorithm, of which the last with a value that is not zero by its shape."""
    operator = adapted(kind, "mica", **OPTIONS)[2]
    assert not operator.A.any()
    for W, tensors in experts(kind, operator):
        matrix = W.flatten(1)
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors
        first = max(0, len(matrix) - matrix.shape[1])
        expected = vectors[:, first : first + RANK].flip(1)
        assert difference(tensors["B"].abs(), expected.abs()) <= 1e-8
        assert (tensors["B"].gather(0, tensors["B"].abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_equation(kind: str) -> None:
    def changed(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
        return weight + ALPHA / RANK * (tensors["B"] @ tensors["A"].flatten(1)).view(weight.shape)

    assert_equation(kind, "mica", changed, **OPTIONS)


def test_rank_is_at_most_that_of_the_weight() -> None:
    operator = adapted("linear", "mica", rank=64, alpha=ALPHA)[2]
    assert (operator.A.shape, operator.B.shape, operator.scale) == ((7, 12), (7, 7), ALPHA / 64)


def two() -> Two:
    """Layers stored one way and the other."""
    return Two(nn.Linear(12, 7), Conv1D(9, 7))


def pairs(site: Any, operator: Any, theirs: nn.Module) -> Iterator[Pair]:
    """A is trained. B is the same up to signs, and gets those of peft's."""
    layer: Any = theirs.get_submodule(site.module_path)
    A, B = (
        (layer.lora_embedding_A[ADAPTER], layer.lora_embedding_B[ADAPTER])
        if site.layer.one_hot
        else (layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
    )
    assert not B.requires_grad and difference(operator.B.abs(), B.detach().abs()) <= 1e-4
    operator.B.copy_(B.detach())
    yield Pair(f"{site.path}.A", operator.A, A, lambda t: t)


@pytest.mark.parametrize("training", [False, True])
@against("peft 0.21", "mica")
def test_beside_peft(training: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=5, init_lora_weights="mica", target_modules=["first", "second"])
    both = Both(two().train(training), "mica", {"target": ["first", "second"], **OPTIONS}, config, pairs)
    count = sum(p.numel() for p in both.tuner.model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in both.injection.parameters()) == RANK * (12 + 7)
    x = torch.randn(4, 12)
    both.assert_same(lambda model: model(x))


@against("peft 0.21", "mica")
def test_an_embedding_beside_peft() -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=RANK, lora_alpha=5, init_lora_weights="mica", target_modules=["layer"])
    both = Both(One(nn.Embedding(9, 5)), "mica", {"target": "layer", **OPTIONS}, config, pairs)
    x = torch.randint(9, (4, 9))
    both.assert_same(lambda model: model(x))


LAYERS: dict[str, Any] = {
    "linear": (lambda: nn.Linear(12, 7), (2, 3, 12), True),
    "transposed": (lambda: Conv1D(7, 12), (2, 3, 12), True),
    "table": (lambda: nn.Embedding(9, 5), None, True),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, padding=1), (2, 4, 7, 6), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_files_of_peft(name: str, tmp_path: Path) -> None:
    """Where peft has no MiCA, and where a weight has fewer directions, it is written as LoRA."""
    build, shape, known = LAYERS[name]
    x = torch.randn(shape) if shape else torch.randint(9, (4, 9))
    written = assert_writes(One(build()), "mica", {"target": "layer", "rank": 3}, lambda model: model(x), tmp_path)
    assert written["init_lora_weights"] == ("mica" if known else True) and written["r"] == 3
    if known:
        config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights="mica", use_rslora=True, target_modules=["layer"])
        injection = assert_reads(One(build()), config, lambda model: model(x), tmp_path / "read")
        assert injection.method.name == "mica" and len(list(injection.parameters())) == 1
        wide = assert_writes(
            One(build()), "mica", {"target": "layer", "rank": 8}, lambda model: model(x), tmp_path / "wide"
        )
        assert (wide["r"], wide["init_lora_weights"]) == (8, True)


def test_a_model_in_files_of_peft(tmp_path: Path) -> None:
    model, inputs = HOSTS["llama"].build()
    config = peft.LoraConfig(
        r=4,
        init_lora_weights="mica",
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        task_type="CAUSAL_LM",
    )
    assert assert_reads(model, config, lambda adapted: adapted(**inputs).logits, tmp_path).method.name == "mica"
