"""The base that a folder names and its adapter, in one call, as peft's Auto classes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_hosts import host

from peftcore.errors import CheckpointError, ConfigError, HostMismatch

peft = pytest.importorskip("peft")
compat = pytest.importorskip("peftcore.compat")
auto = pytest.importorskip("peftcore.compat.auto")
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 15).reshape(2, 6)


def base(folder: Path) -> Any:
    """A model that knows where its weights lie."""
    host("llama").save_pretrained(folder / "base")  # type: ignore[operator]
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "base")


def noisy(model: Any) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_a_folder_of_peft_is_what_peft_makes_of_it(tmp_path: Path) -> None:
    made = peft.get_peft_model(base(tmp_path), peft.LoraConfig(r=2, task_type="CAUSAL_LM"))
    noisy(made)
    made.save_pretrained(str(tmp_path / "theirs"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "theirs"))
    ours = auto.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert isinstance(ours, peft.PeftModelForCausalLM) and not ours.training
    expected = theirs(input_ids=IDS).logits
    assert not torch.allclose(expected, base(tmp_path)(input_ids=IDS).logits)
    torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-6)
    assert ours.peft_config["default"].r == 2
    assert not any(parameter.requires_grad for parameter in ours.parameters())


@pytest.mark.parametrize("method", ["dora", "houlsby_adapter"])
def test_what_ours_wrote_comes_back_and_trains_on(method: str, tmp_path: Path) -> None:
    made = compat.get_peft_model(base(tmp_path), method)
    noisy(made)
    made.save_pretrained(tmp_path / "ours")
    found = auto.AutoPeftModel.from_pretrained(tmp_path / "ours", is_trainable=True, low_cpu_mem_usage=True)
    assert isinstance(found, peft.PeftModelForCausalLM)
    torch.testing.assert_close(found(input_ids=IDS).logits, made.eval()(input_ids=IDS).logits, rtol=1e-5, atol=1e-6)
    assert all(each.requires_grad for each in found.adapters["default"].parameters())


def test_another_task_a_base_that_is_gone_and_other_arguments_are_refused(tmp_path: Path) -> None:
    compat.get_peft_model(base(tmp_path), "dora").save_pretrained(tmp_path / "ours")
    with pytest.raises(HostMismatch, match="CAUSAL_LM"):
        auto.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match="dtype="):
        auto.AutoPeftModel.from_pretrained(tmp_path / "ours", autocast_adapter_dtype=False)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="base="):
        auto.AutoPeftModel.from_pretrained(tmp_path / "ours")
    auto.AutoPeftModel.from_pretrained(tmp_path / "ours", base=tmp_path / "elsewhere")
