"""Arrow: the kit; peft's, on the same LoRAs; the equation, token by token; what cannot be chosen among."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from merging_toys import X, applied, equal, host, moved
from peft.tuners.lora import ArrowConfig
from peft_pairs import difference
from torch import Tensor, nn

import peftcore
from peftcore.errors import ConfigError, NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance
from peftcore_multitask import gather
from peftcore_multitask.arrow import prototype

TARGET = {"target": ["first", "second"]}
LORA = {"method": "lora", "rank": 3, **TARGET}


# Twice the rank is no width of these hosts: factors side by side are no effective weight.
PART = {"method": "lora", "rank": 3}


@conformance(
    "arrow",
    options={"*": {"parts": [PART] * 2}, "bert": {"parts": [PART] * 3, "top_k": 2}},
    expected_failures={"every_trainable_tensor_learns-bert": "a part that no token is most alike has no gradient"},
)
def test_conformance(check: Callable[[], None]) -> None:
    check()


def factors(injection: Any, path: str) -> list[tuple[Tensor, Tensor, float]]:
    return [each.factors() for each in injection.operators[path].parts.values()]


def routed(x: Tensor, every: list[tuple[Tensor, Tensor, float]], top_k: int, temperature: float) -> Tensor:
    """What is added, for one token after the other."""
    rows = []
    for token in x:
        likeness = [(torch.linalg.svd(B @ A)[2][0] @ token).abs() for A, B, _ in every]
        chosen = sorted(range(len(every)), key=lambda e: -likeness[e].item())[:top_k]
        shares = torch.stack([likeness[e] / temperature for e in chosen]).exp()
        changes = [every[e][2] * every[e][1] @ (every[e][0] @ token) for e in chosen]
        rows.append(sum(s * change for s, change in zip(shares / shares.sum(), changes, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equation(top_k: int) -> None:
    model, base = host(), host()
    injection = applied(
        model, "arrow", parts=[LORA, {**LORA, "rank": 2, "alpha": 5.0}, LORA], top_k=top_k, temperature=0.3
    )
    hidden = base.first(X) + routed(X, factors(injection, "first"), top_k, 0.3)
    expected = base.second(torch.tanh(hidden))
    expected = expected + routed(torch.tanh(hidden), factors(injection, "second"), top_k, 0.3)
    assert equal(model(X), expected) and moved(model)


def test_weights_and_general_knowledge() -> None:
    """The means of the last two are taken away from both factors of the others."""
    model, base = host(), host()
    parts = [{**LORA, "target": ["first"]}] * 4
    injection = applied(model, "arrow", parts=parts, general=2, weights=[2.0, -1.0, 1.0, 1.0])
    every = factors(injection, "first")
    A, B = ((every[2][side] + every[3][side]) / 2 for side in (0, 1))
    wanted = [(every[e][0] - A, every[e][1] - B, every[e][2] * (2.0, -1.0)[e]) for e in range(2)]
    hidden = base.first(X) + routed(X, wanted, 2, 1.0)
    assert equal(model(X), base.second(torch.tanh(hidden))) and moved(model)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_prototype_is_the_first_singular_vector(rank: int) -> None:
    torch.manual_seed(rank)
    for _ in range(10):
        A, B = torch.randn(rank, 9).double(), torch.randn(7, rank).double()
        found, expected = prototype(A, B), torch.linalg.svd(B @ A)[2][0]
        assert abs(abs(found @ expected) - 1) < 1e-10
    assert not prototype(torch.randn(rank, 9), torch.zeros(7, rank)).any()
    assert prototype(torch.randn(rank, 9).bfloat16(), torch.randn(7, rank).bfloat16()).norm() > 0.99


def distinct(A: Tensor, B: Tensor) -> None:
    """Give the product one direction that is far the largest, so that few steps find it."""
    A[0] *= 6
    B[:, 0] *= 6


@pytest.mark.filterwarnings("ignore:::peft")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("general", [0, 2])
@pytest.mark.parametrize("top_k", [1, 2, 3])
@against("peft 0.21", "arrow")
def test_beside_peft(top_k: int, general: int, training: bool, tmp_path: Path) -> None:
    """Outputs, and gradients of every factor. Peft's prototypes are in float32."""
    ours = host().train(training)
    parts = [{**LORA, "alpha": 4.0}] * (3 + general)
    injection = applied(ours, "arrow", parts=parts, top_k=top_k, temperature=0.5, general=general)
    base = host().train(training)
    plain = peft.LoraConfig(r=3, lora_alpha=4, target_modules=TARGET["target"])
    names = [f"task_{i}" for i in range(3)] + [f"gks_{i}" for i in range(general)]
    theirs = peft.PeftModel(base, plain, adapter_name=names[0])
    for name in names[1:]:
        theirs.add_adapter(name, plain)
    config = ArrowConfig(top_k=top_k, router_temperature=0.5, use_gks=general > 0, rng_seed=3)
    config.task_adapter_names, config.gks_adapter_names = names[:3], names[3:]
    theirs.add_adapter("arrow_router", peft.LoraConfig(r=3, target_modules=TARGET["target"], arrow_config=config))
    theirs = theirs.double()
    theirs.set_adapter("arrow_router")
    pairs = []
    for path in TARGET["target"]:
        layer: Any = theirs.base_model.model.get_submodule(path)
        for number, name in enumerate(names):
            A, B, _ = injection.operators[path].parts[str(number)].factors()
            with torch.no_grad():
                distinct(A, B)
                layer.lora_A[name].weight.copy_(A)
                layer.lora_B[name].weight.copy_(B)
            for mine, held in ((A, layer.lora_A[name].weight), (B, layer.lora_B[name].weight)):
                held.requires_grad_(name.startswith("task"))
                pairs.append((mine, held, name))
    found, expected = ours(X), theirs(X)
    assert moved(ours) and difference(found, expected) < 1e-6
    direction = torch.randn_like(found)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for mine, held, name in pairs:
        if name.startswith("task") and held.grad is not None:
            assert difference(mine.grad, held.grad) < 1e-5
    assert sum(held.grad is not None and held.grad.abs().max() > 0 for _, held, _ in pairs) >= 4


