"""Those who come from peft are told what its options are called here."""

import pytest
from torch import nn

import peftcore
from peftcore.contract.peft_names import METHODS, OPTIONS, instead_of
from peftcore.errors import ConfigError, UnknownMethod, UnsupportedHost


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("option", "value", "instead"),
    [
        ("r", 8, "use rank="),
        ("lora_alpha", 16, "use alpha="),
        ("target_modules", ["0"], "use target="),
        ("modules_to_save", ["0"], "use train="),
        ("task_type", "CAUSAL_LM", "leave it out"),
    ],
)
def test_an_option_of_peft_is_answered_with_ours(option: str, value: object, instead: str) -> None:
    with pytest.raises(ConfigError, match=f"lora has no option '{option}', which is peft's; {instead}"):
        peftcore.apply(host(), "lora", target="0", **{option: value})


def test_what_a_method_does_not_have_is_not_promised() -> None:
    assert instead_of("r", ("rank",)) == "use rank=" and instead_of("r", ("length",)) is None
    assert instead_of("nowhere", ("rank",)) is None
    options = {name for info in peftcore.methods() for name in peftcore.method(info.name).Config.model_fields}
    assert {needed for answers in OPTIONS.values() for _, needed in answers if needed} <= options


@pytest.mark.parametrize("name", METHODS)
def test_a_variant_of_peft_is_answered_with_our_method(name: str) -> None:
    with pytest.raises(UnknownMethod, match=METHODS[name].replace("+", r"\+")):
        peftcore.apply(host(), name)


def test_names_are_found_in_any_case() -> None:
    assert peftcore.apply(host(), "LoRA").method.name == "lora"
    with pytest.raises(UnknownMethod, match="did you mean 'lora'"):
        peftcore.apply(host(), "LoRAs")


def test_what_is_no_model_and_what_is_no_method_is_said() -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.unet = host()

    for call in (lambda model: peftcore.apply(model, "lora"), lambda model: peftcore.load(model, "folder")):
        with pytest.raises(UnsupportedHost, match=r"Pipeline is not an nn\.Module; it has \.unet"):
            call(Pipeline())
    with pytest.raises(UnsupportedHost, match=r"tuple is not an nn\.Module"):
        peftcore.plan((host(),), "lora")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="Pipeline is not a method"):
        peftcore.apply(host(), Pipeline())  # type: ignore[arg-type]
