"""What FSDP2 manages is written in place, and comes back."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from core_toys import perceptron, stir
from process_groups import process_group
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import peftcore
from peftcore.errors import MergeError

X = torch.linspace(-1, 1, 12).view(3, 4)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    with process_group(init_method=f"file://{tmp_path}/store", rank=0, world_size=1):
        yield


@pytest.mark.usefixtures("alone")
def test_pieces_are_merged_and_come_back() -> None:
    model = perceptron()
    injection = peftcore.apply(model, "lora", target=["first", "second"])
    stir(injection)
    fully_shard(model.first), fully_shard(model)
    for keep in ("cpu", "device", "record", None):
        with torch.no_grad():
            expected = model(X)  # the outermost module holds its own whole from now on
            injection.merge(keep)
            assert all(isinstance(each, DTensor) for each in model.parameters())
            torch.testing.assert_close(model(X), expected)
            if keep is not None:
                injection.unmerge()
                assert torch.equal(model(X), expected)
                injection.merge(keep)
                piece = model.first.weight.to_local()
                piece.mul_(2)
                with pytest.raises(MergeError, match=r"first\.weight: changed after"):
                    injection.unmerge()
                piece.div_(2)
                injection.unmerge()


@pytest.mark.usefixtures("alone")
def test_an_adapter_that_came_after_the_sharding_is_not_merged() -> None:
    model = perceptron()
    fully_shard(model.first), fully_shard(model)
    injection = peftcore.apply(model, "lora", target="first")
    with pytest.raises(MergeError, match=r"first cannot be merged.*before sharding"):
        injection.merge()
    assert not injection.merged
