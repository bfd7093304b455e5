"""Builds skeletons, which are models without weights: they are built from a configuration on the meta device. They are
for code that inspects a model and does not train it.

`LIBRARIES` has one class for each library, which builds a model and its inputs. A key of ``config.json`` determines the
class. Code in a model's repository is never run, and files of weights are not opened.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from peftcore.contract.config import DTYPES
from peftcore.errors import BadInput
from peftcore.models import example_inputs
from peftcore.models.configurations import exported, reader_of
from peftcore.models.example_inputs import Size
from peftcore.models.model_names import ModelConfiguration, check_architecture, find
from peftcore.utils.packages import require
from peftcore.utils.quiet import quiet

UNBUILT = "no model can be built from its configuration"


@dataclass(frozen=True)
class Skeleton(ABC):
    """A model without weights, on the meta device and in training mode. It can also build example inputs for the
    model's forward."""

    source: str
    model: nn.Module
    notes: tuple[str, ...] = ()

    library: ClassVar[str]
    """The import name of the library that builds the model."""

    @classmethod
    @abstractmethod
    def build(cls, found: ModelConfiguration, dtype: torch.dtype | None) -> Skeleton:
        """Build the model of a configuration in `dtype`. If `dtype` is None, the dtype of the configuration is used, or
        else float32."""

    @property
    def title(self) -> str:
        """Return two lines for the user: the model's class, library and dtype, and the name of its source."""
        return f"{type(self.model).__name__} ({self.library}, {str(self.dtype).removeprefix('torch.')})\n{self.source}"

    def as_dict(self) -> dict[str, str]:
        """Return the source, class, library and dtype of the model as a dictionary."""
        return {
            "model": self.source,
            "class": type(self.model).__name__,
            "library": self.library,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the first floating-point parameter, which inputs such as pictures need to have."""
        return next((each.dtype for each in self.model.parameters() if each.is_floating_point()), torch.float32)

    @abstractmethod
    def inputs(self, size: Size) -> dict[str, Any]:
        """Return the inputs of a forward for a batch: zeros, on the CPU.

        Raises:
            UnknownInputs: the configuration does not define the shapes of the inputs.
        """

    def with_labels(self, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        """Return the inputs, with labels added if forward accepts labels and computes a loss from them. The labels have
        the shape that fits `outputs`."""
        return inputs


class TransformersSkeleton(Skeleton):
    """Builds a model of transformers without weights. Its class is the one that ``architectures`` names in the
    configuration, or else the one that ``AutoModel`` chooses."""

    library = "transformers"

    @classmethod
    def build(cls, found: ModelConfiguration, dtype: torch.dtype | None) -> Skeleton:
        import transformers

        source = found.source
        with refusing(source, "no configuration that transformers reads"):
            config = transformers.AutoConfig.from_pretrained(found.name, trust_remote_code=False, **found.options)
            # A file may ask for kernels from the Hub here, also in the configurations inside it.
            config._attn_implementation = config._experts_implementation = None
        notes = []
        names = [str(name) for name in config.architectures or ()]
        made = next((c for n in names if (c := exported(transformers, n, transformers.PreTrainedModel))), None)
        # A GGUF file names no class, and what is in one is a language model.
        auto: Any = transformers.AutoModel if found.folder is not None else transformers.AutoModelForCausalLM
        with refusing(source, UNBUILT), meta(dtype or config.dtype):
            model = made(config) if made else auto.from_config(config, trust_remote_code=False)
        if names and made is None:
            notes.append(f"transformers exports no {names[0]}; this is its {type(model).__name__}")
        if "quantization_config" in config.to_dict():
            notes.append("the file says that its weights are quantized; here they are dense")
        return cls(source, emptied(model), tuple(notes))

    def inputs(self, size: Size) -> dict[str, Any]:
        model: Any = self.model
        accepted = parameters(model)
        # What generates takes pictures where its text has places for them; what compares needs both.
        main = [model.main_input_name] if model.can_generate() else [*accepted]
        return example_inputs.for_transformers(model.config, main, accepted, size, self.dtype)

    def with_labels(self, inputs: dict[str, Any], outputs: Any) -> dict[str, Any]:
        logits = outputs.get("logits")
        if logits is None or "labels" not in parameters(self.model):
            return inputs
        return {**inputs, "labels": torch.zeros(logits.shape[:-1], dtype=torch.long)}


class TimmSkeleton(Skeleton):
    """Builds a model of timm without weights, from the name of the architecture and the arguments in its
    configuration."""

    library = "timm"

    @classmethod
    def build(cls, found: ModelConfiguration, dtype: torch.dtype | None) -> Skeleton:
        import timm

        name = str(found.config["architecture"])
        check_architecture(found.source, name)
        where = name if found.folder is None else f"local-dir:{found.folder}"
        with refusing(found.source, UNBUILT), meta(dtype):
            model = timm.create_model(where, pretrained=False)
        return cls(found.source, emptied(model))

    def inputs(self, size: Size) -> dict[str, Any]:
        import timm

        data: Any = timm.data
        shape = data.resolve_model_data_config(self.model)["input_size"]
        return {next(iter(parameters(self.model))): torch.zeros(size.batch, *shape, dtype=self.dtype)}


class DiffusersSkeleton(Skeleton):
    """Builds one component of a diffusers pipeline without weights, from the class named in its configuration."""

    library = "diffusers"

    @classmethod
    def build(cls, found: ModelConfiguration, dtype: torch.dtype | None) -> Skeleton:
        import diffusers

        source = found.source
        name = str(found.config["_class_name"])
        made: Any = exported(diffusers, name, diffusers.ModelMixin)
        if made is None:
            raise BadInput(f"{source}: diffusers has no model {name!r}")
        with refusing(source, UNBUILT), meta(dtype):
            model = made.from_config(dict(found.config))
            model.register_to_config(_name_or_path=found.name)  # as from_pretrained does: adapters are saved with it
        return cls(source, emptied(model))

    def inputs(self, size: Size) -> dict[str, Any]:
        model: Any = self.model
        return example_inputs.for_diffusers(dict(model.config), parameters(model), size, self.dtype)


LIBRARIES: Mapping[str, type[Skeleton]] = {
    "_class_name": DiffusersSkeleton,
    "model_type": TransformersSkeleton,
    "architecture": TimmSkeleton,
}
"""The class that builds a model, by a key in the model's ``config.json``. If the file has several of these keys, the
first one in this order is used."""


def skeleton(source: str, dtype: str | None = None) -> Skeleton:
    """Build a model without weights (a skeleton), from the name of the model.

    Raises:
        BadInput: there is no such model, its library is not installed, or no model can be built from its configuration.
    """
    wanted = None if dtype is None else chosen_dtype(dtype)
    found = find(source).configured()
    kind = reader_of(LIBRARIES, found.config, found.source)
    require({kind.library: kind.library})
    with quiet():
        return kind.build(found, wanted)


def chosen_dtype(name: str) -> torch.dtype:
    """Return the dtype called `name`."""
    if name not in DTYPES:
        raise BadInput(f"--dtype {name} is not supported: use one of {', '.join(DTYPES)}")
    return DTYPES[name]


def parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of the model's forward by name."""
    return inspect.signature(model.forward).parameters


def emptied(model: nn.Module) -> nn.Module:
    """Return the model in training mode, after moving all its tensors to the meta device. Models build some tensors on
    other devices."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        slots: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in slots:
            for name, each in tensors.items():
                if each is not None and not each.is_meta:
                    new = each.detach().to("meta")
                    new = nn.Parameter(new, each.requires_grad) if isinstance(each, nn.Parameter) else new
                    tensors[name] = made.setdefault(id(each), new)
    return model.train()


@contextlib.contextmanager
def meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Context manager in which modules are built on the meta device. Their default dtype is `dtype`, or float32 if it
    is None."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or torch.float32)
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def refusing(source: str, what: str) -> Iterator[None]:
    """Context manager that turns any error into `BadInput`. Libraries do not document which errors a configuration may
    cause."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "its code is in its repository, and peftcore does not run that"
        raise BadInput(f"{source}: {what} ({type(error).__name__}: {reason[:300]})") from error
