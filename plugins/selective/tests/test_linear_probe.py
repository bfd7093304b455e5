"""Linear probe: the head trains, on features that stay. That this equals training the head in place is shown by the
repository's side-by-side tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import TargetError
from peftcore.testing import against, conformance, frozen
from peftcore.testing.hosts import HOSTS

NUMBERS = Path(__file__).parent / "numbers" / "vpt_transfer.json"


@conformance("linear_probe")
def test_conformance(check: Callable[[], None]) -> None:
    check()


def host(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """In evaluation, and frozen: torch picks other kernels for what needs gradients."""
    model, inputs = HOSTS[name].build()
    return model.eval().requires_grad_(False), inputs


@pytest.mark.parametrize(
    ("name", "head", "count"),
    [
        ("bert", {"classifier", "classifier.bias"}, 3 * (16 + 1)),
        ("llama", {"lm_head"}, 40 * 16),
        ("gpt2", {"lm_head.weight"}, 40 * 16),
        ("convnet", {"head", "head.bias"}, 5 * (16 + 1)),
        ("mlp", {"head", "head.bias"}, 5 * (16 + 1)),
    ],
)
def test_the_head_trains_and_nothing_else(name: str, head: set[str], count: int) -> None:
    """classes * (d + 1) for a linear head."""
    model, _ = host(name)
    assert peftcore.plan(model, "linear_probe").trainable == count
    injection = peftcore.apply(model, "linear_probe")
    assert {path.removesuffix(".weight") for path in injection.operators} == {
        each.removesuffix(".weight") for each in head
    }
    assert sum(p.numel() for p in injection.parameters() if p.requires_grad) == count
    assert [p for p in model.parameters() if p.requires_grad] == list(injection.parameters())


@against(
    "authors",
    "linear_probe",
    repository="KMnP/vpt",
    commit="4410440",
    script="src/models/vit_models.py",
    part="trains",
)
def test_what_trains_is_what_the_authors_train() -> None:
    timm = pytest.importorskip("timm")
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2}
    sites = peftcore.apply(timm.models.VisionTransformer(**sizes, num_classes=3), "linear_probe").sites
    assert {f"{site.module_path}.{site.tensor}" for site in sites} == set(frozen(NUMBERS, "trains")["linear"])


def test_features_stay_while_the_head_learns() -> None:
    """Fitting noise to nothing by a head alone: a convex problem on fixed features."""
    model, inputs = host("bert")
    seen: list[Tensor] = []
    model.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    injection = peftcore.apply(model, "linear_probe")
    optimizer = torch.optim.SGD(injection.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(**inputs).logits, torch.tensor([0, 2]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(torch.equal(features, seen[0]) for features in seen)
    assert all(not features.requires_grad for features in seen)
    assert sorted(losses, reverse=True) == losses
    assert losses[-1] < 0.5 * losses[0]


def test_the_hosts_own_head_stays_and_comes_back() -> None:
    model, inputs = host("bert")
    own, before = model.classifier.weight.detach().clone(), model(**inputs).logits
    injection = peftcore.apply(model, "linear_probe")
    value = injection.operators["classifier"].value
    assert torch.equal(value, own)
    nn.init.normal_(value)
    features = torch.randn(4, 16)
    bias = injection.operators["classifier.bias"].value
    torch.testing.assert_close(model.classifier(features), features @ value.T + bias)
    assert torch.equal(model.classifier.weight, own)
    injection.remove()
    assert torch.equal(model(**inputs).logits, before)


def test_a_tied_head_takes_the_table_along() -> None:
    """One tensor, one value: while the probe acts, the embedding sees it too, as training in place would have it."""
    model, inputs = host("gpt2")
    injection = peftcore.apply(model, "linear_probe")
    (operator,) = injection.operators.values()
    nn.init.normal_(operator.value)
    ids = inputs["input_ids"]
    assert torch.equal(model.transformer.wte(ids), operator.value[ids])
    injection.bake()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, operator.value)


def test_target_and_train_say_what_the_head_is() -> None:
    model, _ = host("bert")
    injection = peftcore.apply(model, "linear_probe", target="bert.pooler.dense")
    assert injection.operators.keys() == {"bert.pooler.dense", "bert.pooler.dense.bias"}
    injection.remove()
    injection = peftcore.apply(model, "linear_probe", train=["pooler.dense"])
    assert len(injection.operators) == 4


def test_a_host_without_a_head_needs_to_be_told() -> None:
    body = host("llama")[0].model
    with pytest.raises(TargetError, match="head"):
        peftcore.apply(body, "linear_probe")
    assert peftcore.apply(body, "linear_probe", train=["norm"]).operators.keys() == {"norm"}
