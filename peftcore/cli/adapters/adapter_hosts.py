"""Finds the model that an adapter is for, opens it, checks that it is complete, and saves it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import peftcore
from peftcore.errors import BadInput, NoWeights, PeftcoreError
from peftcore.files.formats.description import Description
from peftcore.injection.injection import Injection
from peftcore.models.configurations import PIPELINE, read_config
from peftcore.models.model_names import Named, find
from peftcore.models.opening import MadeOn, OpenedModel, components, open_model


@dataclass(frozen=True)
class ModelOptions:
    """The user's options that select the model."""

    model: Named
    component: str | None = None
    model_class: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """The folder of a model, and its known properties."""

    folder: Path
    """The folder of the model, or a GGUF file."""
    made_on: MadeOn
    pipeline: Path | None = None
    """The folder of the pipeline that contains the model; None if there is no pipeline."""


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file, and its description."""

    path: str
    about: Description

    def made_on(self, wanted: ModelOptions) -> MadeOn:
        about = self.about
        return MadeOn(about.host, about.task, about.trained, about.base, wanted.model_class)


def find_source(wanted: ModelOptions, adapter: AdapterFile) -> ModelSource:
    """Return the folder of the model that an adapter is for. In a pipeline, this is the folder of the only component
    that the adapter fits.

    Raises:
        BadInput: the adapter fits no component, or several.
    """
    model, made_on, component = wanted.model.place(), adapter.made_on(wanted), wanted.component
    if not (model / PIPELINE).is_file():
        if component is not None:
            raise BadInput(f"{wanted.model.said} is not a pipeline (it has no {PIPELINE}); remove --component")
        return ModelSource(model, replace(made_on, base=made_on.base or wanted.model.origin()[0]))
    parts = components(model)
    if component is not None and component not in parts:
        raise BadInput(f"{model} has no component {component!r}; its models are {', '.join(parts) or 'none'}")
    reasons = {} if component is not None else {name: misfit(parts[name], made_on, adapter) for name in parts}
    fitting = [component] if component is not None else [name for name, reason in reasons.items() if not reason]
    if not fitting:
        said = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise BadInput(f"{adapter.path} fits none of the models in {model}:{said}")
    if len(fitting) > 1:
        raise BadInput(f"{adapter.path} fits {' and '.join(fitting)}; choose one with --component")
    return ModelSource(parts[fitting[0]], made_on, model)


def misfit(folder: Path, made_on: MadeOn, adapter: AdapterFile) -> str:
    """Return the reason why an adapter does not fit a model; empty if it fits."""
    try:
        peftcore.load(open_model(folder, False, made_on).model, adapter.path, name="adapter")
    except NoWeights:
        return ""
    except PeftcoreError as error:
        return str(error)
    return ""


def base_of(adapter: AdapterFile) -> Named:
    """Return the base model that an adapter's file names, if it is a local folder; otherwise raise an error. Nothing is
    downloaded."""
    base = adapter.about.base
    if base and Path(base).is_dir():
        return find(Path(base))
    named = f"its file names {base!r}, which is not a folder here" if base else "its file names none"
    raise BadInput(f"pass --model, the base model of {adapter.path}: {named}")


def check_complete(
    opened: OpenedModel, folder: Path, injections: Sequence[Injection], weights: Sequence[float]
) -> None:
    """Raise an error if the model's folder lacks parameters that no adapter contains, or if two adapters contain the
    same parameter of the model."""
    brought: dict[str, float] = {}
    for injection, weight in zip(injections, weights, strict=True):
        for path in injection.trained_along:
            if path in brought:
                raise BadInput(f"two of the adapters have values of {path}; merge only one of them")
            brought[path] = weight
    if lacking := sorted(set(opened.fresh) - brought.keys()):
        raise BadInput(
            f"{folder}: its weights do not fit its config; missing or of another shape: {', '.join(lacking[:4])}"
        )
    partly = [path for path in opened.fresh if brought[path] != 1.0]
    if partly:
        raise BadInput(
            f"the model has no {partly[0]}, so the adapter supplies all of it: its weight in --weights has to be 1"
        )


def write(opened: OpenedModel, source: ModelSource, folder: Path) -> None:
    """Save a model. If it belongs to a pipeline, save the whole pipeline, with the other components unchanged."""
    if source.pipeline is None:
        opened.write(folder)
        return
    for name in filter(str.isidentifier, read_config(source.pipeline / PIPELINE)):
        part = source.pipeline / name
        if part == source.folder:
            opened.write(folder / name)
        elif part.is_dir():
            shutil.copytree(part, folder / name)
    shutil.copyfile(source.pipeline / PIPELINE, folder / PIPELINE)