def test_loras_out_of_files(tmp_path: Path) -> None:
    """Those that other libraries wrote, too; what is made of them is saved and loaded."""
    model = host()
    for seed in range(3):
        options = {"rank": seed + 1, "name": f"a{seed}", **TARGET}
        applied(model, "lora", seed, **options).save(tmp_path / f"a{seed}", format="peft" if seed == 1 else "peftcore")
    other = host()
    arrow = gather(other, "arrow", {tmp_path / f"a{seed}": 1.0 for seed in range(3)}, top_k=2)
    assert moved(other) and not any(p.requires_grad for p in arrow.parameters())
    with pytest.raises(NotMergeable):
        arrow.merge()
    arrow.save(tmp_path / "arrow")
    again = host()
    peftcore.load(again, tmp_path / "arrow")
    assert torch.equal(again(X), other(X))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"general": 2}, ConfigError, "general=2 leaves none of 2 parts"),
        ({"parts": [LORA, {"method": "ia3", **TARGET}]}, UnsupportedSite, "not a product of two factors"),
        (
            {"parts": [LORA, {**LORA, "target": ["first"]}], "general": 1},
            UnsupportedSite,
            "must act at every site of the other parts",
        ),
        ({"parts": [LORA, {**LORA, "rank": 2}], "general": 1}, UnsupportedSite, "parts have different ranks"),
        ({"top_k": 0}, ConfigError, "top_k"),
    ],
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = host()
    with pytest.raises(error, match=message):
        peftcore.apply(model, "arrow", **options)
    assert not peftcore.injections(model)


def test_layers_without_tokens_are_refused() -> None:
    model = nn.Sequential(nn.Embedding(9, 5), nn.Conv1d(4, 4, 3))
    for target in ("0", "1"):
        with pytest.raises(UnsupportedSite, match="not a linear layer that is called by itself"):
            peftcore.apply(model, "arrow", parts=[{"method": "lora", "target": [target]}] * 2)
