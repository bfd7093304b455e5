"""Writes the files of transformers' Trainer for an adapted model: the base without adapters, and the adapters in
separate files. Checkpoints contain all tensors that training changes, by their names in the model.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import transformers
from torch import Tensor, nn

from peftcore.errors import ExportError
from peftcore.files.continuing import check_record, record_of
from peftcore.injection.injection import Injection, injections
from peftcore.layers.fsdp import is_sharded, whole_from
from peftcore.libraries.save_pretrained import SavesBase, check_saves, saving_base
from peftcore.registry.plugins import layer_of
from peftcore.training.optimizer import transient
from peftcore.utils.journal import Journal
from peftcore.utils.notices import notice

STATE = "peftcore"
"""The prefix of the checkpoint's keys for state between steps (non-persistent buffers), which the model's own state
dict does not contain."""


def within(model: nn.Module) -> list[Injection]:
    """Returns the injections of the model and of all its submodules, since it may wrap an adapted model."""
    return [injection for module in model.modules() for injection in injections(module).values()]


def training(model: nn.Module) -> list[Injection]:
    """Returns the injections that have trainable parameters."""
    return [each for each in within(model) if any(parameter.requires_grad for parameter in each.parameters())]


def keys_of(model: nn.Module, found: Iterable[Injection]) -> set[str]:
    """Returns the keys of the model's state dict that belong to these injections."""
    ours = {id(module) for injection in found for _, module in injection.modules()}
    prefixes = tuple(f"{path}." for path, module in model.named_modules(remove_duplicate=False) if id(module) in ours)
    return {key for key in model.state_dict() if key.startswith(prefixes)}


def frozen_keys(model: nn.Module) -> set[str]:
    """Returns the keys of the model's state dict that cannot change in training: frozen parameters of the base, and all
    tensors of a quantized weight.

    The base's buffers are not included, since the host may write into them.
    """
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    packed = [path for path, module in model.named_modules() if layer_of(module, "weight").packed]
    below = tuple(f"{path}." for path in packed if path)
    frozen |= {key for key in model.state_dict() if below and key.startswith(below)}
    return frozen - keys_of(model, within(model))


class TransientBuffer(NamedTuple):
    """A non-persistent buffer of an injection: statistics or a counter that a resumed training needs, or a random
    tensor that is drawn again from the same seed.
    """

    key: str
    """The key of the buffer in a checkpoint."""
    injection: Injection
    buffer: Tensor


def state_between_steps(model: nn.Module) -> list[TransientBuffer]:
    """Returns the non-persistent buffers of all injections."""
    found = ((path, injection) for path, module in model.named_modules() for injection in injections(module).values())
    return [
        TransientBuffer(".".join(filter(None, (STATE, path, injection.name, name))), injection, buffer)
        for path, injection in found
        for name, buffer in transient(injection)
        if not buffer.is_meta
    ]


def records(model: nn.Module) -> dict[str, Any]:
    """Returns a record of each trainable adapter, keyed by the adapter's path and name. When training resumes, the
    adapters are compared with these records."""
    found = ((path, injection) for path, module in model.named_modules() for injection in injections(module).values())
    wanted = {id(injection) for injection in training(model)}
    return {_place(path, each): record_of(each) for path, each in found if id(each) in wanted}


def check_records(model: nn.Module, held: Mapping[str, Any], where: object) -> None:
    """Check that the adapters of a model match their records in a checkpoint.

    Raises:
        CheckpointError: an adapter does not match its record; the message lists the differences.
    """
    for path, module in model.named_modules():
        for injection in injections(module).values():
            if (record := held.get(_place(path, injection))) is not None:
                check_record(record, injection, where)


def _place(path: str, injection: Injection) -> str:
    return ".".join(filter(None, (path, injection.name)))


def digest(tensor: Tensor) -> bytes:
    """Returns a digest of a tensor's values."""
    return hashlib.blake2b(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).digest()


