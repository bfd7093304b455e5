"""What a method trains in models that people know: by hand, and nothing is allocated for it."""

import pytest

import peftcore
from peftcore.authoring.budgets import REFERENCES, budgets, reference

pytest.importorskip("transformers")


def test_lora_on_bert_by_hand() -> None:
    """Rank 8 on queries and values of twelve layers, each of 768 by 768."""
    config = peftcore.method("lora").Config()
    injection = peftcore.plan(reference("BERT base"), "lora")
    assert budgets("lora")["BERT base"] == injection.trainable
    assert injection.trainable == len(injection.sites) * config.rank * 2 * 768


def test_hosts_are_on_the_meta_device_and_made_once() -> None:
    host = reference("GPT-2")
    assert host is not None and host is reference("GPT-2")
    assert all(parameter.is_meta for parameter in host.parameters())


def test_hosts_where_a_method_has_nothing_to_act_on_are_left_out() -> None:
    found = budgets("prefix_tuning")
    assert "ResNet-50" not in found and "GPT-2" in found
    assert list(found) == [name for name in REFERENCES if name in found]


def test_a_library_that_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("no module named 'somewhere'")

    monkeypatch.setattr("peftcore.authoring.budgets.REFERENCES", {**REFERENCES, "Elsewhere": missing})
    assert reference("Elsewhere") is None and "Elsewhere" not in budgets("bitfit")
