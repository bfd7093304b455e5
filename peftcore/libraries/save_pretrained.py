"""Replaces ``save_pretrained`` of adapted models, so that it writes only the base; `Injection.save` writes the
adapters. It raises an error if the result could not be loaded again: for example, if the weights are dense (not
quantized), but the model's config says that they are quantized.

``state_dict()`` contains base and adapters, because training checkpoints need both. So ``save_pretrained(folder)`` is
replaced on the instance while the host is adapted. Models of transformers, diffusers and hub mixins have this method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from peftcore.errors import ExportError, UnsupportedSite
from peftcore.layers.adapter_modules import BASE_ALONE
from peftcore.libraries.instance_methods import InstanceMethod, give_methods_back, replace_methods
from peftcore.registry.plugins import layer_of
from peftcore.utils.journal import Journal
from peftcore.utils.notices import notice
from peftcore.utils.variables import holding

CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)
"""In layers of unknown classes, buffers of these dtypes count as quantized values. Buffers of positions have wider
dtypes."""


@contextmanager
def saving_base() -> Iterator[None]:
    """Context manager in which `state_dict` of adapted hosts returns only the tensors of the base, under their original
    names. It affects this thread only.

        with peftcore.saving_base():
            timm.models.save_for_hf(model, "folder")

    If an injection is merged into the base, the merged weights are saved.
    """
    with holding(BASE_ALONE, True):
        yield


@runtime_checkable
class Saves(Protocol):
    """A model with a ``save_pretrained`` method."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Write the model into a folder."""


class Owner(Protocol):
    """An object because of which ``save_pretrained`` of a model is replaced: the state of an adapted host, or
    `QuantizationChanges`."""

    @property
    def made_dense(self) -> Sequence[str]:
        """Returns the paths of modules that were quantized when the model was loaded, and are not quantized now."""

    @property
    def left_out(self) -> Sequence[str]:
        """Returns the names of trainable injections that are not merged, so that saving the base does not save them."""


class SavesBase(InstanceMethod):
    """A ``save_pretrained`` that saves the base without adapters. If the caller passes a state dict, as the Trainer
    does for checkpoints, that state dict is saved."""

    name = "save_pretrained"
    having = Saves
    owners: list[Owner]  # type: ignore[assignment]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Save the base of the model.

        Raises:
            ExportError: the weights are quantized but the config does not say so, or the reverse. Nothing was written.
        """
        if "state_dict" in self.__signature__.bind(*args, **kwargs).arguments:
            return self.plain(*args, **kwargs)
        self.check_form()
        check_saves(self.model)
        if not BASE_ALONE.get():  # where it is asked for, nobody has to be told
            _tell(dict.fromkeys(name for owner in self.owners for name in owner.left_out))
        with saving_base():
            return self.base(*args, **kwargs)

    def base(self, *args: Any, **kwargs: Any) -> Any:
        """Save the base by the original method. If transformers cannot convert quantized weights back to the tensor
        names of their checkpoint, they are saved under the model's own names."""
        try:
            return self.plain(*args, **kwargs)
        except NotImplementedError:
            return self.plain(*args, **kwargs, **self.own_names())

    def own_names(self) -> dict[str, bool]:
        """Returns the argument with which ``save_pretrained`` saves tensors under the model's own names; empty if the
        class's method does not have it."""
        name = "save_original_format"
        return {name: False} if name in self.__signature__.parameters else {}

    def check_form(self) -> None:
        """Verify that the model's weights are quantized exactly if the model's config says so.

        Raises:
            ExportError: the weights and the config do not agree.
        """
        _check_form(self.model, [path for owner in self.owners for path in owner.made_dense])


@dataclass(frozen=True, eq=False)
class QuantizationChanges:
    """Permanent record that modules of a model were quantized or dequantized after the model was loaded."""

    made_dense: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()


def _tell(names: Iterable[str]) -> None:
    """Tell the user which adapters are not saved. With other libraries, a training script may end with this call and
    have saved everything."""
    notice(
        f"save_pretrained (and push_to_hub) of the model writes only the base, without the adapter {name!r}, which "
        "trains: save it with injection.save(folder), or push it with injection.push_to_hub(...)"
        for name in names
    )


