"""transformers, diffusers and timm save an adapted model as the base that it was; the adapter goes onto what they
load."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace

TRANSFORMERS = ["llama", "bert", "t5", "gpt2", "moe", "vit"]
DIFFUSERS = ["unet", "dit"]


def host(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A host of the kit, always the same."""
    torch.manual_seed(0)
    model, inputs = HOSTS[name].build()
    return model.eval(), inputs


def output(name: str, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The tensor that the host of this name returns."""
    with torch.no_grad():
        return HOSTS[name].output(model(**inputs))


def saved(folder: Path) -> dict[str, Tensor]:
    """All tensors in the files of a folder."""
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two state dicts are the same to the bit, in names, dtypes and values."""
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


def configs(folder: Path) -> dict[str, Any]:
    """The configurations in a folder."""
    return {each.name: json.loads(each.read_text()) for each in folder.glob("*.json") if "index" not in each.name}


@pytest.mark.parametrize("name", TRANSFORMERS + DIFFUSERS)
@pytest.mark.parametrize("method", ["lora", "attention_only"])
def test_the_base_is_saved_and_the_adapter_goes_onto_it(name: str, method: str, tmp_path: Path) -> None:
    model, inputs = host(name)
    model.save_pretrained(tmp_path / "plain")
    base = output(name, model, inputs)
    injection = peftcore.apply(model, method, train=["norm"] if name == "llama" else ())
    fill(injection)
    expected = output(name, model, inputs)
    assert (expected - base).abs().max() > 0.01
    model.save_pretrained(tmp_path / "base")
    assert equal(saved(tmp_path / "base"), saved(tmp_path / "plain"))
    assert configs(tmp_path / "base") == configs(tmp_path / "plain")
    assert sorted(each.name for each in (tmp_path / "base").iterdir()) == sorted(
        each.name for each in (tmp_path / "plain").iterdir()
    )
    assert torch.equal(output(name, model, inputs), expected)  # it is adapted still
    injection.save(tmp_path / "adapter")
    found = type(model).from_pretrained(tmp_path / "base").eval()
    assert torch.equal(output(name, found, inputs), base)
    peftcore.load(found, tmp_path / "adapter", trainable=True)
    torch.testing.assert_close(output(name, found, inputs), expected, rtol=1e-6, atol=1e-6)


def test_an_adapter_beside_the_base_in_one_folder(tmp_path: Path) -> None:
    model, inputs = host("llama")
    injection = peftcore.apply(model, "lora")
    fill(injection)
    expected = output("llama", model, inputs)
    model.save_pretrained(tmp_path)
    injection.save(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()
    peftcore.load(found, tmp_path, trainable=True)
    torch.testing.assert_close(output("llama", found, inputs), expected, rtol=1e-6, atol=1e-6)


def test_in_shards(tmp_path: Path) -> None:
    model, _ = host("llama")
    model.save_pretrained(tmp_path / "plain", max_shard_size="3KB")
    fill(peftcore.apply(model, "lora"))
    model.save_pretrained(tmp_path / "base", max_shard_size="3KB")
    index = "model.safetensors.index.json"
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 3
    assert json.loads((tmp_path / "base" / index).read_text()) == json.loads((tmp_path / "plain" / index).read_text())
    assert equal(saved(tmp_path / "base"), saved(tmp_path / "plain"))


def test_a_model_inside_the_host_saves_itself_without_adapters_too(tmp_path: Path) -> None:
    model, _ = host("llama")
    model.model.save_pretrained(tmp_path / "plain")
    fill(peftcore.apply(model, "lora"))
    model.model.save_pretrained(tmp_path / "base")
    assert equal(saved(tmp_path / "base"), saved(tmp_path / "plain"))


def test_what_is_merged_is_saved_with_the_base(tmp_path: Path) -> None:
    model, inputs = host("llama")
    injection = peftcore.apply(model, "lora")
    fill(injection)
    expected = output("llama", model, inputs)
    injection.merge()
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(output("llama", found, inputs), expected, rtol=1e-5, atol=1e-5)
    assert not peftcore.injections(found)


def test_who_says_what_to_save_gets_it(tmp_path: Path) -> None:
    model, _ = host("llama")
    injection = peftcore.apply(model, "lora")
    fill(injection)
    for number, arguments in enumerate(({"state_dict": None}, {"state_dict": model.state_dict()})):
        model.save_pretrained(tmp_path / str(number), **arguments)
        assert equal(saved(tmp_path / str(number)), dict(model.state_dict()))
    model.save_pretrained(tmp_path / "positional", True, model.state_dict())
    assert equal(saved(tmp_path / "positional"), dict(model.state_dict()))


def test_the_last_injection_takes_it_along(tmp_path: Path) -> None:
    model, _ = host("llama")
    before = trace(model)
    signature = inspect.signature(model.save_pretrained)
    first, second = peftcore.apply(model, "lora"), peftcore.apply(model, "ia3")
    assert inspect.signature(model.save_pretrained) == signature
    first.remove()
    model.save_pretrained(tmp_path)
    assert not [key for key in saved(tmp_path) if "peft" in key]
    second.remove()
    assert "save_pretrained" not in vars(model)
    assert not differences(before, trace(model))


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: _through_torch(model),
}


def _through_torch(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize("way", COPIES)
def test_copies_save_themselves(way: str, tmp_path: Path) -> None:
    model, _ = host("llama")
    model.save_pretrained(tmp_path / "plain")
    fill(peftcore.apply(model, "lora"))
    twin = COPIES[way](model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    twin.save_pretrained(tmp_path / "twin")
    found, plain = saved(tmp_path / "twin"), saved(tmp_path / "plain")
    assert found.keys() == plain.keys()
    assert not found["lm_head.weight"].any()
    model.save_pretrained(tmp_path / "base")
    assert equal(saved(tmp_path / "base"), plain)


def test_state_dicts_of_this_thread_alone_hold_the_base_alone() -> None:
    from threading import Thread

    model, _ = host("mlp")
    plain = {key: value.clone() for key, value in model.state_dict().items()}
    injection = peftcore.apply(model, "lora", target="first")
    fill(injection)
    whole, elsewhere = dict(model.state_dict()), []
    with peftcore.saving_base():
        found = model.state_dict()
        assert equal(dict(found), plain)
        assert not [path for path in found._metadata if "peft" in path]
        assert equal(dict(nn.Sequential(model).state_dict()), {f"0.{key}": value for key, value in plain.items()})
        assert len(injection.state_dict()) == 2
        thread = Thread(target=lambda: elsewhere.append(dict(model.state_dict())))
        thread.start()
        thread.join()
    assert equal(elsewhere[0], whole)
    assert equal(dict(model.state_dict()), whole)
    with pytest.raises(ZeroDivisionError), peftcore.saving_base():
        raise ZeroDivisionError
    assert equal(dict(model.state_dict()), whole)


def _timm() -> tuple[Any, nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=5).eval()
    return timm, model, torch.randn(2, *model.pretrained_cfg["input_size"])


def _to_file(timm: Any, model: nn.Module, folder: Path) -> Path:
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def _to_pickle(timm: Any, model: nn.Module, folder: Path) -> Path:
    torch.save({"state_dict": timm.utils.get_state_dict(model)}, folder / "model.pth")
    return folder / "model.pth"


def _to_hub_folder(timm: Any, model: nn.Module, folder: Path) -> Path:
    timm.models.save_for_hf(model, folder, model_config={"num_classes": 5}, safe_serialization=True)
    return folder / "model.safetensors"


@pytest.mark.parametrize("way", [_to_file, _to_pickle, _to_hub_folder])
def test_timm(way: Callable[[Any, nn.Module, Path], Path], tmp_path: Path) -> None:
    timm, model, images = _timm()
    folders = [tmp_path / name for name in ("plain", "base", "adapter")]
    for folder in folders:
        folder.mkdir()
    plain = timm.models.load_state_dict(way(timm, model, folders[0]))
    base = model(images)
    injection = peftcore.apply(model, "lora")
    fill(injection)
    expected = model(images)
    assert (expected - base).abs().max() > 0.01
    with peftcore.saving_base():
        file = way(timm, model, folders[1])
    assert equal(dict(timm.models.load_state_dict(file)), dict(plain))
    config = folders[1] / "config.json"
    assert not config.exists() or json.loads(config.read_text()) == json.loads((folders[0] / "config.json").read_text())
    injection.save(folders[2])
    found = timm.create_model("test_vit", num_classes=5).eval()
    timm.models.load_checkpoint(found, file)
    assert torch.equal(found(images), base)
    peftcore.load(found, folders[2], trainable=True)
    torch.testing.assert_close(found(images), expected, rtol=1e-6, atol=1e-6)


def test_timm_loads_weights_into_an_adapted_model(tmp_path: Path) -> None:
    timm, model, images = _timm()
    file = _to_file(timm, model, tmp_path)
    fill(peftcore.apply(model, "lora"))
    expected = model(images)
    with torch.no_grad():
        model.head.weight.add_(1.0)
    timm.models.load_checkpoint(model, file)
    assert torch.equal(model(images), expected)
