"""All errors that peftcore raises. Each says what was wrong and what to do next; after an error the host is
unchanged."""

from __future__ import annotations

import reprlib
from typing import Any, Self

LONGEST = 4000
"""The number of characters at which a message about a file is cut."""
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 3, 60, 60, 60


def shown(value: Any) -> str:
    """Returns a value as text for a message, shortened where it is long."""
    many = isinstance(value, dict) and len(value) > 100  # they would be sorted
    return f"{len(value):,} entries" if many else _short.repr(value)


def said(error: BaseException) -> str:
    """Returns the message of another library's error on one line for a message, shortened, without control
    characters."""
    text = " ".join(str(error).split())[:600]
    return f"{''.join(each if each.isprintable() else '?' for each in text)} ({type(error).__name__})"


class PeftcoreError(Exception):
    """Base class of all errors of peftcore."""

    def about(self, where: object) -> Self:
        """Returns the same error with `where` at the start of its message (unless the message contains it); a long
        message is cut."""
        text = str(self)
        text = text if str(where) in text else f"{where}: {text}"
        self.args = (text if len(text) <= LONGEST else f"{text[:LONGEST]}...",)
        return self


class UnknownMethod(PeftcoreError, LookupError):
    """No loaded plugin has a method of that name."""


class AmbiguousMethod(PeftcoreError, LookupError):
    """Two plugins have a method of that name; write ``"plugin/method"``."""


class PluginError(PeftcoreError):
    """A plugin, or a method class passed to `register`, breaks the contract."""


class ConfigError(PeftcoreError, ValueError):
    """A method's option is unknown, or its value breaks a rule."""


class TargetError(PeftcoreError, LookupError):
    """A target, an exclusion or a name in ``train`` matches nothing in the host."""


class UnsupportedSite(PeftcoreError, TypeError):
    """The method cannot act on that module or tensor."""


class UnsupportedHost(PeftcoreError, TypeError):
    """The host as a whole cannot be adapted: DataParallel, TorchScript, tensor parallel."""


class DuplicateInjection(PeftcoreError, ValueError):
    """The host already has an injection of that name, or the name cannot be used."""


class UnknownInjection(PeftcoreError, LookupError):
    """The host does not have an injection of that name."""


class IdleAdapter(PeftcoreError, RuntimeError):
    """An adapter's tensors are not on its model now, and the operation needs them there: restore them with
    ``pool.wake(name)``."""


class MemoryLimit(PeftcoreError, RuntimeError):
    """The adapters of a choice exceed the limit of `keep_within`, together with the adapters that cannot be offloaded;
    or the tensors that an operation makes exceed the free memory of a device. Nothing was changed."""


class AdapterInUse(PeftcoreError, RuntimeError):
    """An adapter cannot be merged, unmerged or removed while a forward runs that this would change; nothing was
    changed."""


class SwapError(PeftcoreError, ValueError):
    """The values of one adapter cannot replace those of another adapter exactly; nothing was changed."""


class InactiveSite(PeftcoreError, RuntimeError):
    """The host ran without running a grafted site, so the site's adapter would not train."""


class RouteError(PeftcoreError, RuntimeError):
    """Rows of a batch cannot go to different injections here: the method, the host or the length of the batch."""


class CompositionError(PeftcoreError, ValueError):
    """Injections cannot act together as asked."""


class MissingContext(PeftcoreError, LookupError):
    """A method needs a value that is not among the arguments of forward: ``with peftcore.call(model, task=...)``."""


class NoRouters(PeftcoreError, LookupError):
    """A report of an adapter's routers is not possible: it lacks routers, or they were not recorded; run the model
    within ``injection.reporting()`` first."""


class AmbiguousChoice(PeftcoreError, RuntimeError):
    """A thread runs the model without a choice, while another thread or task is in a block; choose the adapters in this
    thread: ``peftcore.using(model, name)(function, ...)``."""


class BlockOrderError(PeftcoreError, RuntimeError):
    """Blocks of `activate`, `route` or `call` overlap, or a generator, task or thread outlives the block in which it
    was started; make the choice for one call: ``peftcore.using(model, name)(function, ...)``."""


class AmbiguousBackward(PeftcoreError, RuntimeError):
    """A layer is recomputed inside backward, and several forwards under different choices could be meant."""


class StaleBackward(PeftcoreError, RuntimeError):
    """Backward recomputes a layer from tensors that were changed after the forward."""


class CalibrationError(PeftcoreError, ValueError):
    """Calibration is impossible: no ``data=``, data for a method that uses none, or batches without a loss."""


class TrainingError(PeftcoreError, RuntimeError):
    """Training with this setup would not follow the method."""


class SequenceError(PeftcoreError, RuntimeError):
    """Rows cannot go in front of this sequence: an argument or a cache cannot be adjusted to them."""


class QuantizationError(PeftcoreError, ValueError):
    """Weights cannot be quantized as asked: an unknown scheme, a missing package, a format that does not fit."""


class MergeError(PeftcoreError, RuntimeError):
    """A merge or unmerge is not possible now; no weight was changed."""


class NotMergeable(MergeError):
    """The method cannot be merged into weights at all."""


class CheckpointError(PeftcoreError, ValueError):
    """A saved adapter is damaged, unreadable or not one of ours; nothing was loaded."""


class NoWeights(PeftcoreError, RuntimeError):
    """The host is on the meta device, and the function needs values of its weights."""


class ExportError(PeftcoreError, ValueError):
    """An adapter or a model cannot be written in another library's format without losing something; nothing was
    written."""


class HubError(CheckpointError, ExportError):
    """The model hub refuses an adapter, does not know its name or does not answer; nothing was loaded or pushed."""


class HostMismatch(CheckpointError):
    """The saved adapter belongs to another base model; nothing was loaded."""


class NewerFormat(CheckpointError):
    """The adapter was written by a newer version than the one installed."""


class BadInput(PeftcoreError, ValueError):
    """A command, a file or a call has input that cannot be used; the message says why and what to do."""


class MissingPackage(BadInput, ImportError):
    """A Python package that is needed is not installed; the message has the pip line that installs it."""
