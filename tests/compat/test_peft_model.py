"""A model of peft that is ours computes, switches, merges and saves as one that is peft's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_hosts import host

import peftcore
from peftcore.errors import (
    ConfigError,
    DuplicateInjection,
    MergeError,
    NotMergeable,
    SwapError,
    UnknownInjection,
    UnsupportedHost,
)

peft = pytest.importorskip("peft")
compat = pytest.importorskip("peftcore.compat")

IDS = torch.arange(3, 15).reshape(2, 6)
CONFIGS = {
    "lora": peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]),
    "dora": peft.LoraConfig(r=4, target_modules=["v_proj"], use_dora=True),
    "loha": peft.LoHaConfig(r=2, alpha=4, target_modules=["q_proj"]),
    "oft": peft.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "head": peft.LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"]),
}


def base() -> Any:
    return host("llama").double()


def noisy(model: nn.Module) -> None:
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
        return found


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def pair(name: str, folder: Path) -> tuple[Any, Any]:
    """peft's model and ours with the values that peft saved."""
    theirs = peft.get_peft_model(base(), copy.deepcopy(CONFIGS[name])).double()
    noisy(theirs)
    theirs.save_pretrained(str(folder))
    return theirs.eval(), compat.PeftModel.from_pretrained(base(), folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_values_compute_the_same(name: str, tmp_path: Path) -> None:
    plain = logits(base())
    theirs, ours = pair(name, tmp_path / "theirs")
    assert isinstance(ours, peft.PeftModel)
    assert not torch.allclose(logits(ours), plain)
    close(logits(ours), logits(theirs))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), plain)
        close(logits(theirs), plain)
        assert ours.active_adapter == "default" and not ours.has_active_enabled_adapter
    close(logits(ours), logits(theirs))
    assert type(ours.peft_config["default"]) is type(theirs.peft_config["default"])
    ours.save_pretrained(tmp_path / "ours")
    close(logits(peft.PeftModel.from_pretrained(base(), str(tmp_path / "ours"))), logits(theirs))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_merged_is_what_peft_merges(name: str, tmp_path: Path) -> None:
    theirs, ours = pair(name, tmp_path)
    acted, before = logits(theirs), {key: value.clone() for key, value in ours.get_base_model().state_dict().items()}
    ours.merge_adapter()
    close(logits(ours), acted)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(base()))
    close(logits(ours), acted)
    ours.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in ours.get_base_model().state_dict().items())
    merged, expected = ours.merge_and_unload(), theirs.merge_and_unload()
    assert not peftcore.injections(merged)
    theirs_by_name = dict(expected.named_parameters())
    assert merged.state_dict().keys() == base().state_dict().keys()
    for key, value in merged.named_parameters():
        close(value, theirs_by_name[key])


@pytest.mark.parametrize("name", ["lora", "dora", "loha"])
def test_a_configuration_of_peft_trains_as_peft_trains_it(name: str) -> None:
    one, other = base(), base()
    torch.manual_seed(7)
    theirs = peft.get_peft_model(one, copy.deepcopy(CONFIGS[name])).double()
    ours = compat.get_peft_model(other, copy.deepcopy(CONFIGS[name]))  # drawn from the same seed
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    losses: list[list[float]] = [[], []]
    for model, seen in zip((theirs, ours), losses, strict=True):
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
        for _ in range(4):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)  # transformers has losses in float32
    assert losses[1][-1] < losses[1][0]


