"""Opens folders with a model of transformers, diffusers or timm, and writes such folders.

Code in a model's repository is never run, and pickles are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Size, nn

import peftcore
from peftcore.errors import BadInput, NoWeights
from peftcore.files.formats.peft_prompts import TASKS
from peftcore.files.safe_io import TensorFile
from peftcore.models.configurations import CONFIG, PIPELINE, exported, read_config, reader_of
from peftcore.models.loading import UNREADABLE, made_dense, unreadable
from peftcore.models.model_names import GGUF
from peftcore.utils.packages import require

BROKEN: tuple[type[Exception], ...] = (
    *UNREADABLE,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    StrictDataclassError,
    TypeError,
)
"""Errors that libraries raise for an invalid configuration, or one that needs packages that are not installed."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "AutoTokenizer": ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json"),
    "AutoProcessor": ("processor_config.json", "preprocessor_config.json"),
}
"""Files by name of the transformers class that loads them, for tokenizers and processors. A folder with one of the
files has such a tokenizer or processor."""


@dataclass(frozen=True)
class MadeOn:
    """The model that an adapter was trained on, as described in the adapter's file."""

    host: str = ""
    """The model's class; empty if the file does not name it."""
    task: str = ""
    """The task type in a file of peft. It is used if the file does not name a class."""
    trained: Mapping[str, Size] = field(default_factory=dict)
    """The shapes of the host's own parameters that the adapter's file contains, such as those of a head, by name."""
    base: str = ""
    """The name or path of the model, as written in the adapter's file; empty if the file does not have it."""
    meant: str | None = None
    """The name of the transformers class that the user chose; None if the user chose none."""


@dataclass(frozen=True)
class OpenedModel:
    """A model, and the function that writes it into a folder, together with its tokenizer and processor."""

    model: Any
    write: Callable[[Path], None]
    fresh: Collection[str] = ()
    """Names of the parameters that are not in the folder, so the adapter must contain them."""
    unpack: Callable[[], None] = lambda: None
    """Dequantizes all weights, and removes transformers' record that they are quantized, so that `write` writes a model
    that is not quantized."""


Reader = Callable[[Path, Mapping[str, Any], bool, MadeOn], OpenedModel]


def open_model(folder: Path, weights: bool = True, made_on: MadeOn | None = None) -> OpenedModel:
    """Open the model in a folder, or in a GGUF file.

    Args:
        folder: the folder, or the GGUF file.
        weights: False to build the model on the meta device from its configuration, without reading weights.
        made_on: the model that an adapter was trained on. If the adapter contains a head and the opened model has none,
            the model is built with such a head.

    Raises:
        BadInput: there is no model, its library is not installed, or the weights are damaged, pickled, or belong to
            another model.
    """
    config = _of_gguf(folder) if folder.suffix == GGUF else read_config(folder / CONFIG)
    reader = reader_of(READERS, config, folder)
    made_on = made_on or MadeOn()
    if made_on.meant is not None and reader is not _transformers:
        raise BadInput(f"{folder} is not a model of transformers; remove --model-class")
    return reader(folder, config, weights, made_on)


def _of_gguf(file: Path) -> dict[str, Any]:
    """Return the values that the configuration of the language model in a GGUF file would have."""
    with _loading(file):
        found = transformers.AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        made: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(found)]
    return {"model_type": found.model_type, "architectures": [made.__name__]}


