"""Tied tables, beside peft: what peft unties has values of its own here, what is tied here is tied in peft, or refused.
Outputs, gradients, and both again after our own file."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tied_hosts import EMBEDDINGS, HEAD, TARGETS, host, loss, run, shift, tables
from torch import Tensor, nn

import peftcore
from peftcore.errors import CheckpointError, ConfigError, ExportError, MergeError
from peftcore.files.formats.peft_tying import holders_of, kept_tied, untied_modules

pytestmark = pytest.mark.filterwarnings("ignore:::peft")
NAMES = ("llama", "gpt2", "bart")


def saved(name: str, tied: bool, path: Path, **options: Any) -> Path:
    """A folder of peft with noise in all that trains."""
    config = peft.LoraConfig(target_modules=[TARGETS[name]], r=2, **options)
    model = peft.get_peft_model(host(name, tied), config).double()
    shift([each for each in model.parameters() if each.requires_grad])
    model.save_pretrained(str(path))
    return path


def gradients_of_peft(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the tables that train, by the path in the base."""
    loss(model).backward()
    parts = (".modules_to_save.default", "base_model.model.")
    found = {}
    for name, each in model.named_parameters():
        if "modules_to_save" in name and each.grad is not None:
            found[name.replace(parts[0], "").removeprefix(parts[1])] = each.grad
    return found


def gradients_of_ours(model: nn.Module, injection: peftcore.Injection) -> dict[str, Tensor]:
    loss(model).backward()
    grafts = [graft for graft in injection.grafts if graft.trained_along]
    return {f"{graft.site.module_path}.{graft.site.tensor}": graft.operator.value.grad for graft in grafts}


def tied_in(injection: peftcore.Injection) -> list[set[str]]:
    """The paths of the parameters that have one value."""
    return [{f"{key.removesuffix('.weight')}.weight", *paths} for key, paths in injection.ties.items()]


