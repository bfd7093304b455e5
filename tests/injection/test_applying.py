"""`apply`: what it returns, and errors before anything has changed."""

from typing import Any

import pytest
from core_toys import (
    Doubling,
    irregular,
    snapshot,
    transformer,
)

import peftcore
from peftcore.errors import (
    ConfigError,
    DuplicateInjection,
    TargetError,
    UnknownMethod,
    UnsupportedSite,
)


def test_apply_returns_what_injections_lists() -> None:
    model = transformer()
    assert peftcore.injections(model) == {}
    first, second = peftcore.apply(model, "lora"), peftcore.apply(model, "lora", name="again")
    assert peftcore.injections(model) == {"lora": first, "again": second}
    assert first.model is model and first.name == "lora" and first.active and second.active


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (UnknownMethod, {"method": "lorra"}),
        (ConfigError, {"method": "lora", "rank": 0}),
        (ConfigError, {"method": "lora", "dtype": "int8"}),
        (TargetError, {"method": "lora", "target": "nothing"}),
        (TargetError, {"method": "lora", "train": ["nothing"]}),
        (UnsupportedSite, {"method": "lora", "target": "norm"}),
        (UnsupportedSite, {"method": Doubling, "target": "norm.bias"}),
        (UnsupportedSite, {"method": "lora", "target": "mlp"}),
        (DuplicateInjection, {"method": "lora", "name": "a.b"}),
    ],
    ids=lambda value: "" if isinstance(value, type) else str(value),
)
def test_typed_errors_change_nothing(error: type[Exception], arguments: dict[str, Any]) -> None:
    model = irregular()
    before = snapshot(model)
    for call in (peftcore.apply, peftcore.plan):
        given = {k: v for k, v in arguments.items() if call is peftcore.apply or k != "name"}
        if call is peftcore.plan and "name" in arguments:
            continue
        with pytest.raises(error):
            call(model, **given)
        assert snapshot(model) == before
