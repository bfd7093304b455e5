"""What is chosen, added, loaded, merged and deleted within `disable_adapter()`, beside peft itself: the same outputs
within and afterwards, the same adapter acts, and the same ones train."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_hosts import host

import peftcore
from peftcore.errors import MergeError, UnknownInjection

peft = pytest.importorskip("peft")
compat = pytest.importorskip("peftcore.compat")

IDS = torch.arange(3, 15).reshape(2, 6)
NAMES = ("default", "second")


def config(rank: int = 2) -> Any:
    return peft.LoraConfig(r=rank, target_modules=["q_proj", "down_proj"])


def base() -> Any:
    return host("llama").double()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
        return found


def trained(model: nn.Module, names: tuple[str, ...]) -> set[str]:
    """The adapters of which something trains; peft and ours have their names in those of parameters."""
    paths = [f".{name}." for name, each in model.named_parameters() if each.requires_grad]
    return {name for name in names if any(f".{name}." in path for path in paths)}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    """peft's model and ours, with two adapters of the same values, and a third one in a folder."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(base(), config()).double()
    theirs.add_adapter("second", config(3))
    theirs.add_adapter("third", config(1))
    theirs.double()
    for name, each in theirs.named_parameters():
        if "lora_" in name:
            each.data += 0.1 * torch.randn_like(each)
    theirs.save_pretrained(str(tmp_path))
    theirs.delete_adapter("third")
    ours = compat.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    ours.load_adapter(tmp_path / "second", "second")
    return theirs.eval(), ours.eval()


def nested(model: Any, folder: Path) -> None:
    with model.disable_adapter():
        model.set_adapter("second")
        assert torch.equal(logits(model), logits(base()))
    assert torch.equal(logits(model), logits(base()))


def twice(model: Any, folder: Path) -> None:
    nested(model, folder)
    model.set_adapter("default")


def with_an_error(model: Any, folder: Path) -> None:
    model.set_adapter("second")
    raise KeyboardInterrupt


def added(model: Any, folder: Path) -> None:
    model.add_adapter("fresh", config())


def loaded(model: Any, folder: Path) -> None:
    model.load_adapter(str(folder / "third"), "third")
    model.eval()


def loaded_and_set(model: Any, folder: Path) -> None:
    loaded(model, folder)
    model.set_adapter("third")


def set_and_deleted(model: Any, folder: Path) -> None:
    model.set_adapter("second")
    model.delete_adapter("second")


Act = Callable[[Any, Path], Any]
ACTS: dict[str, Act] = {
    "nothing": lambda model, folder: None,
    "set": lambda model, folder: model.set_adapter("second"),
    "set for inference": lambda model, folder: model.set_adapter("second", inference_mode=True),
    "the same": lambda model, folder: model.set_adapter("default"),
    "nested": nested,
    "twice": twice,
    "an error": with_an_error,
    "added": added,
    "loaded": loaded,
    "loaded and set": loaded_and_set,
    "the other one deleted": lambda model, folder: model.delete_adapter("second"),
    "the active one deleted": lambda model, folder: model.delete_adapter("default"),
    "set and deleted": set_and_deleted,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("act", ACTS)
def test_peft_goes_on_with_what_was_set(act: str, pair: tuple[Any, Any], tmp_path: Path) -> None:
    plain, found = logits(base()), []
    for model in pair:
        error = None
        try:
            with model.disable_adapter():
                try:
                    ACTS[act](model, tmp_path)
                finally:
                    torch.testing.assert_close(logits(model), plain)
                    within = copy.copy(model.active_adapters)
        except KeyboardInterrupt as raised:
            error = raised
        assert (error is not None) == (act == "an error")
        names = (*NAMES, "third", "fresh")
        found.append((within, model.active_adapters, trained(model, names), logits(model)))
        model.set_adapter(model.active_adapters[0])
        found[-1] += (logits(model),)
    theirs, ours = found
    assert ours[:2] == theirs[:2]
    if act == "set for inference":  # peft lets all that acts train at the end, whatever was asked for
        assert (ours[2], theirs[2]) == (set(), {"second"})
    else:
        assert ours[2] == theirs[2]
    assert not torch.allclose(ours[3], plain)
    for one, other in zip(ours[3:], theirs[3:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_what_is_set_and_unknown_changes_nothing(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    before = logits(ours)
    with ours.disable_adapter(), pytest.raises(UnknownInjection):
        ours.set_adapter("nobody")
    assert torch.equal(logits(ours), before) and trained(ours, NAMES) == {"default"}


def test_another_one_is_refused_where_one_is_merged(pair: tuple[Any, Any]) -> None:
    """Its weights come back at the end, where nothing else could act."""
    _, ours = pair
    ours.merge_adapter()
    before = logits(ours)
    with ours.disable_adapter():
        with pytest.raises(MergeError, match="unmerge"):
            ours.set_adapter("second")
        ours.set_adapter("default")
        torch.testing.assert_close(logits(ours), logits(base()), rtol=0, atol=0)
    assert torch.equal(logits(ours), before) and trained(ours, NAMES) == {"default"}


def test_what_is_merged_within_is_refused(pair: tuple[Any, Any]) -> None:
    _, ours = pair
    before = logits(ours)
    with ours.disable_adapter(), pytest.raises(MergeError):
        ours.merge_adapter()
    assert torch.equal(logits(ours), before)


def test_a_merged_adapter_is_deleted_within(pair: tuple[Any, Any]) -> None:
    found = []
    for model in pair:
        model.merge_adapter(adapter_names=["default"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with model.disable_adapter():
                logits(model)  # peft unmerges in the forward
                model.delete_adapter("default")
                torch.testing.assert_close(logits(model), logits(base()))
        model.set_adapter("second")
        found.append(logits(model))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)


def test_all_that_is_merged_is_unmerged_within_and_merged_again(pair: tuple[Any, Any]) -> None:
    """Two of one place, of which the later one has to be unmerged first."""
    _, ours = pair
    peftcore.activate(ours.get_base_model(), *NAMES)
    ours.merge_adapter()
    before = logits(ours)
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), logits(base()), rtol=0, atol=0)
    assert torch.equal(logits(ours), before)
    assert all(each.merged for each in ours.adapters.values())
