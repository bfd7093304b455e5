"""The page with every name of peft: nothing of its public API is missing, and what it says is there."""

import dataclasses
import re
import sys
from pathlib import Path

import peft
import pytest
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

import peftcore

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docs/generate"))
import peft_page  # noqa: E402


@pytest.mark.parametrize("name", sorted(peft.__all__))
def test_every_public_name_has_its_row(name: str) -> None:
    assert peft_page.answer(name), f"nothing says what to write for peft.{name}: docs/generate/peft_page.py"
    assert f"| `{name}` | {peft_page.answer(name)} |" in peft_page.PAGE.read_text(encoding="utf-8")


def test_every_method_of_its_models_has_its_row() -> None:
    classes = (peft.PeftModel, peft.PeftMixedModel, peft.LoraModel, BaseTuner)
    torchs = {*dir(nn.Module), "forward"}
    names = {name for each in classes for name in vars(each) if not name.startswith("_") and name not in torchs}
    assert names - {"forward"} <= peft_page.METHODS.keys()


@pytest.mark.parametrize(("kind", "config", "method"), [each for each in peft_page.kinds() if each[2]])
def test_every_option_has_its_row(kind: str, config: type[peft.PeftConfig], method: str) -> None:
    found = peft_page.options(config, method)
    assert found.keys() == {each.name for each in dataclasses.fields(config)} - peft_page.COMMON
    section = peft_page.PAGE.read_text(encoding="utf-8").partition(f"### {config.__name__}\n")[2].partition("###")[0]
    assert all(f"| `{name}` | {text} |" in section for name, text in found.items())


def test_functions_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"peftcore\.(\w+)", peft_page.PAGE.read_text(encoding="utf-8")))
    assert named - {"errors"} <= {*dir(peftcore)}
    methods = {info.name for presets in (False, True) for info in peftcore.methods(presets=presets)}
    assert set(re.findall(r'`"(\w+)"`', peft_page.PAGE.read_text(encoding="utf-8"))) <= methods


def test_nothing_is_put_off() -> None:
    """What peft has can be written here, or the page says what stands for it."""
    assert "not there yet" not in peft_page.PAGE.read_text(encoding="utf-8")
