"""All errors that peftcore raises. The message of an error says what is wrong and what to do. After an error the host
is unchanged."""

from __future__ import annotations

import reprlib
from typing import Any, Self

LONGEST = 4000
"""The largest number of characters of a message about a file. Longer messages are cut."""
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 3, 60, 60, 60


def shown(value: Any) -> str:
    """Returns a value as text for an error message, shortened if it is long."""
    many = isinstance(value, dict) and len(value) > 100  # they would be sorted
    return f"{len(value):,} entries" if many else _short.repr(value)


def said(error: BaseException) -> str:
    """Returns the message of another library's error, for use in an error message of peftcore: on one line, shortened,
    without control characters."""
    text = " ".join(str(error).split())[:600]
    return f"{''.join(each if each.isprintable() else '?' for each in text)} ({type(error).__name__})"


class PeftcoreError(Exception):
    """Base class of all errors of peftcore."""

    def about(self, where: object) -> Self:
        """Returns the same error with `where` added at the start of its message, unless the message already contains
        it. A message longer than `LONGEST` is cut."""
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
    """The method cannot act on a target module or tensor."""


class UnsupportedHost(PeftcoreError, TypeError):
    """The host cannot be adapted at all, for example because it is a DataParallel or TorchScript module or uses tensor
    parallelism."""


class DuplicateInjection(PeftcoreError, ValueError):
    """The host already has an injection of that name, or the name cannot be used."""


class UnknownInjection(PeftcoreError, LookupError):
    """The host does not have an injection of that name."""


class IdleAdapter(PeftcoreError, RuntimeError):
    """An operation needs the tensors of an adapter that an `AdapterPool` has moved off the model. Restore them with
    ``pool.wake(name)``."""


class MemoryLimit(PeftcoreError, RuntimeError):
    """The adapters to activate, together with those that cannot be offloaded, need more memory than the limit set by
    `keep_within`. Or an operation would need more memory than is free on a device. Nothing was changed."""


class AdapterInUse(PeftcoreError, RuntimeError):
    """An adapter cannot be merged, unmerged or removed while a forward is running that uses it. Nothing was changed."""


class SwapError(PeftcoreError, ValueError):
    """The values of one adapter cannot be swapped into another adapter without a change of outputs. Nothing was
    changed."""


class InactiveSite(PeftcoreError, RuntimeError):
    """The host's forward did not run a site that has an operator, so this operator would not train."""


class RouteError(PeftcoreError, RuntimeError):
    """The rows of a batch cannot use different injections (`route`), because of the method, the host or the length of
    the batch."""


class CompositionError(PeftcoreError, ValueError):
    """The requested composition of injections is not possible."""


class MissingContext(PeftcoreError, LookupError):
    """A method needs a value that the forward's arguments do not contain. Pass it by ``with peftcore.call(model,
    task=...)``."""


class NoRouters(PeftcoreError, LookupError):
    """There is no report on the routers of an adapter, because it has no routers or because they were not recorded. To
    record them, run the model within ``injection.reporting()``."""


class AmbiguousChoice(PeftcoreError, RuntimeError):
    """A thread runs the model without choosing adapters, while another thread or task is inside a block of `activate`
    or `route`. Choose the adapters in this thread too: ``peftcore.using(model, name)(function, ...)``."""


class BlockOrderError(PeftcoreError, RuntimeError):
    """Blocks of `activate`, `route` or `call` overlap without being nested. Or a generator, task or thread outlives the
    block in which it was started. Choose adapters for one call instead: ``peftcore.using(model, name)(function,
    ...)``."""


class AmbiguousBackward(PeftcoreError, RuntimeError):
    """Backward recomputes a layer (gradient checkpointing), and it is unknown which of several forwards with different
    active adapters it belongs to."""


class StaleBackward(PeftcoreError, RuntimeError):
    """Backward recomputes a layer, but tensors that the layer uses were changed after the forward."""


class CalibrationError(PeftcoreError, ValueError):
    """A method cannot use the user's data: ``data=`` is missing, the method does not use data, or the batches do not
    have what it needs, such as a loss."""


class TrainingError(PeftcoreError, RuntimeError):
    """In this setup, training would differ from the training that the method defines."""


class SequenceError(PeftcoreError, RuntimeError):
    """Virtual tokens cannot be inserted before this sequence, because an argument or a cache cannot be adjusted to
    them."""


class QuantizationError(PeftcoreError, ValueError):
    """Weights cannot be quantized as requested: the scheme is unknown, a package is missing, or the format does not fit
    the weights."""


class MergeError(PeftcoreError, RuntimeError):
    """A merge or unmerge is not possible now; no weight was changed."""


class NotMergeable(MergeError):
    """Adapters of this method can never be merged into weights."""


class CheckpointError(PeftcoreError, ValueError):
    """A saved adapter is damaged or unreadable, or has a format that peftcore does not read. Nothing was loaded."""


class NoWeights(PeftcoreError, RuntimeError):
    """The host is on the meta device, and the function needs values of its weights."""


class ExportError(PeftcoreError, ValueError):
    """An adapter or a model cannot be written in another library's format without loss. Nothing was written."""


class HubError(CheckpointError, ExportError):
    """The Hugging Face Hub rejects an adapter, has no adapter of that name, or does not respond. Nothing was loaded or
    pushed."""


class HostMismatch(CheckpointError):
    """The saved adapter was made for another base model. Nothing was loaded."""


class NewerFormat(CheckpointError):
    """The saved adapter was written by a newer version of peftcore than the one installed."""


class BadInput(PeftcoreError, ValueError):
    """The input in a command, a file or a call cannot be used. The message has the reason, and what to do."""


class MissingPackage(BadInput, ImportError):
    """A required Python package is not installed. The message has the pip command that installs it."""
