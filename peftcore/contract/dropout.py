"""Dropout of an adapter turned off for good, as trainers turn off that of the whole model: those of DPO and KTO do, so
that the policy and its reference differ by what was learned alone."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

PROBABILITIES = ("dropout", "input_dropout", "block_dropout")
"""Attributes that hold the probability with which something is dropped."""


def turn_off_dropout(module: nn.Module) -> bool:
    """Set to 0 the probabilities of torch's dropout modules, and those that a module has as an attribute of the name,
    in the module and in all below it.

    Returns:
        Whether there is anything of the kind: a dropout module, whatever its probability was, or a probability.
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