def _located(place: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder and the keyword arguments to pass to transformers' `from_pretrained`."""
    gguf = {"gguf_file": place.name, "dtype": torch.float32}
    return (place.parent, gguf) if place.suffix == GGUF else (place, {})


def components(pipeline: Path) -> dict[str, Path]:
    """Return the models of a pipeline of diffusers, by name."""
    found = {}
    for name, value in read_config(pipeline / PIPELINE).items():
        library = value[0] if isinstance(value, list) and value else None
        if library in ("diffusers", "transformers") and name.isidentifier() and (pipeline / name / CONFIG).is_file():
            found[name] = pipeline / name
    return found


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Context manager that turns an error of a library about a folder into `BadInput` with one sentence."""
    try:
        yield
    except BROKEN as error:
        raise unreadable(folder, "model", error) from error


def _on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model on the meta device, without values.

    Raises:
        NoWeights: the model cannot be built on the meta device.
    """
    try:
        with torch.device("meta"):
            return build().eval()
    except BROKEN as error:
        raise NoWeights(f"the model cannot be built without its weights: {error}") from error


# transformers


def _transformers(folder: Path, config: Mapping[str, Any], weights: bool, made_on: MadeOn) -> OpenedModel:
    cls: Any = _class(folder, config, made_on)
    settings = _settings(cls, folder, made_on.base)
    if made_on.trained and (labels := _labels(_on_meta(lambda: cls(settings)), made_on)) is not None:
        settings.num_labels = labels
    if not weights:
        return OpenedModel(_on_meta(lambda: cls(settings)), _cannot)
    beside = _companions(folder)
    where, own = _located(folder)
    with _loading(folder):
        variant = _variant(folder, "model")
        model, info = cls.from_pretrained(
            where,
            config=settings,
            **{"dtype": "auto", **own},
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if own:
        made_dense(model)

    def write(out: Path) -> None:
        packed = "quantization_config" in model.config.to_dict()  # transformers cannot turn back how it read one
        model.save_pretrained(out, variant=variant, save_original_format=not packed)
        for each in beside:
            each.save_pretrained(out)

    def unpack() -> None:
        peftcore.dequantize(model)

    fresh = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])}
    return (
        OpenedModel(model, write, fresh, unpack)
        if "quantization_config" in config
        else OpenedModel(model, write, fresh)
    )


def _settings(cls: Any, folder: Path, base: str = "") -> Any:
    where, own = _located(folder)
    with _loading(folder):
        settings = cls.config_class.from_pretrained(where, local_files_only=True, **own)
    settings._name_or_path = base or str(folder)
    settings._attn_implementation = settings._experts_implementation = None  # a file may ask for kernels from the Hub
    return settings


def _class(folder: Path, config: Mapping[str, Any], made_on: MadeOn) -> Any:
    """Return the class of the model. If the user chose a class, it is that class. Otherwise it is the class named in
    the folder, unless the adapter contains parameters that this class does not have, such as a head. Then it is the
    class that the adapter was trained on."""
    names = config.get("architectures")
    own = _known(folder, names[0] if isinstance(names, list) and names else names, "its architecture is")
    if made_on.meant is not None:
        return _known(folder, made_on.meant, "--model-class is")
    skeleton = _on_meta(lambda: own(_settings(own, folder))) if made_on.trained else nn.Module()
    has = {f".{name}" for name, _ in skeleton.named_parameters(remove_duplicate=False)}
    lacking = [p for p in made_on.trained if not any(f".{p}".endswith(n) or n.endswith(f".{p}") for n in has)]
    if not lacking:
        return own
    listed = [each for task in TASKS if (each := _for_task(own.config_class, task)) is not None]
    other: Any = exported(transformers, made_on.host.rpartition(".")[2], transformers.PreTrainedModel)
    other = other or _for_task(own.config_class, made_on.task)
    if other is None or other.config_class is not own.config_class:
        raise BadInput(
            f"{folder}: {own.__name__} has no parameter {lacking[0]}, which the adapter contains; set --model-class to "
            f"the class that the adapter was made on: {', '.join(each.__name__ for each in listed)}"
        )
    return other


def _known(folder: Path, name: object, where: str) -> Any:
    found = exported(transformers, name, transformers.PreTrainedModel)
    if found is None:
        raise BadInput(f"{folder}: {where} {name!r}, which is not a model class of transformers")
    return found


def _for_task(config: type, task: str) -> type | None:
    """Return the class that transformers lists for one of peft's tasks."""
    listed: Mapping[type, Any] = getattr(transformers, TASKS[task]) if task in TASKS else {}
    found = listed.get(config, None)
    return found if isinstance(found, type) else None  # a few configurations have several


