"""What a training knows between steps lies beside the adapter, and brings it back to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_hosts import host

import peftcore
from peftcore.errors import CheckpointError, SwapError
from peftcore.training.optimizer import transient

pytest.importorskip("peft")
state = pytest.importorskip("peftcore.compat.training_state")

OPTIONS = {"rank": 4, "target_rank": 1, "warmup": 1, "final": 1}


def adapter(method: str = "adalora", **changes: Any) -> Any:
    return peftcore.apply(host("llama"), method, **{**(OPTIONS if method == "adalora" else {}), **changes})


def moved(injection: Any) -> Any:
    """An adapter in the midst of a training."""
    torch.manual_seed(3)
    for tensor in (*injection.parameters(), *(buffer for _, buffer in transient(injection))):
        if tensor.is_floating_point():
            tensor.data.add_(0.1 * torch.randn_like(tensor))
        else:
            tensor.data.copy_(torch.rand(tensor.shape) < 0.5)
    return injection


def everything(injection: Any) -> dict[str, torch.Tensor]:
    return {**injection.state_dict(), **{f"between {name}": each for name, each in transient(injection)}}


def test_it_comes_back_to_the_bit_into_the_same_tensors(tmp_path: Path) -> None:
    trained, fresh = moved(adapter()), adapter()
    tensors = {id(each) for each in fresh.parameters()}
    state.save_training_state(trained, tmp_path, {})
    assert any(not torch.equal(each, everything(fresh)[name]) for name, each in everything(trained).items())
    assert state.load_training_state(fresh, tmp_path)
    assert {id(each) for each in fresh.parameters()} == tensors
    for name, each in everything(trained).items():
        assert torch.equal(everything(fresh)[name], each), name


def test_it_is_written_where_there_is_something_to_know(tmp_path: Path) -> None:
    file, lora, scheduled = tmp_path / state.FILE, adapter("lora"), adapter()
    state.save_training_state(scheduled, tmp_path, state.digests(scheduled))
    assert file.exists()
    state.save_training_state(lora, tmp_path, state.digests(lora))
    assert not file.exists() and not state.load_training_state(lora, tmp_path)
    state.save_training_state(scheduled.trainable(False) or scheduled, tmp_path, {})
    assert not file.exists()
    drawn = adapter("waveft", n_frequency=9)  # buffers that no file needs, and that nothing changes
    before = state.digests(drawn)
    assert before
    state.save_training_state(drawn, tmp_path, before)
    assert not file.exists()
    next(each for _, each in transient(drawn)).add_(1)
    state.save_training_state(drawn, tmp_path, before)
    assert file.exists()


def test_the_state_of_another_adapter_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    state.save_training_state(moved(adapter()), tmp_path, {})
    for other in (adapter(alpha=3.0), adapter(rank=2), adapter("lora")):
        before = {name: each.clone() for name, each in everything(other).items()}
        with pytest.raises(SwapError, match="from_pretrained"):
            state.load_training_state(other, tmp_path)
        assert all(torch.equal(each, before[name]) for name, each in everything(other).items())
    (tmp_path / state.FILE).write_bytes(b"no tensors")
    with pytest.raises(CheckpointError):
        state.load_training_state(adapter(), tmp_path)
