"""Names in peft's files: which tensor is of which module, and which modules the options mean."""

from pathlib import Path
from typing import Any

import pytest
import torch
from core_toys import transformer
from safetensors.torch import save_file
from torch import nn

from peftcore.errors import CheckpointError, HostMismatch
from peftcore.files.formats.file_options import Keys
from peftcore.files.formats.peft_module_names import (
    bare_names,
    grouped_names,
    modules_meant,
    once,
    parameters_meant,
    sort_names,
    written_paths,
)
from peftcore.files.safe_io import TensorFile

WHERE = Path("adapter_config.json")
BELOW = ("lora_A.weight", "lora_B.weight")
PATHS = [path for path, module in transformer().named_modules() if isinstance(module, nn.Linear)]


def file_of(folder: Path, *names: str) -> TensorFile:
    save_file({name: torch.zeros(1) for name in names}, folder / "adapter_model.safetensors")
    return TensorFile(folder / "adapter_model.safetensors")


def test_what_peft_puts_in_front_is_taken_away(tmp_path: Path) -> None:
    file = file_of(tmp_path, "base_model.model.a.lora_A.weight", "base_model.shared", "bare.lora_A.weight")
    assert set(bare_names(file)) == {"a.lora_A.weight", "shared", "bare.lora_A.weight"}
    with pytest.raises(CheckpointError, match="are the same tensor"):
        once([("a", "base_model.model.a"), ("a", "a")], WHERE)


def test_names_are_grouped_by_module_and_depth_of_wrapping() -> None:
    names = {name: f"full.{name}" for name in ("a.lora_A.weight", "a.base_layer.lora_A.weight", "vera_A", "head.bias")}
    grouped, whole, rest = grouped_names(names, BELOW, ["vera_A"])
    assert grouped == {
        ("a", 0): {"lora_A.weight": "full.a.lora_A.weight"},
        ("a", 1): {"lora_A.weight": "full.a.base_layer.lora_A.weight"},
    }
    assert whole == {"vera_A": "full.vera_A"} and rest == {"head.bias": "full.head.bias"}


def test_tensors_find_their_modules_in_the_order_of_the_host(tmp_path: Path) -> None:
    model = transformer()
    names = [f"layers.{index}.mlp.{name}.lora_A.weight" for index in (1, 0) for name in ("down_proj", "up_proj")]
    file = file_of(tmp_path, *names, "classifier.bias", "classifier.nothing")
    found = sort_names(file, bare_names(file), Keys({}, WHERE), BELOW, (), model)
    paths = ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj"]
    assert [group.path for group in found.groups] == [group.site_path for group in found.groups] == paths
    assert found.replaced == {"classifier.bias": "classifier.bias"} and found.wrong == ["unknown classifier.nothing"]
    assert set(written_paths(found, model)) == {path for path, _ in model.named_modules() if path}


def test_modules_that_the_host_has_not_are_a_mismatch(tmp_path: Path) -> None:
    file = file_of(tmp_path, "elsewhere.lora_A.weight")
    with pytest.raises(HostMismatch, match="elsewhere"):
        sort_names(file, bare_names(file), Keys({}, WHERE), BELOW, (), transformer())


@pytest.mark.parametrize(
    ("options", "ends"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj",
                                                    "1.self_attn.v_proj"]),
        ({"target_modules": r".*\.0\..*_proj", "exclude_modules": r".*attn.*"}, ["0.mlp.up_proj", "0.mlp.down_proj"]),
        ({"target_modules": ["up_proj"], "layers_to_transform": 1, "layers_pattern": ["layers"]}, ["1.mlp.up_proj"]),
        ({"target_modules": ["up_proj"], "layers_to_transform": 1}, []),  # looked for behind two names
        ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, ["0.mlp.up_proj"]),
        ({"target_modules": ["up_proj"], "layers_to_transform": [0], "layers_pattern": "blocks"}, []),
        ({"target_modules": ["o_proj"], "exclude_modules": ["layers.0.self_attn.o_proj"]}, ["1.self_attn.o_proj"]),
        ({"target_modules": ["up_proj"], "modules_to_save": ["mlp"]}, []),
    ],
)  # fmt: skip
def test_modules_that_options_mean(options: dict[str, Any], ends: list[str]) -> None:
    assert modules_meant(Keys(options, WHERE), PATHS) == {f"layers.{end}" for end in ends}


def test_options_may_not_say() -> None:
    assert modules_meant(Keys({}, WHERE), PATHS) is None
    assert modules_meant(Keys({"target_modules": "all-linear"}, WHERE), PATHS) is None


def test_parameters_that_options_mean(tmp_path: Path) -> None:
    model = transformer()
    file = file_of(tmp_path, "classifier.lora_A.weight")
    keys = Keys({"target_parameters": ["classifier.weight"]}, WHERE)
    found = sort_names(file, bare_names(file), keys, BELOW, (), model)
    assert parameters_meant(keys, found, model) == {"classifier.weight"}
    (group,) = found.groups
    assert group.parameter and group.key == "classifier.weight"
