"""`load_base` builds the model that an adapter's file names, and loads the adapter onto it.

A file may only name weights and a class. The class has to be listed under an Auto class of transformers, and no code of
a repository runs. Weights are downloaded only if the caller passes `fetch=True`.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Size, nn

from peftcore.errors import CheckpointError, HostMismatch, said, shown
from peftcore.files.auto_classes import AUTO_CLASSES, TASKS, auto_classes
from peftcore.files.formats.card import NAME
from peftcore.files.formats.description import Description
from peftcore.files.formats.hub import COMMIT, fetched, is_fetched, located
from peftcore.files.save_load import describe, load

logger = logging.getLogger("peftcore")

CONFIG, ADAPTER = "config.json", "adapter_config.json"
BASE_FILES = [
    CONFIG, "generation_config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"
]  # fmt: skip
"""The files that are downloaded from a base's repository: its configuration, and its weights as safetensors."""
REVISION = re.compile(r"\w[\w-]*([./][\w-]+)*", re.ASCII)
"""Commits, branches and tags that a file may name; names that lead out of a folder, such as "..", do not match."""
OWN = (
    "adapter_kwargs", "code_revision", "config", "gguf_file", "ignore_mismatched_sizes", "local_files_only",
    "output_loading_info", "state_dict", "subfolder", "trust_remote_code", "use_safetensors",
)  # fmt: skip
"""Arguments of ``from_pretrained`` that callers cannot pass to `load_base`, since it sets them itself."""


def load_base(
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base: str | os.PathLike[str] | None = None,
    base_revision: str | None = None,
    fetch: bool = False,
    name: str | None = None,
    trainable: bool = False,
    **options: Any,
) -> nn.Module:
    """Build the model of transformers that a saved adapter was made on, and load the adapter onto it.

    The base that a file names is downloaded only if `fetch` is True, and no code of a repository runs. The model's
    class has to be listed by an Auto class of transformers for the base's configuration. If the adapter contains a
    head, the model's head gets the same number of outputs. If the adapter was made on a base with added token rows, the
    model's token tables get the same number of rows.

    Args:
        path: a folder, a file, or "owner/name" on the hub, as in `load`. The adapter itself is downloaded even if
            `fetch` is False, since the caller names it.
        revision: the revision of the adapter's repository, as in `load`.
        base: a folder or a repository on the hub to use instead of the base that the file names.
        base_revision: the revision of the base's repository to use instead of the commit that the file names.
        fetch: True downloads the base from the hub if the cache lacks it: its configuration, and its weights as
            safetensors.
        name: name of the injection; the method's name by default.
        trainable: False loads the adapter frozen.
        options: further arguments of transformers' ``from_pretrained``: ``dtype``, ``device_map``,
            ``quantization_config`` and so on.

    Returns:
        The model, in evaluation mode; ``peftcore.injections(model)`` has the adapter. A warning is logged if the base's
        commit differs from the one that the adapter was made on.

    Raises:
        CheckpointError: the file is damaged; it names no base, or a base that is not available locally; no Auto class
            lists the class that it names; the base has no safetensors, or needs its own code. The message says which
            argument to pass.
        HubError: the hub has no such repository, refuses access, or does not answer.
        HostMismatch: the adapter belongs to another base, or both the base and the adapter lack some weights.
        NewerFormat, UnknownMethod, DuplicateInjection, NoWeights: as in `load`.
    """
    if theirs := sorted(options.keys() & set(OWN)):
        raise CheckpointError(
            f"load_base does not accept {theirs[0]}=: it runs no code of repositories and reads only safetensors; "
            "otherwise build the model yourself, then call peftcore.load(model, path)"
        )
    place = located(path, revision)
    about = describe(place)
    try:
        import transformers
    except ImportError:
        raise CheckpointError("load_base builds models of transformers: pip install 'peftcore[cli]'") from None
    here = Path(path).exists()  # a file from elsewhere names no folders of this machine
    named = os.fspath(base) if base is not None else about.base
    if not named:
        raise CheckpointError(f"{place} names no base; pass base=, a folder or a repository on the hub")
    told = about.base_revision if base_revision is None else base_revision
    folder = _folder(named, told or None, fetch, here or base is not None)
    commit = folder.name if is_fetched(folder) else ""
    if commit and COMMIT.fullmatch(about.base_revision) and commit != about.base_revision:
        logger.warning(
            "the adapter in %s was made on commit %s of its base, and this is commit %s of %s: its outputs may "
            "differ", place, about.base_revision[:12], commit[:12], named,
        )  # fmt: skip
    config = _config(transformers, folder, named)
    auto, cls = _chosen(about, config, named)
    model = _built(transformers, auto, cls, folder, config, about, options)
    if commit:
        model.config._name_or_path = model.name_or_path = named
        model.config._commit_hash = commit
    if about.tokens:
        model.resize_token_embeddings(about.tokens, mean_resizing=False)
    load(model, place, name=name, trainable=trainable)
    found: nn.Module = model
    return found


