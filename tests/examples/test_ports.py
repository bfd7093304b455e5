"""Loops of other libraries with an adapter: at most five lines change, only the adapter trains, and its file loads."""

import importlib
import sys
from collections.abc import Callable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn

import peftcore

PORTS = Path(__file__).resolve().parents[2] / "examples" / "ports"
LINES = {"accelerate": 4, "lightning": 3, "timm": 4, "diffusers": 4, "sentence_transformers": 3, "opacus": 5}
"""The lines that each port changes, as its README says."""


def changed(before: list[str], after: list[str]) -> int:
    """The number of lines that are new, gone, or replaced; of a replacement by more lines, all of these."""
    steps = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for kind, i1, i2, j1, j2 in steps if kind != "equal")


def test_what_counts_as_changed() -> None:
    before = ["a", "b", "c", "d"]
    assert changed(before, before) == 0
    assert changed(before, ["a", "x", "b", "c", "d"]) == 1
    assert changed(before, ["a", "x", "y", "c"]) == 3


@pytest.mark.parametrize("name", LINES)
def test_a_port_changes_few_lines(name: str) -> None:
    before, after = ((PORTS / f"{name}_{which}.py").read_text("utf-8").splitlines() for which in ("before", "after"))
    assert changed(before, after) == LINES[name] <= 5
    table = (PORTS / "README.md").read_text("utf-8")
    assert f"| {LINES[name]} | [before]({name}_before.py), [after]({name}_after.py) |" in table


def test_every_port_is_here() -> None:
    assert {path.stem.rpartition("_")[0] for path in PORTS.glob("*_*.py")} == {*LINES}


@pytest.fixture
def ports(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Imports a script as it is run, with its folder on the path."""
    monkeypatch.syspath_prepend(str(PORTS))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield importlib.import_module
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    for path in PORTS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def ids() -> Tensor:
    return torch.randint(2, 64, (3, 8), generator=torch.Generator().manual_seed(5))


def images() -> Tensor:
    return torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(5))


def encoder(small: Any, out: Path) -> nn.Module:
    import sentence_transformers

    return sentence_transformers.SentenceTransformer(small.save_encoder(str(out / "fresh")), device="cpu")


HOSTS: dict[str, Callable[[Any, Path], nn.Module]] = {
    "accelerate": lambda small, out: small.text_classifier(),
    "lightning": lambda small, out: small.text_classifier(),
    "timm": lambda small, out: small.vit(),
    "diffusers": lambda small, out: small.unet(),
    "sentence_transformers": encoder,
    "opacus": lambda small, out: small.convnet(),
}
RUNS: dict[str, Callable[[Any], Tensor]] = {
    "accelerate": lambda model: model(ids()).logits,
    "lightning": lambda model: model(ids()).logits,
    "timm": lambda model: model(images()),
    "diffusers": lambda model: model(images(), torch.tensor([1, 20, 90])).sample,
    "sentence_transformers": lambda model: model.encode(["red two", "vier blau"], convert_to_tensor=True),
    "opacus": lambda model: model(images()),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LINES)
def test_a_port_trains_its_adapter_alone(name: str, ports: Callable[[str], Any], tmp_path: Path) -> None:
    pytest.importorskip(name)
    folders = {which: tmp_path / which for which in ("before", "after")}
    for folder in folders.values():
        folder.mkdir()
    full, losses = ports(f"{name}_before").main(folders["before"])
    assert mean(losses[-5:]) < 0.9 * mean(losses[:5])
    model, losses = ports(f"{name}_after").main(folders["after"])
    assert mean(losses[-5:]) < 0.9 * mean(losses[:5])

    fresh = HOSTS[name](ports("small"), tmp_path).eval()
    (injection,) = peftcore.injections(model).values()
    ours = {id(parameter) for parameter in injection.parameters()}
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert {id(value) for key, value in model.named_parameters() if key in trained} <= ours
    base = fresh.state_dict()
    kept = {key: value for key, value in model.state_dict().items() if key in base and key not in trained}
    assert len(kept) > len(base) / 2
    assert all(torch.equal(value, base[key]) for key, value in kept.items())
    moved = [not torch.equal(value, base[key]) for key, value in full.state_dict().items() if value.is_floating_point()]
    assert mean(moved) > 0.8

    (file,) = folders["after"].rglob("adapter.json")
    with torch.no_grad():
        untrained = RUNS[name](fresh)
        loaded = peftcore.load(fresh, file.parent)
        expected, found = RUNS[name](model.eval()), RUNS[name](fresh)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(found, untrained, atol=1e-2)
    loaded.remove()


def test_layer_decay_of_timm_knows_the_layers_of_adapters(ports: Callable[[str], Any]) -> None:
    """As the README says: an adapter has the learning rate of its block."""
    optim = pytest.importorskip("timm.optim")

    def scales(model: nn.Module) -> dict[str, float]:
        optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, layer_decay=0.5)
        found = {id(each): group["lr_scale"] for group in optimizer.param_groups for each in group["params"]}
        return {name: found[id(value)] for name, value in model.named_parameters() if value.requires_grad}

    blocks = {f"blocks.{block}": scales(ports("small").vit())[f"blocks.{block}.mlp.fc1.weight"] for block in (0, 1)}
    model = ports("small").vit()
    peftcore.apply(model, "lora", target="all-linear")
    assert blocks == {"blocks.0": 0.25, "blocks.1": 0.5}
    adapters = scales(model)
    assert len(adapters) == 16
    assert all(scale == blocks[name[name.index("blocks") :][:8]] for name, scale in adapters.items())
