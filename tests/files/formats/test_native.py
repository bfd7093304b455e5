"""Our own files beside those of other libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from file_toys import adapted, bytes_of, host
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import peftcore
from peftcore.author import Method, MethodConfig, Operator, Site, Surgeon, Tags
from peftcore.errors import ExportError, PluginError
from peftcore.files.formats.card import CARD


def test_peft_beside_our_own(tmp_path: Path) -> None:
    injection = adapted()
    injection.save(tmp_path / "both", format=["peftcore", "peft"])
    injection.save(tmp_path / "ours")
    injection.save(tmp_path / "theirs", format="peft")
    both = bytes_of(tmp_path / "both")
    alone = {**bytes_of(tmp_path / "ours"), **bytes_of(tmp_path / "theirs")}
    assert {name: both[name] for name in both if name != CARD} == {n: alone[n] for n in alone if n != CARD}
    assert b"library_name: peft\n" in both[CARD] and b"library_name: peftcore\n" in bytes_of(tmp_path / "ours")[CARD]
    outputs = []
    for folder in ("both", "ours", "theirs"):
        model, inputs = host()
        assert peftcore.load(model, tmp_path / folder).method.name == "lora"
        outputs.append(model(**inputs))
    for each in outputs[1:]:
        torch.testing.assert_close(each, outputs[0])
    import peft

    model, inputs = host()
    torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path / "both")(**inputs), outputs[0])


def test_what_one_format_cannot_hold_is_written_in_none(tmp_path: Path) -> None:
    injection = peftcore.apply(host()[0], "compacter", bottleneck=4, target="first")
    for formats in (["peftcore", "peft"], ["peft", "peftcore"], ["peftcore", "unheard"]):
        with pytest.raises(ExportError):
            injection.save(tmp_path / "adapter", format=formats)
        assert not (tmp_path / "adapter").exists()


def one_storage(injection: peftcore.Injection) -> None:
    """Lay all parameters into one vector, as zeroth-order optimizers and flat buffers do."""
    parameters = list(injection.parameters())
    vector_to_parameters(parameters_to_vector(parameters).detach().clone(), parameters)


@pytest.mark.parametrize("format", ["peftcore", "peft", "kohya", "diffusers"])
def test_parameters_of_one_storage_are_written_in_any_format(format: str, tmp_path: Path) -> None:
    injection = adapted()
    injection.save(tmp_path / "apart", format=format)
    one_storage(injection)
    injection.save(tmp_path / "shared", format=format)
    assert bytes_of(tmp_path / "shared") == bytes_of(tmp_path / "apart")


class TwiceOperator(Operator):
    """Holds one parameter under two names."""

    def __init__(self, site: Site, config: MethodConfig) -> None:
        super().__init__(site)
        self.one = nn.Parameter(torch.zeros(site.out_features))
        self.other = self.one

    def forward(self, call: Any, x: Tensor) -> Tensor:
        return call(x) + self.one


class TwiceConfig(MethodConfig):
    method: Literal["twice"] = "twice"


class Twice(Method):
    """A method that registers a tensor twice."""

    name = "twice"
    Config = TwiceConfig
    tags = Tags(category="additive", paper="2106.09685")
    target = "first"

    def inject(self, model: nn.Module, config: MethodConfig, surgeon: Surgeon) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, TwiceOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return site.out_features


def test_a_tensor_that_is_registered_twice_is_refused(tmp_path: Path) -> None:
    injection = peftcore.apply(host()[0], Twice)
    for _ in range(2):
        with pytest.raises(PluginError, match="registers a tensor twice"):
            injection.save(tmp_path / "adapter")
        one_storage(injection)
    assert not (tmp_path / "adapter").exists()
