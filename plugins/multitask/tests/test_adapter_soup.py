"""AdapterSoup: the kit; numbers of the adapters package; one adapter with the mean of the numbers, applied by itself in
float64; what has no mean."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapters_package as package
import pytest
import torch
from merging_toys import X, applied, equal, host, moved

import peftcore
from peftcore.errors import ConfigError, NotMergeable, UnsupportedSite
from peftcore.testing import against, conformance, frozen
from peftcore_multitask import gather

TARGET = {"target": ["first", "second"]}


@conformance("adapter_soup")
def test_conformance(check: Callable[[], None]) -> None:
    check()


PARTS: dict[str, dict[str, Any]] = {
    "houlsby_adapter": {"bottleneck": 4, "activation": "silu", "train_layer_norm": False, "joins": "matrix"},
    "lora": {"rank": 2, "alpha": 3, "target": ["attn.q", "attn.v"]},
}
MIXES: dict[str, list[float] | None] = {"mean": None, "weighted": [0.2, 1.1, -0.4]}


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("host_name", ["bert", "llama"])
@pytest.mark.parametrize("method", PARTS)
@against(
    "adapters 1.3",
    "adapter_soup",
    repository="adapter-hub/adapters",
    commit="88f18eb",
    script="src/adapters/model_mixin.py",
)
def test_the_numbers_of_the_adapters_package(method: str, host_name: str, mix: str) -> None:
    """In training. The package trains what it made of the parts; here each part has that gradient, times its weight."""
    numbers = frozen(Path(__file__).parent / "numbers" / "adapter_soup.json")[method][host_name][mix]
    model, weights = package.host(host_name), MIXES[mix]
    parts = [{"method": method, **PARTS[method]}] * 3
    soup = peftcore.apply(model, "adapter_soup", parts=parts, weights=weights, dtype="float64")
    for k, part in enumerate(soup.parts.values()):
        package.waves([p for graft in part.grafts for p in graft.operator.parameters()], 0.2 + k)
    for weight, part in zip(weights or [1 / 3] * 3, soup.parts.values(), strict=True):
        model.zero_grad()
        tensors = [p for graft in part.grafts for p in graft.operator.parameters()]
        gradients = {name: [weight * each for each in theirs] for name, theirs in numbers["gradients"].items()}
        package.assert_same(model, package.host(host_name), tensors, {**numbers, "gradients": gradients})


@pytest.mark.parametrize("weights", [None, [0.2, 1.1, -0.3]])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 2}),
        ("dora", {"rank": 2}),
        ("ia3", {}),
        ("bitfit", {}),
        ("parallel_adapter", {"bottleneck": 3}),
    ],
)
def test_a_soup_is_one_adapter_with_the_mean_of_the_numbers(
    method: str, options: dict[str, Any], weights: list[float] | None
) -> None:
    """Outputs, and gradients: each part has that of the mean, times its weight."""
    model, alone, used = host(), host(), weights or [1 / 3] * 3
    soup = applied(model, "adapter_soup", parts=[{"method": method, **options, **TARGET}] * 3, weights=weights)
    single = peftcore.apply(alone, method, dtype="float64", **options, **TARGET)
    parts: list[dict[str, torch.Tensor]] = [
        {f"{g.site.path}.{key}": value for g in part.grafts for key, value in g.operator.named_parameters()}
        for part in soup.parts.values()
    ]
    mean = {f"{path}.{key}": value for path, each in single.operators.items() for key, value in each.named_parameters()}
    with torch.no_grad():
        for key, value in mean.items():
            value.copy_(sum(weight * part[key] for weight, part in zip(used, parts, strict=True)))
    ours, expected = model(X), alone(X)
    assert equal(ours, expected) and moved(model)
    ours.square().sum().backward()
    expected.square().sum().backward()
    for key, value in mean.items():
        assert all(equal(part[key].grad, weight * value.grad) for weight, part in zip(used, parts, strict=True)), key


def test_of_loras_it_is_not_the_mean_of_the_changes() -> None:
    model = host()
    soup = applied(model, "adapter_soup", parts=[{"method": "lora", **TARGET}] * 2)
    change = peftcore.deltas(soup)["first"]
    every = [part.factors() for part in soup.operators["first"].soup.parts.values()]
    changes = sum(scale * B @ A / 2 for A, B, scale in every)
    assert equal(change, (every[0][1] + every[1][1]) @ (every[0][0] + every[1][0]) / 4)
    assert float((change - changes).detach().norm() / changes.detach().norm()) > 0.3


def test_bottlenecks_out_of_files(tmp_path: Path) -> None:
    """The paper's own case. What it makes is no change of weights."""
    model = host()
    for seed in range(2):
        applied(model, "parallel_adapter", seed, name=f"a{seed}", bottleneck=3, **TARGET).save(tmp_path / f"a{seed}")
    expected = peftcore.combine(model, {"a0": 0.5, "a1": 0.5}, "linear")
    other = host()
    soup = gather(other, "adapter_soup", {tmp_path / "a0": 0.5, tmp_path / "a1": 0.5})
    assert equal(other(X), model(X)) and moved(other) and expected.active
    with pytest.raises(NotMergeable):
        soup.merge()
    soup.save(tmp_path / "soup")
    again = host()
    peftcore.load(again, tmp_path / "soup")
    assert torch.equal(again(X), other(X))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([{"method": "lora"}, {"method": "lora", "rank": 2}], ConfigError, "differ in method, options or target"),
        ([{"method": "lora"}, {"method": "lora", "target": "first"}], ConfigError, "differ"),
        ([{"method": "adalora"}] * 2, ConfigError, "schedule"),
        ([{"method": "vera", **TARGET}] * 2, UnsupportedSite, "vera shares values"),
        (
            [{"method": "shira", "rank": 1, **TARGET}] * 2,
            UnsupportedSite,
            "shira shares values between sites or holds integers",
        ),
    ],
)
def test_what_has_no_mean(parts: list[dict[str, Any]], error: type[Exception], message: str) -> None:
    model = host()
    with pytest.raises(error, match=message):
        peftcore.plan(model, "adapter_soup", parts=parts)
    with pytest.raises(error, match=message):
        peftcore.apply(model, "adapter_soup", parts=parts)
