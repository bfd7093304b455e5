"""What a plan tells before anything is done: the same as applying does."""

from typing import Any

import pytest
import torch
from core_toys import Doubling, SharedBases, Shift, Swap, Transformer, transformer

import peftcore

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


def test_plan_follows_the_wished_dtype() -> None:
    plans = [peftcore.plan(transformer(), "lora", dtype=dtype) for dtype in ("float32", "bfloat16")]
    assert plans[0].bytes == 2 * plans[1].bytes
