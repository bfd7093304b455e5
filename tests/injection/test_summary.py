"""What an injection tells of itself."""

from core_toys import transformer

import peftcore


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


def test_what_a_method_leaves_frozen_is_regular() -> None:
    injection = peftcore.apply(transformer(), "loha")
    held = list(injection.parameters())
    injection.method.trainable = lambda model, config, applied: held[0].requires_grad_(True)  # type: ignore[assignment]
    injection.trainable()
    assert injection.summary().irregular == ()
    held[1].requires_grad_(True)
    assert injection.summary().irregular == (f"2 of {len(held)} tensors train",)
    injection.trainable(False)
    assert injection.summary().irregular == ()
