"""Applies configurations of peft. The result is the same fresh adapter that peft itself would make.

peft makes and saves the adapter on a twin of the model, whose tensors share the model's memory. `load` then reads this
file like any other one, so a configuration has the same meaning as a file of peft.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from typing import Any

import torch
from torch import nn

from peftcore.errors import ConfigError
from peftcore.files.save_load import load
from peftcore.injection.injection import Injection
from peftcore.libraries.save_pretrained import saving_base
from peftcore.surgery.seeding import preserved_rng


def apply_peft_config(model: nn.Module, config: Any, *, name: str | None, seed: int | None) -> Injection:
    """Adapt a model with a configuration of peft.

    Args:
        model: the host; changed in place.
        config: a configuration of any class of peft whose files `load` reads.
        name: name of the injection; the method's name by default.
        seed: the seed with which peft initializes the adapter. The state of torch's global generator is restored.

    Raises:
        ConfigError: peft itself refuses the configuration for this model.
        CheckpointError, HostMismatch: the file that peft wrote has a part that peftcore does not support; the message
            names it.
    """
    import peft

    with tempfile.TemporaryDirectory() as folder, preserved_rng():
        torch.manual_seed(torch.initial_seed() if seed is None else seed)
        try:
            with saving_base(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapted = peft.get_peft_model(twin(model, _writes(config)), copy.deepcopy(config))
                adapted.save_pretrained(folder, save_embedding_layers=False)
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(f"peft does not accept this {type(config).__name__} for this model: {error}") from error
        return load(model, folder, name=name, trainable=True)


def _writes(config: Any) -> bool:
    """Whether peft changes the base's weights when it initializes the adapter, as for OLoRA and LoftQ. True for every
    initialization with a name except "gaussian"."""
    starts = [value for key, value in vars(config).items() if key.startswith("init")]
    return any(isinstance(start, str) and start != "gaussian" for start in starts)


def twin(model: nn.Module, copied: bool = False) -> nn.Module:
    """Returns a copy of a model with new parameter and buffer objects that share the memory of the originals, so that
    freezing them or assigning other data changes only the copy. With `copied`, they have their own memory, for code
    that writes to it."""
    memo: dict[int, Any] = {}
    for parameter in () if copied else model.parameters():
        memo[id(parameter)] = _beside(parameter)
    for buffer in () if copied else model.buffers():
        memo[id(buffer)] = buffer.detach()
    return copy.deepcopy(model, memo)


def _beside(parameter: nn.Parameter) -> nn.Parameter:
    """Returns another parameter of the same class that shares the memory of `parameter`. Attributes of a subclass are
    copied, such as the scales of a quantized weight."""
    kind = type(parameter)
    if kind is nn.Parameter or not issubclass(kind, nn.Parameter):
        return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    other = torch.Tensor._make_subclass(kind, parameter.data, parameter.requires_grad)
    vars(other).update(vars(parameter))
    return other