def _folder(named: str, revision: str | None, fetch: bool, local: bool) -> Path:
    """Returns the folder of a base: a local folder with the name `named`, or a folder in the hub's cache, which is
    downloaded first if `fetch` is True.

    Args:
        local: whether `named` may be a local folder.
    """
    if local and Path(named).is_dir():
        folder = Path(named)
    elif not NAME.fullmatch(named):
        where = "does not exist" if local else "is not a repository, and an adapter from the hub names no local folder"
        raise CheckpointError(f"the base {shown(named)} {where}; pass base=, a folder or a repository on the hub")
    elif revision is not None and not REVISION.fullmatch(revision):
        raise CheckpointError(f"{shown(revision)} is not a valid revision of the base {named}; pass base_revision=")
    elif fetch:
        folder = fetched(named, revision, BASE_FILES, f"the base {named} cannot be fetched from the hub")
    else:
        folder = _cached(named, revision)
    if not (folder / CONFIG).is_file() or (folder / ADAPTER).exists():
        what = f"has no {CONFIG}" if not (folder / CONFIG).is_file() else f"has an {ADAPTER}: it is an adapter itself"
        raise CheckpointError(f"the base {named} {what}; pass the model, base=, a folder or a repository on the hub")
    return folder


def _cached(named: str, revision: str | None) -> Path:
    """Returns the folder of a base in the cache of the hub.

    Raises:
        CheckpointError: the cache does not contain the base.
    """
    at = f" at revision {revision}" if revision else ""
    pass_it = "pass fetch=True to download it, or base= with a folder that has it"
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        raise CheckpointError(
            f"the base {named} is not a folder; to look in the hub's cache: pip install 'peftcore[interop]'"
        ) from None
    file = try_to_load_from_cache(named, CONFIG, revision=revision)
    if isinstance(file, str):
        return Path(file).parent
    other = try_to_load_from_cache(named, CONFIG) if revision else None
    if isinstance(other, str):
        pass_it += f", or base_revision={Path(other).parent.name!r} for the cached revision"
    raise CheckpointError(f"the base {named}{at} is not in the hub's cache; {pass_it}")


def _config(transformers: Any, folder: Path, named: str) -> Any:
    """Returns the configuration of a base, without the fields for which transformers would download kernels (code) from
    a hub."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a library raises about a configuration
        raise _unbuilt(named, error) from error
    left = [config]
    while left:
        each = left.pop()
        each._attn_implementation = each._experts_implementation = None
        below = [getattr(each, key, None) for key in each.sub_configs]
        left += [inner for inner in below if isinstance(inner, transformers.PreTrainedConfig)]
    return config


def _chosen(about: Description, config: Any, named: str) -> tuple[str, str]:
    """Returns two names: the Auto class that builds the base, and the class on which the adapter was made. If the file
    contains only a task type of peft, the second name is empty.

    Raises:
        CheckpointError: no Auto class in `AUTO_CLASSES` lists the class, or the file has neither a class nor a task.
    """
    cls = about.host.rpartition(".")[2]
    by_hand = "build the model yourself, then peftcore.load(model, path)"
    if cls:
        for auto in auto_classes(config, cls):
            return auto, cls
        raise CheckpointError(
            f"the adapter was made on {shown(about.host)}, which no Auto class of transformers lists for {named} "
            f"({type(config).__name__}); {by_hand}"
        )
    if about.task not in TASKS:
        raise CheckpointError(f"the adapter does not say on which class it was made; {by_hand}")
    return TASKS[about.task], ""


def _built(
    transformers: Any, auto: str, cls: str, folder: Path, config: Any, about: Description, options: Mapping[str, Any]
) -> Any:
    """Returns the base with its weights. If the adapter contains a head, the base's head gets the same number of
    outputs.

    Raises:
        HostMismatch: the base is of another class, or some weights are neither in the base nor in the adapter.
    """
    assert auto in AUTO_CLASSES
    kind = getattr(transformers, auto)
    try:
        if "num_labels" not in options and (labels := _labels(kind, config, about.trained)) is not None:
            config.num_labels = labels
        model, info = kind.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=bool(about.trained),
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        raise _unbuilt(str(folder), error) from error
    if cls and type(model).__name__ != cls:
        raise HostMismatch(
            f"the adapter was made on {cls}, and {folder} is a {type(model).__name__}; pass the right base, base="
        )
    fresh = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if lacking := sorted(fresh - about.trained.keys()):
        raise HostMismatch(
            f"{folder} has no weights for {', '.join(lacking[:4])}, and the adapter does not contain them: they would "
            "be random; pass the base that has them, base="
        )
    return model


def _labels(kind: Any, config: Any, trained: Mapping[str, Size]) -> int | None:
    """Returns the number of outputs of the head in an adapter, if it differs from the base's configuration; otherwise
    None."""
    if not trained:
        return None
    with torch.device("meta"):
        own = dict(kind.from_config(config, trust_remote_code=False).named_parameters())
    other = {shape[0] for path, shape in trained.items() if path in own and shape and own[path].shape != shape}
    return other.pop() if len(other) == 1 else None


def _unbuilt(where: str, error: Exception) -> CheckpointError:
    reason = said(error)
    if "trust_remote_code" in str(error):
        reason = (
            "it contains its own code, which load_base does not run; if you trust it, build the model yourself, then "
            "call peftcore.load(model, path)"
        )
    return CheckpointError(f"the base {where} cannot be built: {reason}")