def save_adapters(
    model: nn.Module, folder: str | os.PathLike[str], everything: Mapping[str, Tensor] | None = None
) -> None:
    """Save the trainable adapters that are not merged into a folder, in a form that `peftcore.load` reads. A single
    adapter is saved into the folder itself, and several into subfolders with their names.

    Args:
        everything: a state dict with whole values, for a model that is sharded over processes. If it is None for such a
            model, adapters are not saved: gathering them needs all processes, and the Trainer calls this function in
            only one.
    """
    found = [injection for injection in training(model) if not injection.merged]
    with whole_from(model, everything, [each for injection in found for each in injection.parameters()]):
        if is_sharded(model):
            return
        for injection in found:
            injection.save(Path(folder) if len(found) == 1 else Path(folder, injection.name))


@contextmanager
def _without_quantizer(model: nn.Module) -> Iterator[None]:
    """Context manager in which a quantized model of transformers saves plain tensors. Its quantizer is removed, since
    it would raise an error or look for quantized weights."""
    with Journal(temporary=True) as journal:
        if "hf_quantizer" in vars(model):
            journal.put(model, "", "hf_quantizer", None)
        yield


class CheckpointWriter(Protocol):
    """A running training that writes checkpoints. `PeftcoreCallback` implements this protocol."""

    def has_checkpoint(self, folder: str | os.PathLike[str]) -> bool:
        """Returns True if a folder is the checkpoint of the current step."""

    def keep(self, model: nn.Module, whole: dict[str, Any]) -> None:
        """Change a state dict of the model into that of a checkpoint: remove the frozen tensors, and add the state
        between steps (non-persistent buffers)."""


class SavesAdapters(SavesBase):
    """A ``save_pretrained`` that recognizes calls of transformers' Trainer by the argument `state_dict`. For these
    calls it saves the base, and the adapters in the same folder.

    Attributes:
        run: the current training. Checkpoints contain the tensors that change in training, by their names in the model,
            since the Trainer reads them by these names; transformers would rename them for models whose files have
            other names. Checkpoints are recognized by their folders, so the order of callbacks does not matter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.run: CheckpointWriter | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for copies and pickles, without the current training."""
        return {**vars(self), "run": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.__signature__.bind(*args, **kwargs)
        given = call.arguments
        if "state_dict" not in given:
            return super().__call__(*args, **kwargs)
        everything = given["state_dict"] and {**given["state_dict"]}  # the base is taken out of it as it is written
        if self.run is not None and self.run.has_checkpoint(given["save_directory"]):
            if given["state_dict"] is None or not is_sharded(self.model):
                whole = self.model.state_dict() if given["state_dict"] is None else dict(given["state_dict"])
                self.run.keep(self.model, whole)
                given["state_dict"] = whole
            with _without_quantizer(self.model):  # it has no codes
                found = self.plain(*call.args, **call.kwargs, **self.own_names())
        else:
            found = self._base_or_none(call)
        if given.get("is_main_process", True):
            save_adapters(self.model, given["save_directory"], everything)
        return found

    def _base_or_none(self, call: inspect.BoundArguments) -> Any:
        """Save the base. If it cannot be saved, log the reason instead of raising an error, so that the trained adapter
        can still be saved.

        Raises:
            ExportError: neither the base nor an adapter can be saved, since all adapters are merged.
        """
        try:
            self.check_form()
            check_saves(self.model)
        except ExportError as error:
            if all(injection.merged for injection in within(self.model)):
                raise
            notice([f"the Trainer saves the adapter alone, without its base: {error}"])
            return None
        given = call.arguments
        if given["state_dict"] is not None:
            ours = keys_of(self.model, within(self.model))
            given["state_dict"] = {key: value for key, value in given["state_dict"].items() if key not in ours}
        with saving_base():
            return self.base(*call.args, **call.kwargs)


def save_for_trainer(model: nn.Module) -> None:
    """Replace ``save_pretrained`` of a model of transformers, until its last injection is removed."""
    own = vars(model).get("save_pretrained")
    if isinstance(model, transformers.PreTrainedModel) and not isinstance(own, SavesAdapters):
        vars(model)["save_pretrained"] = new = SavesAdapters(model)
        new.owners = own.owners if isinstance(own, SavesBase) else []


def tell_run(model: nn.Module, run: CheckpointWriter | None) -> bool:
    """Set the current training of the model's ``save_pretrained``, or None after the end of a training.

    Returns True if the model's ``save_pretrained`` is a `SavesAdapters`.
    """
    own = vars(model).get("save_pretrained")
    if isinstance(own, SavesAdapters):
        own.run = run
    return isinstance(own, SavesAdapters)
