"""Moving averages, held against the recurrence written out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from peftcore.errors import CheckpointError, TrainingError
from peftcore_lab.training.averages import FILE, Averages


def written_out(values: list[torch.Tensor], decay: float) -> torch.Tensor:
    """Of all values that a parameter had, the first before training."""
    average = values[0]
    for step, value in enumerate(values[1:], start=1):
        share = min(decay, (1 + step) / (10 + step))
        average = share * average + (1 - share) * value
    return average


@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_they_are_those_of_the_recurrence(decay: float) -> None:
    parameter = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    averages, seen = Averages([parameter], decay), [parameter.detach().clone()]
    for _ in range(40):
        with torch.no_grad():
            parameter.add_(torch.randn(3, 4, dtype=torch.float64))
        averages.step()
        seen.append(parameter.detach().clone())
    with averages.used():
        torch.testing.assert_close(parameter.detach(), written_out(seen, decay))
    assert torch.equal(parameter.detach(), seen[-1])
    averages.take()
    torch.testing.assert_close(parameter.detach(), written_out(seen, decay))


def test_an_error_gives_the_values_back() -> None:
    parameter = nn.Parameter(torch.ones(2))
    averages = Averages([parameter], 0.9)
    with torch.no_grad():
        parameter.add_(1)
    with pytest.raises(KeyError), averages.used():
        assert parameter.tolist() == [1, 1]
        raise KeyError
    assert parameter.tolist() == [2, 2]


def test_a_checkpoint_goes_on_where_it_was(tmp_path: Path) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    averages = Averages([parameter], 0.9)
    with torch.no_grad():
        parameter.add_(1)
    averages.step()
    averages.save(tmp_path)
    again = Averages([parameter], 0.9)
    again.load(tmp_path)
    for each in (averages, again):
        each.step()
    with averages.used():
        one = parameter.tolist()
    with again.used():
        assert parameter.tolist() == one
    with pytest.raises(TrainingError, match="of another model"):
        Averages([nn.Parameter(torch.zeros(3))], 0.9).load(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        again.load(tmp_path)