def _labels(skeleton: nn.Module, made_on: MadeOn) -> int | None:
    """Return the number of outputs of the head in an adapter's file, if it differs from the number in the
    configuration; otherwise None."""
    own = dict(skeleton.named_parameters())
    other = {shape[0] for path, shape in made_on.trained.items() if path in own and shape and own[path].shape != shape}
    return other.pop() if len(other) == 1 else None


def _companions(folder: Path) -> list[Any]:
    """Load the tokenizer and the processor in a folder, if it has them."""
    found = []
    for loader, files in COMPANIONS.items():
        if any((folder / name).exists() for name in files):
            try:
                load = getattr(transformers, loader).from_pretrained
                found.append(load(folder, local_files_only=True, trust_remote_code=False))
            except BROKEN as error:
                raise unreadable(folder, loader.removeprefix("Auto").lower(), error) from error
    return found


# diffusers


def _diffusers(folder: Path, config: Mapping[str, Any], weights: bool, made_on: MadeOn) -> OpenedModel:
    require({"diffusers": "diffusers"})
    import diffusers

    cls: Any = exported(diffusers, config["_class_name"], diffusers.ModelMixin)
    if cls is None:
        raise BadInput(f"{folder / CONFIG}: diffusers exports no model {config['_class_name']!r}")
    if not weights:
        skeleton: Any = _on_meta(lambda: cls.from_config(dict(config)))
        skeleton.register_to_config(_name_or_path=made_on.base or str(folder))
        return OpenedModel(skeleton, _cannot)
    with _loading(folder):
        variant = _variant(folder, "diffusion_pytorch_model")
        model, info = cls.from_pretrained(
            folder,
            torch_dtype=_stored_dtype(folder),
            variant=variant,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    return OpenedModel(model, lambda out: model.save_pretrained(out, variant=variant), info["missing_keys"])


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype that most of the stored weights in a folder have. Diffusers would load the weights in float32 if
    no dtype were passed."""
    files = sorted(folder.glob("*.safetensors"))
    dtypes = [dtype for file in files[:1] for dtype in TensorFile(file).dtypes.values() if dtype in FLOATS]
    return max(dtypes, key=dtypes.count, default=torch.float32)


def _variant(folder: Path, stem: str) -> str | None:
    """Return the variant in the file names of weights: ``fp16`` for ``model.fp16.safetensors``. None if there are
    weights without a variant, or several variants."""
    if any((folder / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json")):
        return None
    names = [path.name.removeprefix(f"{stem}.") for path in folder.glob(f"{stem}.*.safetensors")]
    found = {name.partition(".")[0].partition("-")[0] for name in names}
    return found.pop() if len(found) == 1 else None


# timm


def _timm(folder: Path, config: Mapping[str, Any], weights: bool, made_on: MadeOn) -> OpenedModel:
    require({"timm": "timm"})
    import timm
    from timm.models import save_for_hf

    if not timm.is_model(str(config["architecture"])):
        raise BadInput(f"{folder / CONFIG}: timm has no model {config['architecture']!r}")
    if weights and not (folder / "model.safetensors").is_file():
        raise BadInput(f"{folder}: it has no model.safetensors; pickles are not read, so save the model as safetensors")
    if not weights:
        return OpenedModel(_on_meta(lambda: timm.create_model(f"local-dir:{folder}")), _cannot)
    with _loading(folder):
        model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    rest = {key: value for key, value in config.items() if key not in ("architecture", "pretrained_cfg")}
    return OpenedModel(model, lambda out: save_for_hf(model, str(out), model_config=rest, safe_serialization=True))


READERS: Mapping[str, Reader] = {"_class_name": _diffusers, "model_type": _transformers, "architecture": _timm}
"""The function that opens a folder, by a key in the folder's ``config.json``. If the file has several of these keys,
the first one in this order is used."""


def _cannot(out: Path) -> None:
    raise AssertionError("a model on the meta device is not written")
