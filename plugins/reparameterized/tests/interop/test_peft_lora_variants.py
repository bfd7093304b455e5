"""Variants of peft's LoRA: one of another plugin, and files that are two at once."""

import json
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from one_layer import One
from safetensors.torch import load_file
from torch import Size, Tensor, nn

import peftcore
from peftcore.author import Method, MethodConfig, Operator, Site, Tags
from peftcore.errors import CheckpointError
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.file_tensors import Found
from peftcore.files.formats.peft_method import peft_method
from peftcore.files.formats.translated_operators import Place
from peftcore.testing import plugged
from peftcore_reparameterized.interop.peft_lora.variant import LoRAVariant


class ToyConfig(MethodConfig):
    method: Literal["toy_gained"] = "toy_gained"
    rank: int = 4
    alpha: float = 4.0
    offset: float = 0.0


class ToyOperator(Operator):
    """s B diag(offset + g) A."""

    def __init__(self, site: Site, config: ToyConfig) -> None:
        super().__init__(site)
        self.scale, self.offset = config.alpha / config.rank, config.offset
        self.A = nn.Parameter(torch.randn(config.rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, config.rank))
        self.g = nn.Parameter(torch.ones(config.rank))

    def forward(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        y: Tensor = call(x)
        return y + self.scale * ((x @ self.A.T) * (self.offset + self.g)) @ self.B.T


class Toy(Method):
    name = "toy_gained"
    Config = ToyConfig
    tags = Tags(category="reparameterized", paper="none")
    target = "layer"

    def inject(self, model: nn.Module, config: Any, surgeon: Any) -> None:
        for site in surgeon.sites():
            surgeon.graft(site, ToyOperator, config)

    @staticmethod
    def parameter_count(site: Site, config: Any) -> int:
        return config.rank * (site.in_features + site.out_features + 1)


class ToyVariant(LoRAVariant):
    reads = "toy_gained"
    writes = ("toy_gained",)
    below = ("lora_gain",)
    has_scaling = False

    def marked(self, keys: Keys) -> bool:
        return keys.take("gain_config", dict, None) is not None

    def options(self, keys: Keys, shapes: Mapping[str, Size], common: Mapping[str, Any]) -> dict[str, Any]:
        own = {name: value for name, value in common.items() if name != "dropout"}
        return {**own, "offset": float(keys.table("gain_config")["offset"])}

    def read(self, place: Place, found: Found, factors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**factors, "g": found.take("lora_gain", place.operator.g.shape)}

    def write_options(self, config: Any) -> dict[str, Any]:
        return {"gain_config": {"offset": config.offset}}

    def write(self, place: Place) -> dict[str, Tensor]:
        return {"lora_gain": place.operator.g}


@peftcore.author.hookimpl
def peftcore_translations() -> Mapping[str, str]:
    return {"peft/LORA/gained": f"{__name__}:ToyVariant"}


@torch.no_grad()
def test_a_variant_of_another_plugin_is_written_and_read(tmp_path: Path) -> None:
    """With what all variants have: the scale, the targets, the names of A and B."""
    x, model = torch.randn(3, 6), One(nn.Linear(6, 5))
    peftcore.register(Toy)
    with plugged(peftcore_translations):
        injection = peftcore.apply(model, "toy_gained", rank=2, alpha=3.0, offset=0.5)
        for parameter in injection.parameters():
            parameter.add_(torch.randn_like(parameter))
        injection.save(tmp_path, format="peft")
        output = model(x)
        injection.remove()
        assert not torch.allclose(model(x), output)
        again = peftcore.load(model, tmp_path)
        assert torch.equal(model(x), output)
        assert (again.method.name, again.config.offset) == ("toy_gained", 0.5)
        again.remove()
    names = {name.partition("layer.")[2] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert names == {"lora_A.weight", "lora_B.weight", "lora_gain"}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["peft_type"], written["r"], written["gain_config"]) == ("LORA", 2, {"offset": 0.5})
    with pytest.raises(CheckpointError, match=r"does not know these options.*gain_config"):
        peftcore.load(model, tmp_path, strict=False)


def test_each_of_our_methods_has_one_variant() -> None:
    translation: Any = peft_method("LORA", Path())
    written = [name for each in translation.variants for name in each.writes]
    assert sorted(written) == sorted(translation.methods) == sorted(set(written))
    assert {each.reads for each in translation.variants} - {""} <= set(written)
    assert {name for each in translation.variants for name in each.below} <= set(translation.below)


MARKS: dict[str, Any] = {
    "use_dora": True,
    "use_bdlora": {"target_modules_bd_a": [], "target_modules_bd_b": [], "match_strict": False},
    "monteclora_config": {"num_samples": 2},
    "alora_invocation_tokens": [1],
    "velora_config": {"num_groups": 2},
    "kasa_config": {"beta": 0.1},
}


@pytest.mark.parametrize(("first", "second"), list(combinations(MARKS, 2)))
def test_a_file_that_is_two_variants_is_refused(first: str, second: str, tmp_path: Path) -> None:
    peftcore.apply(One(nn.Linear(4, 4)), "lora", target="layer", rank=2).save(tmp_path, format="peft")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), first: MARKS[first], second: MARKS[second]}))
    with pytest.raises(CheckpointError, match=rf"these options, which may change the outputs: {second} = "):
        peftcore.load(One(nn.Linear(4, 4)), tmp_path, strict=False)
