"""Of what stands in `peft_config` another adapter is made."""

import pytest
import torch
from training_hosts import host, inputs

import peftcore
from peftcore.errors import CalibrationError, ConfigError

peft = pytest.importorskip("peft")
configs = pytest.importorskip("peftcore.compat.configs")


@pytest.mark.parametrize("method", ["dora", "houlsby_adapter", ["lora", "hira"]])
def test_a_fresh_adapter_is_drawn_from_the_same_seed(method: object) -> None:
    model = host("llama")
    one = peftcore.apply(model, method, name="one", seed=4, exclude="*.layers.0.*")  # type: ignore[arg-type]
    start = {key: value.clone() for key, value in one.state_dict().items()}
    for parameter in one.parameters():
        parameter.data.add_(0.1)
    config = configs.config_of(one)
    assert isinstance(config, peft.PeftConfig) and not config.is_prompt_learning
    other = configs.apply_beside(model, "other", config, {})
    assert one.active and not other.active
    assert other.state_dict().keys() == start.keys()
    assert all(torch.equal(value, start[key]) for key, value in other.state_dict().items())
    with pytest.raises(ConfigError, match="rank"):
        configs.apply_beside(model, "third", config, {"rank": 2})
    assert list(peftcore.injections(model)) == ["one", "other"]


def test_a_method_that_looks_at_data_is_refused() -> None:
    model = host("llama")
    one = peftcore.apply(model, "corda", name="one", data=[inputs("llama")])
    with pytest.raises(CalibrationError, match="data="):
        configs.apply_beside(model, "other", configs.config_of(one), {})
    assert list(peftcore.injections(model)) == ["one"]


def test_state_that_is_no_parameter_is_compared() -> None:
    model = host("llama")
    one = peftcore.apply(model, "tinylora", name="one")
    same = peftcore.apply(model, "tinylora", name="same")
    configs.check_same_state(same, one)
    with torch.no_grad():
        next(buffer for _, module in one.modules() for buffer in module.buffers()).add_(1)
    with pytest.raises(ConfigError, match="ref_model"):
        configs.check_same_state(same, one)
    longer = peftcore.apply(model, "lora", name="longer", rank=3)
    with pytest.raises(ConfigError, match="other tensors"):
        configs.check_same_state(longer, peftcore.apply(model, "lora", name="shorter", rank=2))


def test_dropouts_are_found_in_parts_too() -> None:
    model = host("llama")
    both = peftcore.apply(model, [{"method": "lora", "dropout": 0.1}, {"method": "hira", "dropout": 0.0}])
    assert configs.dropouts_of(both) == ["dropout"]
    assert configs.dropouts_of(peftcore.apply(model, "lora", name="plain")) == []