def assert_same(name: str, tied: bool, theirs: Path, ours: Path, path: Path) -> None:
    """peft with its folder and peftcore with its own: the same outputs and gradients, also by our own format."""
    expected = peft.PeftModel.from_pretrained(host(name, tied), str(theirs), is_trainable=True).double().eval()
    wanted = gradients_of_peft(expected)
    model = host(name, tied)
    injection = peftcore.load(model, ours, trainable=True)
    bare = run(host(name, tied))
    assert (run(model) - bare).abs().max() > 0.1
    torch.testing.assert_close(run(model), run(expected), rtol=1e-5, atol=1e-5)
    found = gradients_of_ours(model, injection)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-4)
    injection.save(path / "native")
    again = host(name, tied)
    peftcore.load(again, path / "native")
    assert torch.equal(run(again), run(model))


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_peft_unties_is_untied(name: str, tied: bool, which: str, tmp_path: Path) -> None:
    """`modules_to_save` of any table; back in peft's format, peft gives the same."""
    theirs = saved(name, tied, tmp_path / "theirs", modules_to_save=tables(name)[which])
    assert_same(name, tied, theirs, theirs, tmp_path)
    model = host(name, tied)
    injection = peftcore.load(model, theirs)
    injection.save(tmp_path / "back", format="peft")
    assert_same(name, tied, tmp_path / "back", theirs, tmp_path / "more")
    if tied:
        with pytest.raises(MergeError, match="is tied to"):
            injection.merge()
        assert injection.ties == {}


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
def test_a_configuration_of_peft_unties_too(which: str) -> None:
    """Applied here, a configuration trains what peft trains with it: gradients at the start are peft's."""
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=tables("llama")[which])
    model = host("llama", True)
    injection = peftcore.apply(model, config, seed=0)
    found = gradients_of_ours(model, injection)
    wanted = gradients_of_peft(peft.get_peft_model(host("llama", True), config).double().eval())
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].double(), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_ensured_ties_stay(name: str, which: str, tmp_path: Path) -> None:
    """LoRA's `ensure_weight_tying`, as far as peft does what it says: for the name of an embedding that is not
    `embed_tokens` alone it unties all the same."""
    theirs = saved(name, True, tmp_path / "theirs", modules_to_save=tables(name)[which], ensure_weight_tying=True)
    model = host(name, True)
    injection = peftcore.load(model, theirs)
    expected = peft.PeftModel.from_pretrained(host(name, True), str(theirs)).double().eval()
    torch.testing.assert_close(run(model), run(expected), rtol=1e-5, atol=1e-5)
    together = (name, which) != ("gpt2", "embedding")
    assert bool(injection.ties) == together
    injection.save(tmp_path / "back", format="peft")
    options = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert options.get("ensure_weight_tying", False) == together
    back = peft.PeftModel.from_pretrained(host(name, True), str(tmp_path / "back"), is_trainable=True).double().eval()
    torch.testing.assert_close(run(back), run(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["embedding", "head", "both"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_tied_here_is_tied_in_peft(name: str, which: str, tmp_path: Path) -> None:
    """`train=` of tied tables: one value, and so in peft; or an error, where peft would make a linear layer of an
    embedding."""
    model = host(name, True)
    injection = peftcore.apply(model, "lora", rank=2, target=TARGETS[name], train=tables(name)[which], dtype="float64")
    shift([*injection.parameters()])
    injection.save(tmp_path / "native")
    if name == "bart":
        with pytest.raises(ExportError, match="are tied and train as one tensor"):
            injection.save(tmp_path / "peft", format="peft")
        assert not (tmp_path / "peft").exists()
        return
    injection.save(tmp_path / "peft", format="peft")
    expected = peft.PeftModel.from_pretrained(host(name, True), str(tmp_path / "peft"), is_trainable=True).double()
    torch.testing.assert_close(run(expected.eval()), run(model))
    (wanted,), (found,) = gradients_of_peft(expected).values(), gradients_of_ours(model, injection).values()
    torch.testing.assert_close(found, wanted)
    again = host(name, True)
    other = peftcore.load(again, tmp_path / "peft", trainable=True)
    assert tied_in(other) == tied_in(injection)
    torch.testing.assert_close(run(again), run(model))


@pytest.mark.parametrize("name", NAMES)
def test_tables_that_are_not_tied(name: str, tmp_path: Path) -> None:
    """Nothing is said of ties where there are none."""
    model = host(name, False)
    injection = peftcore.apply(model, "lora", rank=2, target=TARGETS[name], train=tables(name)["both"], dtype="float64")
    shift([*injection.parameters()])
    injection.save(tmp_path / "peft", format="peft")
    assert "ensure_weight_tying" not in json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert_same(name, False, tmp_path / "peft", tmp_path / "peft", tmp_path)


def test_types_without_the_option_refuse(tmp_path: Path) -> None:
    """Only LoRA's files can say that ties stay."""
    model = host("llama", True)
    injection = peftcore.apply(model, "ia3", train=[HEAD])
    with pytest.raises(ExportError, match=r"embed_tokens.*tie_word_embeddings=False"):
        injection.save(tmp_path, format="peft")


def test_tables_that_are_said_to_be_tied_and_differ(tmp_path: Path) -> None:
    folder = saved("llama", True, tmp_path, modules_to_save=[HEAD], ensure_weight_tying=True)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.lm_head.weight"] + 1
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"differs from .*, to which it is tied here"):
        peftcore.load(host("llama", True), folder)


def test_means_of_what_is_untied(tmp_path: Path) -> None:
    """A mean of two adapters that untie does so too; there is none of one that unties and one that does not."""
    model = host("llama", True)
    folder = saved("llama", True, tmp_path, modules_to_save=[HEAD])
    first, second = (peftcore.load(model, folder, name=name) for name in ("first", "second"))
    with peftcore.activate(model, "first"):
        wanted = run(model)
    mean = peftcore.combine(model, {"first": 0.5, "second": 0.5}, how="linear", name="mean")
    torch.testing.assert_close(run(model), wanted)
    assert mean.ties == {} and first.wishes.untied == second.wishes.untied == mean.wishes.untied == (HEAD,)
    peftcore.apply(model, first.config, target="q_proj", train=[HEAD], name="third")
    with pytest.raises(ConfigError):
        peftcore.combine(model, {"first": 0.5, "third": 0.5}, how="linear", name="none")


def test_which_are_kept_and_which_are_not() -> None:
    model = host("bart", True)
    (paths,) = [paths for paths in holders_of(model).values() if len(paths) > 1]
    assert len(paths) == 4 and kept_tied(model, paths, True) == set(paths)
    assert kept_tied(model, paths[1:], True) == kept_tied(model, paths, False) == set()
    path = f"model.encoder.{EMBEDDINGS['bart']}.weight"
    assert untied_modules(model, {path: path.removesuffix(".weight")}, ()) == (path.removesuffix(".weight"),)
    assert untied_modules(model, dict.fromkeys(paths, "model"), ()) == ("model",)  # the head is outside
    assert untied_modules(model, {path: path.removesuffix(".weight")}, paths) == ()


def test_one_update_for_several_modules_is_refused(tmp_path: Path) -> None:
    """LoRA at tied tables, told to stay tied: peft trains one update. What is set to false is read."""
    config = peft.LoraConfig(target_modules=["q_proj", "embed_tokens", HEAD], r=2, ensure_weight_tying=True)
    model = peft.get_peft_model(host("llama", True), config).double()
    shift([each for each in model.parameters() if each.requires_grad])
    model.save_pretrained(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"one update for lm_head and model\.embed_tokens, which are tied"):
        peftcore.load(host("llama", True), tmp_path)
    options = json.loads((tmp_path / "adapter_config.json").read_text())
    options |= {"ensure_weight_tying": False, "target_modules": ["q_proj", "embed_tokens", HEAD]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(options))
    ours = host("llama", True)
    peftcore.load(ours, tmp_path)
    torch.testing.assert_close(run(ours), run(model.eval()), rtol=1e-5, atol=1e-5)
