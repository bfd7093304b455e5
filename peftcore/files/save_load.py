"""Saving and loading adapters, in any format.

A file is checked against the host before the host changes: on any error nothing is loaded, and one error lists all
problems. Pickles are refused, and nothing that a file names is imported.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from peftcore.contract.operators import Checked
from peftcore.contract.surgeon_protocol import Surgeon
from peftcore.errors import (
    CheckpointError,
    ExportError,
    HostMismatch,
    InactiveSite,
    NoWeights,
    PeftcoreError,
    TargetError,
    UnsupportedHost,
    UnsupportedSite,
)
from peftcore.files.formats.card import CARD, Metrics, card, is_ours, metric_rows
from peftcore.files.formats.description import Description
from peftcore.files.formats.format import PICKLES, Made, Placed, Tensors, format_named, recognize
from peftcore.files.formats.hub import located, upload
from peftcore.files.formats.patterns import one_file
from peftcore.files.safe_io import (
    Write,
    clear_partial,
    folder_lock,
    is_text,
    make_folder,
    of_tensors,
    of_text,
    put_files,
    write_tensors,
)
from peftcore.forward.state.host_state import HostState, state_of
from peftcore.injection import base_dependence
from peftcore.injection.applied import check_filled, fill
from peftcore.injection.applying import apply_request, record
from peftcore.injection.injection import Injection
from peftcore.injection.request import Request, check_model, check_name
from peftcore.injection.swapping import matched, write
from peftcore.layers.fsdp import gathered, one_writes
from peftcore.layers.model_locks import changing
from peftcore.layers.pieces import at_hand
from peftcore.libraries.save_pretrained import saving_base
from peftcore.utils.device_memory import check_room, totals

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = logging.getLogger("peftcore")

SUFFIX = ".safetensors"
"""An adapter is saved as one file, and not as a folder, if the path ends with this suffix."""
SPARE = 2**28
"""The number of bytes that an adapter may need in addition to its file and the size of the host, for example for random
matrices that are generated from a seed."""
CALLS, CALLS_EACH = 10_000, 300
"""The largest number of torch calls in a dry run, and the number allowed in addition for each parameter of the host.
The method with the most calls for each parameter, fact_tk, makes a hundred."""


def save(
    injection: Injection,
    path: Path,
    formats: Sequence[str],
    weights: bool,
    metrics: Metrics | None = None,
    *,
    home: Path | None = None,
    moves: bool = False,
) -> None:
    """Save an adapter to a folder, or to one file. Each file is written whole or not at all, and equal adapters give
    equal bytes.

    If the model is sharded over processes, all of them have to call this function; the first process writes.

    Args:
        home: the final path of the folder, if it will be moved after writing.
        moves: True if the folder may be moved to any place later: files that contain their own path are then refused.
    """
    only = _only_file(path, formats)
    if only and metrics:
        raise ExportError(f"metrics are written into the card of a folder, and {path} is one file; pass a folder")
    metric_rows(metrics or {})
    model = injection.model
    try:
        injection.check()
    except InactiveSite as error:  # what was trained before is worth keeping
        logger.warning("the adapter is saved, although a part of it has no effect any more: %s", error)
    base_dependence.warn_of_another_base(injection)
    with _values_wanted(model), gathered(model, injection.parameters, reads=True):
        found = [(kind, kind.files(injection, weights)) for each in formats for kind in [format_named(each)]]
        contents = {name: content for _, files in found for name, content in files.items()}
        together = [name for kind, files in found if not kind.file for name in files]
    if moves and (fixed := [name for name, content in contents.items() if isinstance(content, Placed)]):
        raise ExportError(
            f"{fixed[0]} in the format {' and '.join(formats)} contains paths of folders on this machine, which "
            'no other machine has; push in the format "peftcore"'
        )
    for content in contents.values():
        if isinstance(content, Tensors) and (lacking := [key for key, each in content.values.items() if each.is_meta]):
            raise NoWeights(
                f"{lacking[0]} depends on weights of the host, which are on the meta device: load them first"
            )
    with one_writes(model) as mine:
        if mine and only:
            _write_file(path, contents[only])
        elif mine:
            if is_ours(path / CARD):
                contents[CARD] = card(injection, formats, metrics)
            _write(path, contents, together, Path(os.path.abspath(path if home is None else home)))


def _only_file(path: Path, formats: Sequence[str]) -> str:
    """Returns the name of the format's only file, if `path` is the path of a file; empty if `path` is a folder.

    Raises:
        ExportError: `path` is a file, but these formats need several files or another suffix.
    """
    if path.is_dir() or path.suffix not in (SUFFIX, *PICKLES):
        return ""
    kinds = [format_named(each) for each in formats]
    if path.suffix == SUFFIX and len(kinds) == 1 and kinds[0].file:
        return kinds[0].file
    why = (
        "peftcore writes no pickles"
        if path.suffix != SUFFIX
        else f"an adapter in the format {' and '.join(formats)} has several files"
    )
    raise ExportError(f"{path} is the name of a file, and {why}; pass a folder, such as {str(path.with_suffix(''))!r}")


def _write_file(path: Path, content: Tensors | str | Placed | Made) -> None:
    assert isinstance(content, Tensors), "tensors are what a format's only file holds"
    make_folder(path.parent)
    clear_partial(path.parent, path.name)
    write_tensors(path, content.values, content.metadata)


def _write(
    path: Path, contents: Mapping[str, Tensors | str | Placed | Made], together: Collection[str], home: Path
) -> None:
    for folder in sorted({path, *((path / name).parent for name in contents)}):
        make_folder(folder)
        clear_partial(folder)
    texts = {name: content.text(home) if isinstance(content, Placed) else content for name, content in contents.items()}
    with folder_lock(path):
        put_files(
            {
                path / name: _writing(content)
                for name, content in texts.items()
                if not (isinstance(content, str) and is_text(path / name, content))
            },
            {path / name for name in together},
        )


def _writing(content: Tensors | str | Made) -> Write:
    if isinstance(content, Tensors):
        return of_tensors(content.values, content.metadata)
    return content.write if isinstance(content, Made) else of_text(content)


def push(
    injection: Injection, repository: str, formats: Sequence[str], metrics: Metrics | None, **options: Any
) -> CommitInfo | None:
    """Save an adapter into a temporary folder, and upload the folder to a repository on the hub. Returns the commit in
    the process that writes, and None in other processes.

    Args:
        options: arguments of `formats.hub.upload`.
    """
    with tempfile.TemporaryDirectory(prefix="peftcore-") as name:
        folder = Path(name) / "adapter"
        with changing(injection.model):
            save(injection, folder, formats, False, metrics, moves=True)
        with one_writes(injection.model) as mine:
            return upload(folder, repository, **options) if mine else None


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    name: str | None = None,
    trainable: bool = False,
    active: bool = True,
    strict: bool = True,
    room: Mapping[str, Any] | None = None,
    words: Mapping[str, Sequence[int]] | None = None,
) -> Injection:
    """Apply a saved adapter to a host of the same shape.

    Args:
        model: the host. It may be on the meta device; the adapter's tensors have values even then.
        path: a folder or file that `Injection.save` wrote, or one of another library, or "owner/name" on a model hub,
            also "owner/name@revision"; the format is recognized. An adapter of an encoder without a head also fits a
            host that contains the encoder as a submodule, and vice versa. From files for whole pipelines, the part for
            `model` is loaded.
        revision: a branch, a tag or a commit of a repository on a hub; the main branch by default.
        name: name of the injection on this host; the method's name by default.
        trainable: False loads it frozen.
        active: True activates the adapter in addition to the active ones, in the same threads and tasks as `activate`
            does. Within a `route` or a composition, the adapters of rows and parts do not change. The adapter is added
            to those that are active outside of it. False leaves the active adapters unchanged until `activate`, `route`
            or `using` names the new one: useful for hosts that serve requests meanwhile, and for many adapters.
        strict: False accepts missing tensors (they keep their fresh values) and unknown ones (they are ignored).
        room: options that make the tensors larger than those of the file, ``{"rank": 64}``, so that adapters of up to
            that rank can replace it later by `Injection.swap`, also in a compiled model. The additional values are
            zero.
        words: only for a text encoder and files that contain new words (``bundle_emb.<word>.clip_l``): the token ids of
            each word in the tokenizer, one for each of its vectors, ``{"<cat>": [49408, 49409]}``. The token table must
            have these rows.

    Raises:
        CheckpointError: the files are damaged, or lack tensors or options of the adapter (the message lists all
            errors); or a revision is passed with a local path, or two different revisions are passed.
        HubError: the hub has no such repository or revision, refuses access, or does not answer.
        HostMismatch: the adapter belongs to another base.
        NewerFormat: the file was written by a newer version of peftcore or of the method's plugin.
        UnknownMethod: no installed plugin has its method.
        DuplicateInjection: the name is taken or cannot be used.
        NoWeights: the host is on the meta device, and the adapter depends on values of the host's weights.
        SwapError, ConfigError: the adapter would not compute the same with the options of `room`, or these options do
            not exist.
        MemoryLimit: the model has a limit (`keep_within`), and the adapters that cannot become idle leave no room; or
            the adapter certainly does not fit into the memory of a device.

    After an error the host is unchanged.
    """
    check_model(model)
    if name is not None:
        check_name(model, name)
    place = located(path, revision)  # other threads can change the model while it is fetched
    with changing(model):
        found = _read(model, place, strict, words)
        name = check_name(model, found.request.method.name if name is None else name)
        with _about(found.where), _values_wanted(model), at_hand(model.parameters()):
            source = None if room is None else found.filled()
            config = found.request.config.replace(**(room or {}))

            def give(injection: Injection) -> None:
                if source is None:
                    fill(injection, found.tensors)
                    check_filled(injection)
                else:
                    write(injection, matched(injection, source))
                injection.trainable(trainable)

            return apply_request(replace(found.request, config=config, name=name, active=active, fill=give))


def values_of(injection: Injection, path: Path) -> Injection:
    """Returns a saved adapter with its values, without installing it. It is checked against the model of `injection`,
    as in `load`.

    Raises:
        CheckpointError, HostMismatch, NewerFormat, UnknownMethod, NoWeights: as `load`.
        MergeError: the saved adapter depends on weights into which another injection is merged.
    """
    with changing(injection.model):
        found = _read(injection.model, path, True)
        with _about(found.where), _values_wanted(injection.model):
            source = found.filled()
            base_dependence.check_nothing_merged(source, injection.state)
        return source


@dataclass(frozen=True)
class _Read:
    """A saved adapter that fits a model."""

    request: Request
    where: Path
    tensors: Mapping[str, Tensor]

    def filled(self) -> Injection:
        """Returns the adapter with its values, without installing it."""
        source = Injection(self.request.method.name, record(self.request), HostState())
        fill(source, self.tensors)
        return source


def _read(model: nn.Module, place: Path, strict: bool, words: Mapping[str, Sequence[int]] | None = None) -> _Read:
    with folder_lock(place, shared=True):
        return _read_at(model, place, strict, words)


def _read_at(model: nn.Module, place: Path, strict: bool, words: Mapping[str, Sequence[int]] | None) -> _Read:
    # A file does not know of other adapters on the host: `saving_base` hides them.
    with _about(place), _values_wanted(model), one_file(), saving_base():
        kind = recognize(place)
        content = kind.open(place, model) if words is None else kind.open_with_words(place, model, words)
    with _about(content.where), _values_wanted(model), saving_base(), at_hand(model.parameters()):
        envelope = content.envelope
        request = envelope.request(model)
        try:
            with _Bounded(model):
                rehearsal = record(request, dry=True)
        except CheckpointError:
            raise
        except (TargetError, UnsupportedSite, UnsupportedHost) as error:
            where = f" (it was made on {envelope.host})" if envelope.host else ""
            raise HostMismatch(f"the adapter does not fit this base{where}: {error}") from None
        envelope.check(rehearsal)
        tensors = content.tensors(rehearsal, strict)
        _check_memory(rehearsal, tensors)
        _check_room(rehearsal)
        _check_values(rehearsal, tensors)
    return _Read(replace(request, host=rehearsal.resolver.host), content.where, tensors)


def describe(path: str | os.PathLike[str], revision: str | None = None) -> Description:
    """Returns the description of a saved adapter, in any format that `load` recognizes. No host is needed.

    Args:
        path: as in `load`.
        revision: as in `load`.

    Raises:
        CheckpointError: it does not exist, or it is damaged.
        HubError: as in `load`.
    """
    place = located(path, revision)
    with _about(place), one_file(), folder_lock(place, shared=True):
        return recognize(place).describe(place)


@contextmanager
def _values_wanted(model: nn.Module) -> Iterator[None]:
    """Context manager that turns errors of torch into `NoWeights`, if the host is on the meta device."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if isinstance(error, PeftcoreError) or not any(each.is_meta for each in model.parameters()):
            raise
        raise NoWeights(
            f"the host is on the meta device, but its weights are needed; load them first: {error}"
        ) from error


