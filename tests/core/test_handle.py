"""What an injection tells of itself, and what a plan tells before there is one."""

import functools
from typing import Any

import pytest
import torch
from core_toys import Doubling, SharedBases, Shift, Swap, Transformer, perceptron, stir, token_ids, transformer
from torch import nn

import peftcore
from peftcore.errors import InactiveSite, UnknownInjection

ALL = ["lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe"]
TOYS = [Doubling, Shift, Swap, SharedBases]


# what the handle tells


def test_summary_tells_the_state() -> None:
    model = transformer()
    injection = peftcore.apply(model, "lora", rank=2, train=["classifier"])
    summary = injection.summary()
    expected = 4 * 2 * 16 + 3 * 8 + 3
    assert (summary.name, summary.method, summary.sites) == ("lora", "lora", 6)
    assert (summary.parameters, summary.trainable) == (expected, expected)
    assert (summary.active, summary.merged, summary.dtypes, summary.devices) == (True, False, ("float32",), ("cpu",))
    assert summary.irregular == ()
    assert repr(injection) == f"Injection({summary})" and f"{expected:,} of {expected:,}" in str(summary)
    injection.merge()
    assert injection.summary().merged and "merged" in str(injection.summary())


def test_summary_flags_what_is_irregular() -> None:
    injection = peftcore.apply(transformer(), "lora")
    next(injection.parameters()).requires_grad_(False)
    assert injection.summary().irregular == ("7 of 8 tensors train",)
    assert "irregular: 7 of 8" in str(injection.summary())


@pytest.mark.parametrize("what", ["replaced", "patched", "ungrafted"])
def test_check_finds_what_is_no_longer_in_place(what: str) -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    injection.check()
    if what == "replaced":
        model.first = nn.Linear(4, 6)
    if what == "patched":
        model.first.forward = functools.partial(nn.Linear.forward, model.first)
    if what == "ungrafted":
        model.first.__class__ = nn.Linear
    with pytest.raises(InactiveSite, match="first") as caught:
        injection.check()
    assert "second" not in str(caught.value)
    assert injection.summary().irregular


BESIDE: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 2, "factors": 1},
    **{name: {} for name in ("dora", "hra", "loha", "lokr", "oft", "randlora")},
}
"""Methods on weights that can act beside them."""


@pytest.mark.parametrize("method", BESIDE)
def test_frugal_training_makes_the_weight_and_gives_the_same_numbers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = perceptron().double()
    injection = peftcore.apply(model, method, target=["first", "second"], dtype="float64", **BESIDE[method])
    stir(injection)
    operator = type(next(iter(injection.operators.values())))
    found = []
    for low_memory in (False, True, False):
        injection.low_memory = low_memory
        asked: list[bool] = []
        with monkeypatch.context() as patch:
            patch.setattr(operator, "prefers_activation_form", lambda self, x, asked=asked: not asked.append(True))
            output = model(torch.linspace(-1, 1, 20, dtype=torch.float64).view(5, 4))
        assert (not asked) is low_memory is injection.low_memory
        found.append([output, *torch.autograd.grad(output.square().sum(), list(injection.parameters()))])
    for beside, on, again in zip(*found, strict=True):
        torch.testing.assert_close(on, beside)
        assert torch.equal(again, beside)


def test_handle_of_a_removed_injection_refuses() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target="first")
    injection.remove()
    peftcore.apply(model, "lora", target="first")  # the name is in use again, by another
    for act in (
        injection.remove,
        injection.merge,
        injection.unmerge,
        injection.enabled,
        injection.trainable,
        injection.bake,
    ):
        with pytest.raises(UnknownInjection):
            act()
    with pytest.raises(UnknownInjection), injection.disabled():
        pass
    with pytest.raises(UnknownInjection):
        injection.low_memory = True
    assert list(peftcore.injections(model)) == ["lora"]


def test_base_state_dict_loads_into_an_adapted_host() -> None:
    fresh = transformer()
    model = Transformer()
    injection = peftcore.apply(model, "lora", train=["classifier"])
    stir(injection)
    kept = {key: value.clone() for key, value in injection.state_dict().items()}
    model.load_state_dict(fresh.state_dict())
    assert all(torch.equal(kept[key], value) for key, value in injection.state_dict().items())
    with injection.disabled():
        assert torch.equal(model.eval()(token_ids()), fresh(token_ids()))


def test_adapted_state_dict_round_trips_and_is_strict() -> None:
    models = [transformer() for _ in range(2)]
    injections = [peftcore.apply(model, "lora", train=["classifier"]) for model in models]
    stir(injections[0])
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(models[0](token_ids()), models[1](token_ids()))
    broken = {key: value for key, value in models[0].state_dict().items() if not key.endswith("q_proj.lora.A")}
    with pytest.raises(RuntimeError, match=r"q_proj\.lora\.A"):
        models[1].load_state_dict(broken)


# plan


@pytest.mark.parametrize("method", [*ALL, *TOYS], ids=lambda m: m if isinstance(m, str) else m.name)
def test_plan_on_the_meta_device_equals_apply(method: Any) -> None:
    with torch.device("meta"):
        empty = Transformer()
    before = [(path, type(module)) for path, module in empty.named_modules()]
    planned = peftcore.plan(empty, method, train=["norm"])
    assert [(path, type(module)) for path, module in empty.named_modules()] == before
    model = transformer()
    real = peftcore.plan(model, method, train=["norm"])
    total = sum(parameter.numel() for parameter in model.parameters())
    injection = peftcore.apply(model, method, train=["norm"])
    state = injection.state_dict()
    for plan in (planned, real):
        assert [site.path for site in plan.sites] == list(injection.operators)
        assert plan.shapes == {key: value.shape for key, value in state.items()}
        assert plan.trainable == sum(p.numel() for p in injection.parameters() if p.requires_grad)
        assert plan.total == total and plan.share == plan.trainable / total
        assert plan.bytes == sum(value.numel() * value.element_size() for value in state.values())
        assert f"{plan.trainable:,} trainable" in str(plan) and "layers.[0-1]" in plan.tree()


def test_plan_follows_the_wished_dtype() -> None:
    plans = [peftcore.plan(transformer(), "lora", dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert plans[0].bytes == 2 * plans[1].bytes
