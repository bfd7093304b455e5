"""The module between a `PeftModel` and the adapted model: ``base_model`` in ``peft_model.base_model.model``."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcore.layers.adapter_modules import ADAPTER_MODULES

ON = 0.5
"""The probability of `Tuner.switch` while dropout is not switched off. The value has no meaning, but must not be 0."""


class Tuner(nn.Module):
    """Contains the adapted model as ``model``, so that the parameter names in a `PeftModel` start with
    ``base_model.model.``, as in peft. The model's attributes are available on the tuner.

    Attributes:
        model: the adapted model.
        switch: a dropout module that is never called. Trainers switch dropout off by setting the probability of torch's
            dropout modules to 0. Dropout in adapters does not use such modules. It is switched off separately if the
            probability of `switch` is 0.
        prefix: a text that only the names of adapter parameters contain; trainers use it to exclude these parameters.
    """

    prefix = f"{ADAPTER_MODULES}."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.switch = nn.Dropout(ON)

    @property
    def dropout_is_off(self) -> bool:
        """True if dropout was switched off."""
        return self.switch.p != ON

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the output of the adapted model."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the adapted model, as peft's own classes do."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet, when it is copied or unpickled
                raise
            return getattr(self.model, name)
