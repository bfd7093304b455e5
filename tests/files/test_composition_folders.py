"""A composition in a folder, with its adapters."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from composition_toys import Layers, several_adapters
from torch import Tensor, nn

import peftcore
from peftcore import Average, Stack, Sum
from peftcore.errors import CheckpointError


@pytest.fixture
def host() -> nn.Module:
    return several_adapters()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, 6, dtype=torch.float64)


def test_saved_and_loaded_with_its_adapters(host: nn.Module, x: Tensor, tmp_path: Path) -> None:
    composition = Average(Stack("a", Sum("b", "c", weights=[1.0, -0.5])), "d", weights=[1.0, 3.0])
    peftcore.save_composition(host, composition, tmp_path / "all")
    with peftcore.activate(host, composition):
        expected = host(x)
    fresh = deepcopy(host)
    for injection in list(peftcore.injections(fresh).values()):
        injection.remove()
    assert peftcore.load_composition(fresh, tmp_path / "all") == composition
    torch.testing.assert_close(fresh(x), expected, rtol=0, atol=0)


def test_a_broken_file_loads_nothing(host: nn.Module, tmp_path: Path) -> None:
    peftcore.save_composition(host, Sum("a", "b"), tmp_path)
    bare = Layers().double()
    (tmp_path / "b" / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(CheckpointError):
        peftcore.load_composition(bare, tmp_path)
    assert peftcore.injections(bare) == {}
    texts = ("no json", '"a"', "[1]", '{"kind": "Fold", "parts": ["a"]}', '{"kind": "Sum", "parts": ["../a"]}')
    for text in texts:
        (tmp_path / "composition.json").write_text(text)
        with pytest.raises(CheckpointError):
            peftcore.load_composition(bare, tmp_path)
    assert peftcore.injections(bare) == {}