@contextmanager
def _about(where: Path) -> Iterator[None]:
    """Context manager that adds the file's path to the message of each error. Python errors that a method raises for
    wrong options in the file become a `CheckpointError`."""
    try:
        yield
    except PeftcoreError as error:
        error.about(where)
        raise
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        text = f"no adapter can be built from its content: {type(error).__name__}: {error}"
        raise CheckpointError(text).about(where) from error


class _Bounded(TorchFunctionMode):
    """Raises an error in a dry run that makes too many torch calls because of the options in a file."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.left = CALLS + CALLS_EACH * sum(len(module._parameters) for module in model.modules())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0 and func is not torch._C._set_grad_enabled:  # the end of a no_grad() comes through here too
            raise CheckpointError("its options ask for too many operators for this base")
        return func(*args, **(kwargs or {}))


def _check_values(surgeon: Surgeon, tensors: Mapping[str, Tensor]) -> None:
    """Let the operators check their values. The error names all wrong values."""
    modules = [(graft.key, graft.operator) for graft in surgeon.grafts]
    modules += [(f"shared:{name}", shared.module) for name, shared in surgeon.owned.items()]
    wrong = []
    for path, module in modules:
        for below, each in module.named_modules(prefix=path):
            if isinstance(each, Checked):
                names = {name: f"{below}.{name}" for name in (*each._parameters, *each._buffers)}
                values = {name: tensors[full] for name, full in names.items() if full in tensors}
                wrong += [f"{below}.{what}" for what in each.wrong_values(values)]
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _check_memory(surgeon: Surgeon, tensors: Mapping[str, Tensor]) -> None:
    """Check that the adapter's tensors that are not in the file are together not much larger than the host."""
    modules = [graft.operator for graft in surgeon.grafts] + [shared.module for shared in surgeon.owned.values()]
    held = {id(each): each for module in modules for each in (*module.parameters(), *module.buffers())}
    needed = sum(each.numel() * each.element_size() for each in held.values())
    known = sum(each.numel() * each.element_size() for each in tensors.values())
    host = sum(each.numel() * each.element_size() for each in surgeon.model.parameters())
    if needed - known > host + SPARE:
        raise CheckpointError(
            f"it holds {known:,} bytes, but its options need {needed:,}: more than the host itself, {host:,}"
        )


def _check_room(surgeon: Surgeon) -> None:
    """Check that the operators fit into the memory of their devices. Nothing is checked for a model with a memory limit
    (`keep_within`), which can make other adapters idle."""
    state = state_of(surgeon.model)
    if state is not None and state.residency is not None:
        return
    built = {
        id(each): (graft.site.device, each.nbytes) for graft in surgeon.grafts for each in _tensors(graft.operator)
    }
    check_room(
        totals(built.values()),
        "the adapter",
        "Remove an adapter, or give adapters a limit with peftcore.keep_within",
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yields the tensors of an operator that are on the meta device."""
    yield from (each for each in (*module.parameters(), *module.buffers()) if each.is_meta)


class _Files:
    """The functions of this module that `Injection` calls. Its own module is in a layer below, and cannot import this
    one."""

    save, push = staticmethod(save), staticmethod(push)
    located, values_of = staticmethod(located), staticmethod(values_of)


Injection._files = _Files()
