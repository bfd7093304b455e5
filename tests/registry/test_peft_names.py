"""Those who come from peft are told what its options are called here."""

import re

import pytest
from torch import nn

import peftcore
from peftcore.contract.config import RESERVED
from peftcore.errors import ConfigError, UnknownMethod, UnsupportedHost
from peftcore.files.formats.peft_method import peft_methods
from peftcore.registry.peft_names import peft_advice
from peftcore.registry.plugins import imported


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


def test_advice_names_an_option_that_the_method_has() -> None:
    assert peft_advice("lora", "r", ("rank",)) == "use rank=" and peft_advice("lora", "r", ("length",)) is None
    assert peft_advice("lora", "nowhere", ("rank",)) is None
    assert peft_advice("oft", "r", ("block_size",)) == "use block_size="
    assert (
        peft_advice("delora", "lambda_pattern", ("overrides", "strength"))
        == 'use overrides={"*.q_proj": {"strength": 4}}'
    )
    assert peft_advice("loha", "rank_pattern", ("rank",)) == 'use overrides={"*.q_proj": {"rank": 4}}'


def test_translations_advise_options_that_exist() -> None:
    known = {name for info in peftcore.methods() for name in peftcore.method(info.name).Config.model_fields} | RESERVED
    advised = [text for place in peft_methods().values() for text in imported(place).advice.values()]
    assert {named[1] for text in advised if (named := re.match(r"use (\w+)=", text))} <= known


def test_an_option_of_another_type_is_answered_too() -> None:
    with pytest.raises(ConfigError, match=r"use the method \"dora\""):
        peftcore.apply(host(), "vera", target="0", use_dora=True)


def test_a_variant_of_peft_is_answered_with_our_method() -> None:
    with pytest.raises(UnknownMethod, match="did you mean 'lora_plus'"):
        peftcore.apply(host(), "loraplus")


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
