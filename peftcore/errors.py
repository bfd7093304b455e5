"""Everything peftcore raises. Each error says what was wrong and what to do next; after any of them the host is as it
was."""

from __future__ import annotations

import reprlib
from typing import Any, Self

LONGEST = 4000
"""Characters of a message about a file; what is wrong with one may be long."""
_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxlong, _short.maxother = 3, 60, 60, 60


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    many = isinstance(value, dict) and len(value) > 100  # they would be sorted
    return f"{len(value):,} entries" if many else _short.repr(value)


class PeftcoreError(Exception):
    """The root: catch this to catch all of the below."""

    def about(self, where: object) -> Self:
        """The same error, its message beginning with what it is about (unless that is in it), and not endless."""
        text = str(self)
        text = text if str(where) in text else f"{where}: {text}"
        self.args = (text if len(text) <= LONGEST else f"{text[:LONGEST]}...",)
        return self


class UnknownMethod(PeftcoreError, LookupError):
    """No loaded plugin has a method of that name."""


class AmbiguousMethod(PeftcoreError, LookupError):
    """Two plugins have a method of that name; write ``"plugin/method"``."""


class PluginError(PeftcoreError):
    """A plugin, or a method class handed to `register`, breaks the contract."""


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
    """The host has no injection of that name."""


class InactiveSite(PeftcoreError, RuntimeError):
    """The host ran, but a grafted site did not: its adapter would train nothing."""


class RouteError(PeftcoreError, RuntimeError):
    """Rows of a batch cannot go to different injections here: the method, the host or the length of the batch."""


class CompositionError(PeftcoreError, ValueError):
    """Injections cannot act together as asked."""


class MissingContext(PeftcoreError, LookupError):
    """A method needs to be told something that forward has no argument for: ``with peftcore.call(model, task=...)``."""


class AmbiguousBackward(PeftcoreError, RuntimeError):
    """A layer is computed again inside backward, and several forwards under different choices could be meant."""


class CalibrationError(PeftcoreError, ValueError):
    """The method's look at data is impossible: no ``data=``, data that it has no use for, or batches without a loss."""


class TrainingError(PeftcoreError, RuntimeError):
    """Training set up like this would not do what the method says."""


class SequenceError(PeftcoreError, RuntimeError):
    """Rows cannot stand in front of this sequence: an argument or a cache that nobody knows how to keep in step."""


class QuantizationError(PeftcoreError, ValueError):
    """Weights cannot be packed as asked: an unknown scheme, a missing package, a format that does not fit."""


class MergeError(PeftcoreError, RuntimeError):
    """A merge or its undoing is impossible now; no weight was changed."""


class NotMergeable(MergeError):
    """The method cannot be folded into weights at all."""


class CheckpointError(PeftcoreError, ValueError):
    """A saved adapter is damaged, unreadable or not one of ours; nothing was loaded."""


class NoWeights(PeftcoreError, RuntimeError):
    """The host is on the meta device, and what was asked needs values of its weights."""


class ExportError(PeftcoreError, ValueError):
    """An adapter cannot be written in another library's format without losing something; nothing was written."""


class HostMismatch(CheckpointError):
    """The saved adapter belongs to another base model; nothing was loaded."""


class NewerFormat(CheckpointError):
    """The adapter was written by a newer version than the one installed."""
