"""What a plan tells before anything is done: the same as applying does."""

from typing import Any

import pytest
import torch
from core_toys import Doubling, SharedBases, Shift, Swap, Transformer, transformer

import peftcore
from peftcore.errors import PluginError
from peftcore.testing import HOSTS

ALL = ["lora", "dora", "ia3", "houlsby_adapter", "bitfit", "ln_tuning", "linear_probe"]
TOYS = [Doubling, Shift, Swap, SharedBases]


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


PROMPT = {"method": "prompt_tuning", "length": 3}
LORA = {"method": "lora", "rank": 2}
WITH_FROZEN: dict[str, tuple[dict[str, Any], int, int]] = {
    # LoRAs of five tasks before, and the key of each of these; the sixth trains.
    "sapt": ({"tasks": 6, "rank": 2}, 5, 5),
    # Two prompts of three rows that are given.
    "attempt": ({"parts": [PROMPT] * 2, "train_parts": False}, 0, 2 * 3),
    # Two LoRAs that are given.
    "xlora": ({"parts": [LORA] * 2, "train_parts": False}, 2, 0),
}
"""Options, and how many LoRAs of rank 2 and how many rows as wide as the stream stay frozen."""


def llama() -> Any:
    return HOSTS["llama"].build()[0]


@pytest.mark.parametrize("name", WITH_FROZEN)
def test_what_an_adapter_brings_and_leaves_frozen_is_not_counted_as_trainable(name: str) -> None:
    options, loras, rows = WITH_FROZEN[name]
    model = llama()
    frozen = loras * peftcore.plan(model, "lora", rank=2).trainable + rows * model.config.hidden_size
    plan = peftcore.plan(model, name, **options)
    injection = peftcore.apply(llama(), name, **options)
    trained = sum(each.numel() for each in injection.parameters() if each.requires_grad)
    assert (plan.trainable, plan.parameters) == (trained, trained + frozen)
    assert f"{trained:,} trainable" in str(plan) and f"{frozen:,} frozen in the adapter" in str(plan)
    assert (summary := injection.summary()).trainable == trained and summary.parameters == plan.parameters


def test_a_hybrid_counts_what_its_parts_train() -> None:
    parts = [("sapt", {"tasks": 6, "rank": 2}), ("ln_tuning", {})]
    plan = peftcore.plan(llama(), [{"method": name, **options} for name, options in parts])
    alone = [peftcore.plan(llama(), name, **options) for name, options in parts]
    assert plan.trainable == sum(each.trainable for each in alone)
    assert plan.frozen == alone[0].frozen > 0


def test_a_method_that_asks_a_plan_for_its_injection_is_told_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asking(method: Any, model: Any, config: Any, injection: Any) -> None:
        injection.whole.parameters()

    monkeypatch.setattr(Doubling, "trainable", asking)
    with pytest.raises(PluginError, match=r"toy_doubling.*choose by `operators`"):
        peftcore.plan(transformer(), Doubling)


def test_plan_follows_the_wished_dtype() -> None:
    plans = [peftcore.plan(transformer(), "lora", dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert plans[0].bytes == 2 * plans[1].bytes
