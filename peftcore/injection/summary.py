"""The summary of an injection, as `Injection.summary` returns it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Summary:
    """One injection at a glance; it prints as one line.

    Attributes:
        name: its name on the host.
        method: the method's name.
        sites: the number of operators.
        parameters: the number of values in its parameters.
        trainable: how many values train.
        active: whether it acts in this thread.
        merged: whether its effect is in the host's weights now.
        dtypes: dtypes of its parameters, without "torch.".
        devices: devices of its parameters.
    """

    name: str
    method: str
    sites: int
    parameters: int
    trainable: int
    active: bool
    merged: bool
    dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    irregular: tuple[str, ...]
    """States that are mixed or broken, in words; empty when all is regular."""

    def __str__(self) -> str:
        how = "merged" if self.merged else "active" if self.active else "inactive"
        text = f"{self.name}: {self.method}, {how}, {self.sites} sites"
        text += f", {self.trainable:,} of {self.parameters:,} parameters train"
        text += f", {'/'.join(self.dtypes)} on {'/'.join(self.devices)}"
        return text + "".join(f"; irregular: {each}" for each in self.irregular)
