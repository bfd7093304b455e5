"""Identifiers of a model hub, with a cache that is filled by hand: nothing is fetched here."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import peftcore
from peftcore.errors import CheckpointError

REVISION = "0" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache as the package lays it out: snapshots of links to blobs."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = nn.Sequential(nn.Linear(4, 4))
    injection = peftcore.apply(model, "lora", target="0", rank=2)
    with torch.no_grad():
        for parameter in injection.parameters():
            parameter.fill_(0.5)
    injection.save(tmp_path / "plain")
    repository = tmp_path / "hub" / "models--someone--trained"
    snapshot = repository / "snapshots" / REVISION
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for path in (tmp_path / "plain").iterdir():
        (repository / "blobs" / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(repository / "blobs" / path.name)
    (repository / "refs" / "main").write_text(REVISION)
    return tmp_path / "plain"


@pytest.mark.parametrize("name", ["someone/trained", f"someone/trained@{REVISION}"])
def test_an_identifier_is_found_in_the_cache(cache: Path, name: str) -> None:
    base, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    plain = peftcore.load(base, cache)
    expected = base(x)
    plain.remove()
    peftcore.load(base, name)
    assert torch.equal(base(x), expected)


def test_what_the_hub_does_not_have(cache: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CheckpointError, match="someone/else is not a local path, and cannot be fetched"):
        peftcore.load(model, "someone/else")
    with pytest.raises(CheckpointError, match="no_such_folder does not exist"):
        peftcore.load(model, "no_such_folder")
    with pytest.raises(CheckpointError, match="someone/else does not exist"):
        peftcore.load(model, Path("someone/else"))
    assert not peftcore.injections(model)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'peftcore\[interop\]'"):
        peftcore.load(nn.Linear(2, 2), "someone/trained")
