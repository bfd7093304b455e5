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
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftcore
from peftcore.errors import ExportError
from peftcore.testing import HOSTS
from peftcore.testing.kit import fill
from peftcore.testing.tools import differences, trace
from peftcore.utils import notices

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


def test_adapters_that_are_left_out_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that train, once each; elsewhere this line is a script's last, and saves them."""
    monkeypatch.setattr(notices, "told", set())
    model, _ = host("llama")
    injection = peftcore.apply(model, "lora")
    with peftcore.saving_base():
        model.save_pretrained(tmp_path / "base")
    injection.merge()
    model.save_pretrained(tmp_path / "merged")
    injection.unmerge()
    injection.trainable(False)
    model.save_pretrained(tmp_path / "frozen")
    assert not caplog.messages
    injection.trainable()
    model.save_pretrained(tmp_path / "out")
    model.model.save_pretrained(tmp_path / "inner")
    hub = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name), create_commit=lambda **_: None)
    monkeypatch.setattr(transformers.utils.hub, "hf_api", lambda: hub)
    monkeypatch.setattr(notices, "told", set())
    model.push_to_hub("a/b")
    assert (
        len(caplog.messages) == 2
        and "without the adapter 'lora', which trains: save it with injection.save(folder)" in caplog.text
    )


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


# Models whose weights have another form than their config says


SIZES = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
IDS = torch.arange(6).view(1, 6)
EVERY = "all"
"""Adapts every linear layer that is packed."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model on disk."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **SIZES)).save_pretrained(folder)
    return folder


def loaded(folder: Path, packed: bool = False) -> Any:
    """A model as transformers loads it."""
    how = {"quantization_config": transformers.BitsAndBytesConfig(load_in_4bit=True)} if packed else {}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def adapted(model: Any, target: str) -> peftcore.Injection:
    """An adapter on some layers, or on every one that is packed."""
    where = {"target": r"re:.*\.(\w_proj|up_proj|gate_proj|down_proj)"} if target == EVERY else {}
    injection = peftcore.apply(model, "lora", **where)
    fill(injection)
    return injection


@pytest.mark.parametrize("target", ["some", EVERY])
def test_a_packed_model_with_baked_weights_says_what_it_is(dense: Path, target: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = loaded(dense, packed=True)
    injection = adapted(model, target)
    injection.merge()
    expected = logits(model)
    with pytest.raises(ExportError, match=r"dense, but the model's config says quantized.*bake\(\)"):
        model.save_pretrained(tmp_path / "merged")
    injection.bake()
    if target == "some":
        with pytest.raises(ExportError, match=r"2 modules .*peftcore\.dequantize"):
            model.save_pretrained(tmp_path / "baked")
        with pytest.raises(ExportError, match="2 modules"):
            model.model.save_pretrained(tmp_path / "baked")
        with pytest.raises(ExportError, match="2 modules"):
            copy.deepcopy(model).save_pretrained(tmp_path / "baked")
        peftcore.dequantize(model)
        assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.model)
    assert list(tmp_path.iterdir()) == []
    model.save_pretrained(tmp_path)
    found = loaded(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert type(found.model.layers[0].self_attn.q_proj) is nn.Linear
    torch.testing.assert_close(logits(found), expected, rtol=1e-3, atol=1e-3)


def test_a_packed_model_whose_merge_is_undone_or_packed_again_is_saved_as_it_came(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = loaded(dense, packed=True)
    base = logits(model)
    injection = adapted(model, "some")
    injection.merge(), injection.unmerge()
    model.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(loaded(tmp_path / "base")), base)
    injection.merge(into="same")
    expected = logits(model)
    injection.bake()
    model.save_pretrained(tmp_path / "baked")
    torch.testing.assert_close(logits(loaded(tmp_path / "baked")), expected, rtol=1e-2, atol=1e-2)


def test_a_packed_model_that_is_made_dense_says_so(dense: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = peftcore.dequantize(loaded(dense, packed=True))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), expected)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "bnb-nf4"])
def test_a_dense_model_that_is_packed_later_is_not_saved_as_if_it_were_dense(
    dense: Path, scheme: str, tmp_path: Path
) -> None:
    model = loaded(dense)
    before = set(vars(model))
    peftcore.quantize(model, scheme)
    injection = peftcore.apply(model, "lora")
    for _ in range(2):
        with pytest.raises(ExportError, match=r"quantized after the model was loaded.*injection\.save"):
            model.save_pretrained(tmp_path)
        if peftcore.injections(model):
            injection.remove()
    assert list(tmp_path.iterdir()) == []
    peftcore.dequantize(model)
    assert set(vars(model)) == before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


class Frozen(dict):
    """A config of diffusers."""

    quantization_config: Any = None


class OfDiffusers(nn.Module):
    """A model whose quantizer cannot take itself out of its config."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.config = Frozen()
        self.config.quantization_config = {"quant_method": "toy"}
        self.hf_quantizer = object()

    def save_pretrained(self, folder: Path) -> str:
        """Tell that it saved."""
        return "saved"


def test_what_cannot_say_that_it_is_dense_is_not_saved(tmp_path: Path) -> None:
    model = peftcore.quantize(OfDiffusers(), "int8", target="first")
    assert model.save_pretrained(tmp_path) == "saved"
    peftcore.apply(model, "lora", target="first").bake()
    with pytest.raises(ExportError, match="Load the base without quantization"):
        model.save_pretrained(tmp_path)


class HalfWay:
    """A quantizer that fails as it takes itself out of a model."""

    def is_serializable(self) -> bool:
        """Tell that weights can be written."""
        return True

    def remove_quantization_config(self, model: Any) -> None:
        """Remove one of two notes."""
        del model.config.quantization_config
        raise RuntimeError("half-way")


def test_a_model_whose_quantizer_fails_stays_quantized() -> None:
    model = peftcore.quantize(OfDiffusers(), "int8", target="first")
    model.hf_quantizer = HalfWay()
    before, config, weights = {**vars(model)}, {**vars(model.config)}, model.state_dict()
    with pytest.raises(RuntimeError, match="half-way"):
        peftcore.dequantize(model)
    assert vars(model) == before and vars(model.config) == config
    now = model.state_dict()
    assert [*now] == [*weights] and all(torch.equal(now[key], weights[key]) for key in now)
