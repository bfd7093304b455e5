"""Turns off the dropout of an adapter permanently, as trainers do for the whole model: the DPO and KTO trainers turn
dropout off, so that the policy and its reference differ only by the learned weights."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

PROBABILITIES = ("dropout", "input_dropout")
"""Attributes that hold the probability with which something is dropped."""


def turn_off_dropout(module: nn.Module) -> bool:
    """Set the dropout probabilities of a module and its submodules to 0: those of torch's dropout modules, and
    attributes with a name in `PROBABILITIES`.

    Returns:
        Whether the module has a dropout module, whatever its probability was, or such an attribute.
    """
    found = False
    for each in module.modules():
        if isinstance(each, _DropoutNd):
            each.p, found = 0.0, True
        for name in PROBABILITIES:
            if isinstance(value := vars(each).get(name), float) and value:
                setattr(each, name, 0.0)
                found = True
    return found
