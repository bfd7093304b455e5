"""Moving averages of the trained parameters (EMA): the averages are scored and saved, and training continues with the
current values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from peftcore.author.formats import TensorFile
from peftcore.errors import TrainingError
from peftcore.files.safe_io import write_tensors

FILE = "averages.safetensors"


class Averages:
    """Averages a_n = d_n a_(n-1) + (1 - d_n) p_n of parameters p, from a_0 = p_0 on.

    d_n = min(decay, (1 + n) / (10 + n)). So after a short training, the averages do not consist mostly of its first
    values.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self._parameters, self._decay, self._steps = list(parameters), decay, 0
        self._values = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def step(self) -> None:
        """Update the averages with the parameters after an optimizer step."""
        self._steps += 1
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        for value, parameter in zip(self._values, self._parameters, strict=True):
            value.lerp_(parameter.detach(), 1 - decay)

    @torch.no_grad()
    def take(self) -> None:
        """Write the averages into the parameters."""
        for value, parameter in zip(self._values, self._parameters, strict=True):
            parameter.copy_(value)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Context manager in which the parameters are the averages."""
        now = [parameter.detach().clone() for parameter in self._parameters]
        self.take()
        try:
            yield
        finally:
            with torch.no_grad():
                for value, parameter in zip(now, self._parameters, strict=True):
                    parameter.copy_(value)

    def save(self, folder: Path) -> None:
        """Write the averages into the folder of a checkpoint."""
        tensors = {str(number): value for number, value in enumerate(self._values)}
        write_tensors(folder / FILE, {**tensors, "steps": torch.tensor(self._steps)}, {})

    def load(self, folder: Path) -> None:
        """Read the averages from the folder of a checkpoint.

        Raises:
            CheckpointError: the checkpoint lacks averages.
            TrainingError: the averages are those of another model.
        """
        held = TensorFile(folder / FILE).read()
        self._steps = int(held.pop("steps"))
        found = [held.get(str(number)) for number in range(len(self._values))]
        if len(held) != len(found) or any(not _alike(*pair) for pair in zip(found, self._values, strict=True)):
            raise TrainingError(f"{folder / FILE} has the averages of another model: resume with the model of that run")
        self._values = [each.to(value) for each, value in zip(found, self._values, strict=True) if each is not None]


def _alike(found: Tensor | None, value: Tensor) -> bool:
    return found is not None and found.shape == value.shape
