"""Of what stands in `peft_config` another adapter is made."""

import pytest
import torch
from training_hosts import host, inputs

import peftcore
from peftcore.errors import CalibrationError, ConfigError, TrainingError

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


DROPS: list[tuple[object, dict[str, float]]] = [
    ("lora", {"dropout": 0.5}),
    ("dora", {"dropout": 0.5}),
    ("loha", {"rank_dropout": 0.5, "module_dropout": 0.5}),
    ("prefix_tuning", {"dropout": 0.5}),
    ("tiny_attention_adapter", {"dropout": 0.5}),
    ([{"method": "lora", "dropout": 0.5, "target": ["q_proj"]}, {"method": "hira", "target": ["v_proj"]}], {}),
]


@pytest.mark.parametrize(("method", "options"), DROPS, ids=str)
def test_dropout_is_turned_off_wherever_an_operator_has_it(method: object, options: dict[str, float]) -> None:
    model = host("llama").train()
    injection = peftcore.apply(model, method, **options)  # type: ignore[arg-type]
    torch.manual_seed(3)
    for parameter in injection.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    given = inputs("llama")

    def output(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = model(**given).logits
        return found

    assert not torch.equal(output(1), output(2))
    configs.drop_nothing(injection)
    found = output(1)
    assert torch.equal(found, output(2))
    torch.testing.assert_close(found, model.eval()(**given).logits, rtol=1e-5, atol=1e-6)


def test_dropout_that_cannot_be_turned_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = host("llama")
    injection = peftcore.apply(model, "oft", block_dropout=0.5)
    for _, operator in injection.modules():
        monkeypatch.setattr(operator, "drop_nothing", lambda: False)
    with pytest.raises(TrainingError, match="block_dropout=0"):
        configs.drop_nothing(injection)


def test_a_configuration_of_any_method_comes_through_peft_s_own_function() -> None:
    compat = pytest.importorskip("peftcore.compat")
    config = compat.method_config("dora", rank=3, target=["q_proj"])
    assert isinstance(config, peft.PeftConfig)
    model = peft.get_peft_model(host("llama"), config)  # as trainers call it
    assert isinstance(model, compat.PeftModelForCausalLM)
    injection = model.adapters["default"]
    assert injection.method.name == "dora" and injection.config.rank == 3
    assert {site.path.split(".")[-1] for site in injection.sites} == {"q_proj"}
    with pytest.raises(ConfigError, match="dtype="):
        peft.get_peft_model(host("llama"), config, autocast_adapter_dtype=False)