@runtime_checkable
class ModelWithConfig(Protocol):
    """A model with a config, like models of transformers and diffusers."""

    config: Any


@runtime_checkable
class Quantizer(Protocol):
    """A quantizer of transformers. (Quantizers of diffusers cannot remove their entry from a config.)"""

    def remove_quantization_config(self, model: Any) -> None:
        """Remove the entry in the model's config that says that it is quantized."""

    def is_serializable(self) -> bool:
        """Whether the quantizer's models can be saved."""


def _says_quantized(model: nn.Module) -> bool:
    return isinstance(model, ModelWithConfig) and getattr(model.config, "quantization_config", None) is not None


def _is_packed(model: nn.Module) -> bool:
    with saving_base():
        return any(layer_of(module, "weight").packed for module in model.modules())


def _check_form(model: nn.Module, made_dense: Sequence[str]) -> None:
    if not _says_quantized(model):
        if isinstance(model, ModelWithConfig) and _is_packed(model):
            raise ExportError(
                "the weights were quantized after the model was loaded, and its config does not say so, so what "
                "save_pretrained writes could not be loaded. Save only the adapter (injection.save) and quantize the "
                "base again, or call peftcore.dequantize(model) first"
            )
    elif made_dense:
        advice = (
            "Call bake() if merged, and then peftcore.dequantize(model); or use merge(into='same')"
            if isinstance(getattr(model, "hf_quantizer", None), Quantizer)
            else "Load the base without quantization and the adapter onto it, and call bake(); or merge(into='same')"
        )
        raise ExportError(
            f"{len(made_dense)} modules (first {made_dense[0]}) are dense, but the model's config says quantized, so "
            f"what save_pretrained writes could not be loaded. {advice}"
        )


def check_saves(model: nn.Module) -> None:
    """Verify that the quantized weights of a model can be saved in quantized form.

    Raises:
        ExportError: some weights cannot be saved; the message says what to do instead.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, Quantizer) and not quantizer.is_serializable():
        raise ExportError(
            "transformers cannot write weights with this quantization. Save only the adapter (injection.save), since "
            "the base can be loaded from its source; or write a dense model: bake(), then peftcore.dequantize(model)"
        )
    with saving_base():
        for module in model.modules():
            layer_of(module, "weight").check_saves(module)


def check_readable(model: nn.Module) -> None:
    """Verify that all weights of a quantized model can be dequantized.

    Raises:
        UnsupportedSite: some weights cannot be dequantized.
    """
    for path, module in model.named_modules():
        layer_of(module, "weight").check_readable(module, "weight")
        if _says_quantized(model) and not layer_of(module, "weight").packed:
            persistent = (b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set)
            codes = [each for each in persistent if each is not None and each.dtype in CODES and each.dim() > 1]
            if codes:
                raise UnsupportedSite(
                    f"{path} ({type(module).__name__}) has quantized values that no installed plugin can read, so it "
                    "cannot be made dense; load the base without quantization, and the adapter onto it"
                )


def note_form(journal: Journal, model: nn.Module, made_dense: Sequence[str] = ()) -> None:
    """Record permanently that modules of a model were quantized or dequantized (`made_dense`). If all weights are
    dense, the config's entry on quantization is removed. If weights and config cannot be made to agree,
    ``save_pretrained`` of the model raises an error from now on."""
    modules = list(model.modules())
    if not _is_packed(model) and _is_readable(model):
        for module in modules:
            quantizer = getattr(module, "hf_quantizer", None)
            if isinstance(quantizer, Quantizer) and _says_quantized(module):
                for written in (module, module.config):
                    journal.note(written)
                quantizer.remove_quantization_config(module)
            _forget_form(journal, module)
    if any(map(_says_quantized, modules)) if made_dense else _is_packed(model):
        replace_methods(journal, modules, SavesBase, QuantizationChanges(tuple(made_dense)))


def _is_readable(model: nn.Module) -> bool:
    with saving_base():
        try:
            check_readable(model)
        except UnsupportedSite:
            return False
    return True


def _forget_form(journal: Journal, module: nn.Module) -> None:
    method = vars(module).get(SavesBase.name)
    if isinstance(method, SavesBase):
        for owner in [each for each in method.owners if isinstance(each, QuantizationChanges)]:
            give_methods_back(journal, module, owner)