def test_adapters_are_added_chosen_routed_and_deleted(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(base(), copy.deepcopy(CONFIGS["lora"]))
    theirs.add_adapter("second", peft.LoraConfig(r=2, target_modules=["up_proj"]))
    theirs.double().set_adapter("second")
    noisy(theirs)
    theirs.set_adapter("default")
    noisy(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = compat.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    ours.load_adapter(tmp_path / "second", "second", is_trainable=True)
    assert list(ours.peft_config) == ["default", "second"] and ours.active_adapters == ["default"]
    close(logits(ours), logits(theirs.eval()))
    for model in (theirs, ours):
        model.set_adapter("second")
    assert ours.active_adapter == "second"
    close(logits(ours), logits(theirs))
    trained = {name for name, each in ours.named_parameters() if each.requires_grad}
    assert trained and all(".second." in name for name in trained)
    names = ["second", "default"]
    close(ours(input_ids=IDS, adapter_names=names).logits, theirs(input_ids=IDS, adapter_names=names).logits)
    mixed = ours.generate(input_ids=IDS, adapter_names=names, max_new_tokens=4, do_sample=False)
    assert torch.equal(mixed, theirs.generate(input_ids=IDS, adapter_names=names, max_new_tokens=4, do_sample=False))
    with pytest.warns(UserWarning, match="'default' is active now"):
        ours.delete_adapter("second")
    theirs.set_adapter("default")
    close(logits(ours), logits(theirs))
    with pytest.raises(ConfigError, match="unload"):
        ours.delete_adapter("default")


def test_values_are_loaded_into_an_adapter_that_is_there(tmp_path: Path) -> None:
    theirs, _ = pair("lora", tmp_path)
    fresh = compat.get_peft_model(base(), copy.deepcopy(CONFIGS["lora"]))
    kept = {id(each) for each in fresh.parameters()}
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert {id(each) for each in fresh.parameters()} == kept  # an optimizer goes on with them
    close(logits(fresh), logits(theirs))
    other = compat.get_peft_model(base(), "dora", rank=2)
    with pytest.raises(SwapError):
        other.load_adapter(tmp_path, "default", is_trainable=True)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "prompt_tuning", "hira"])
def test_any_method_is_one_of_peft(method: str, tmp_path: Path, capsys: Any) -> None:
    ours = compat.get_peft_model(base(), method)
    assert isinstance(ours, peft.PeftModel) and ours.peft_config["default"].peft_type == ours.peft_type
    noisy(ours)
    ours.eval()
    ours.print_trainable_parameters()
    count = sum(each.numel() for each in ours.adapters["default"].parameters())
    assert f"trainable params: {count:,d} |" in capsys.readouterr().out
    ours.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = compat.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(again), logits(ours), rtol=1e-5, atol=1e-6)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(base()))
    copied = copy.deepcopy(ours)
    assert torch.equal(logits(copied), logits(ours))
    assert not peftcore.injections(ours.unload())
    assert torch.equal(logits(ours.get_base_model()), logits(base()))


def test_an_adapted_model_is_wrapped_as_it_is() -> None:
    model = base()
    peftcore.apply(model, "dora", rank=2, name="mine")
    ours = compat.PeftModel(model)
    assert ours.get_base_model() is ours.base_model.model is model
    assert ours.active_adapter == "mine" and ours.config is model.config
    assert all(name.startswith("base_model.model.") for name in ours.state_dict())
    peftcore.apply(model, "lora", name="more", target=["up_proj"])
    assert list(ours.peft_config) == ["mine", "more"] == ours.active_adapters
    ours.set_requires_grad("more", False)
    assert not any(each.requires_grad for each in ours.adapters["more"].parameters())


def test_what_cannot_be_is_refused_and_changes_nothing() -> None:
    with pytest.raises(ConfigError, match="no adapters"):
        compat.PeftModel(base())
    ours = compat.get_peft_model(base(), "prompt_tuning")
    keys = ours.state_dict().keys()
    for wrap in (compat.get_peft_model, compat.PeftModel.from_pretrained):
        with pytest.raises(UnsupportedHost, match="adapter"):
            wrap(ours, "lora")
    with pytest.raises(DuplicateInjection):
        ours.add_adapter("default", "lora")
    with pytest.raises(ConfigError):
        ours.add_adapter("other", "lora", r=3)
    with pytest.raises(UnknownInjection):
        ours.set_adapter("other")
    with pytest.raises(NotMergeable):
        ours.merge_and_unload()
    with pytest.raises(ConfigError, match="pickles"):
        ours.save_pretrained("nowhere", safe_serialization=False)
    with pytest.raises(ConfigError, match="summary"):
        ours.get_model_status()
    assert ours.state_dict().keys() == keys and ours.active_adapters == ["default"]


def test_of_several_to_merge_all_are_or_none() -> None:
    ours = compat.get_peft_model(base(), "lora", target=["q_proj"])
    ours.add_adapter("second", "lora", target=["v_proj"])
    with pytest.raises(MergeError):
        ours.merge_adapter(["default", "second"])  # the second one does not act
    assert not any(injection.merged for injection in ours.adapters.values())


def test_a_merge_of_several_that_is_interrupted_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = compat.get_peft_model(base(), "lora", target=["q_proj"])
    ours.add_adapter("second", "lora", target=["v_proj"])
    second = ours.adapters["second"]

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(second, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ours.merge_adapter(["default", "second"])
    assert not any(injection.merged for injection in ours.adapters.values())
