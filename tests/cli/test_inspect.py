"""`peftcore inspect`: what a file says about itself, without any model, and whatever is in it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import peftcore
from peftcore.cli.commands import app

SITES = ["0", "2"]


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def said(path: object) -> dict[str, Any]:
    result = invoke(path, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def table(path: object) -> str:
    result = invoke(path)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(path: object) -> str:
    result = invoke(path)
    assert result.exit_code == 2 and not result.stdout, result.output
    assert "Traceback" not in result.output
    return " ".join(result.stderr.split())


def host() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4))


def saved(method: Any, format: str = "peftcore", **options: Any) -> peftcore.Injection:
    injection = peftcore.apply(host(), method, **{"target": SITES, **options})
    injection.save("adapter", format=format)
    return injection


def test_our_own_file() -> None:
    injection = saved("lora", rank=2, alpha=3.0, train=["3"])
    about = said("adapter")
    assert (about["format"], about["methods"], about["problem"]) == ("native", ["lora"], "")
    assert about["options"]["rank"] == 2 and about["options"]["alpha"] == 3.0
    assert about["sites"] == SITES and about["host"] == "torch.nn.modules.container.Sequential"
    assert about["trained_along"] == {"3.weight": [4], "3.bias": [4]}
    state = injection.state_dict()
    assert about["values"] == sum(value.numel() for value in state.values()) == 2 * (6 + 4 + 4 + 4) + 8
    assert about["bytes"] == 4 * about["values"]
    assert about["files"] == [
        {"path": "adapter/adapter.safetensors", "bytes": Path("adapter/adapter.safetensors").stat().st_size}
    ]
    tensors = {each["name"]: (each["shape"], each["dtype"]) for each in about["tensors"]}
    assert tensors == {name: (list(value.shape), "float32") for name, value in state.items()}
    assert said("adapter/adapter.safetensors")["sites"] == SITES
    printed = table("adapter")
    assert all(word in printed for word in ("native", "lora", "rank=2", "0.A", "2 x 6", "3.weight", "44"))


@pytest.mark.parametrize(
    ("format", "kind", "sites"),
    [
        ("peft", "LORA", SITES),
        ("diffusers", "LORA", ["transformer.0", "transformer.2"]),
        ("kohya", "", ["lycoris_0", "lycoris_2"]),
    ],
)
def test_files_of_others(format: str, kind: str, sites: list[str]) -> None:
    saved("dora", format, rank=2)
    about = said("adapter")
    assert (about["format"], about["methods"], about["kind"]) == (format, ["dora"], kind)
    assert about["sites"] == sites and about["problem"] == ""
    assert "dora" in table("adapter")


def test_a_file_for_several_models_of_a_pipeline() -> None:
    saved("lora", "diffusers/unet", rank=2)
    Path("adapter").rename("first")
    saved("lora", "diffusers/text_encoder", rank=2)
    name = "pytorch_lora_weights.safetensors"
    save_file({**load_file(f"first/{name}"), **load_file(f"adapter/{name}")}, "both.safetensors")
    about = said("both.safetensors")
    assert about["parts"] == ["unet", "text_encoder"] or about["parts"] == ["text_encoder", "unet"]
    assert {"unet.0", "text_encoder.2"} <= set(about["sites"]) and about["options"]["unet.r"] == 2


def test_what_a_peft_file_trained_along() -> None:
    saved("lora", "peft", train=["3"])
    about = said("adapter")
    assert about["trained_along"] == {"3.weight": [4], "3.bias": [4]} and about["options"]["modules_to_save"] == ["3"]


def test_a_head_of_adapterhub() -> None:
    folder = Path("adapter")
    folder.mkdir()
    config = {"name": "sst", "model_name": "bert", "model_class": "BertAdapterModel", "config": {"reduction_factor": 4}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "bert.encoder.layer.0.output.adapters.sst.adapter_up"
    save_file({f"{stem}.weight": torch.zeros(4, 2)}, folder / "adapter.safetensors")
    about = said("adapter")
    assert (about["format"], about["kind"], about["base"]) == ("adapterhub", "bottleneck", "bert")
    assert about["sites"] == ["bert.encoder.layer.0.output"]


def test_what_cannot_be_loaded_here_says_why() -> None:
    saved("lora", "peft")
    path = Path("adapter/adapter_config.json")
    config = json.loads(path.read_text())
    for changes, reason in (
        ({"peft_type": "FUTURE"}, "no installed plugin reads peft's FUTURE"),
        ({"init_lora_weights": "corda"}, "changes the base's weights"),
    ):
        path.write_text(json.dumps({**config, **changes}))
        assert reason in said("adapter")["problem"]
        assert "problem" in table("adapter")


def test_nothing_in_a_file_reaches_the_terminal_as_it_is() -> None:
    saved("lora", "peft")
    path = Path("adapter/adapter_config.json")
    evil = "\x1b[31m[bold]x[/bold]\x07\u202e"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "base_model_name_or_path": evil, evil: evil, "peft_type": evil}))
    tensors = load_file("adapter/adapter_model.safetensors")
    save_file({**tensors, f"base_model.model.{evil}.weight": torch.zeros(1)}, "adapter/adapter_model.safetensors")
    printed = table("adapter")
    assert not {"\x1b", "\x07", "\u202e"} & set(printed) and "[bold]" in printed
    assert said("adapter")["base"] == evil
    (Path("adapter") / "adapter_config.json").unlink()
    Path("adapter", evil.replace("/", "")).touch()
    assert "\x1b" not in invoke("adapter").stderr and "\\x1b" in invoke("adapter").stderr


def test_a_long_table_is_cut_and_json_is_not() -> None:
    injection = peftcore.apply(nn.Sequential(*(nn.Linear(2, 2) for _ in range(15))), "lora", target=nn.Linear)
    injection.save("adapter")
    assert "and 10 more" in table("adapter") and len(said("adapter")["tensors"]) == 30


def test_what_is_no_adapter() -> None:
    assert "does not exist" in refused("nothing")
    Path("empty").mkdir()
    assert "not an adapter in a known format" in refused("empty")
    Path("adapter.safetensors").write_bytes(b"garbage")
    assert "not an adapter in a known format" in refused("adapter.safetensors")
    torch.save({}, "lora.pt")
    assert "a pickle" in refused("lora.pt")
    saved("lora")
    file = Path("adapter/adapter.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    assert "adapter/adapter.safetensors cannot be read" in refused("adapter")
