"""The module between peft's model and the adapted one: ``base_model`` in ``peft_model.base_model.model``."""

from __future__ import annotations

from typing import Any

from torch import nn

from peftcore.layers.adapter_modules import ADAPTER_MODULES

ON = 0.5
"""The probability of a dropout that was not turned off; any number but 0."""


class Tuner(nn.Module):
    """Holds the adapted model as ``model``, so that names of its parameters begin as they do in peft, with
    ``base_model.model.``, and has its attributes.

    Attributes:
        model: the adapted model.
        switch: a dropout that drops nothing. Trainers turn dropout off by setting modules of torch to 0; dropouts of
            adapters are not such modules, and this switch shows that they should be turned off, too.
        prefix: a part of the names of all adapter parameters, and of these names only: trainers use it to leave them
            out.
    """

    prefix = f"{ADAPTER_MODULES}."

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.switch = nn.Dropout(ON)

    @property
    def dropout_is_off(self) -> bool:
        """Whether dropout was turned off."""
        return self.switch.p != ON

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the adapted model returns."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the adapted model: peft promises all of them, whatever the model is."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet, when it is copied or unpickled
                raise
            return getattr(self.model, name)
