"""The tasks by name: the module of each is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from peftcore.comparing.errors import BadInput
from peftcore.comparing.packages import require

if TYPE_CHECKING:
    from peftcore.comparing.tasks.task import Task

TASKS = MappingProxyType(
    {
        "text-classification": "text_classification:TextClassification",
        "token-classification": "token_classification:TokenClassification",
        "causal-lm": "causal_lm:CausalLM",
        "chat": "chat:Chat",
        "seq2seq": "seq2seq:Seq2Seq",
        "image-classification": "image_classification:ImageClassification",
        "text-to-image": "text_to_image:TextToImage",
    }
)
"""Tasks by name, and where their classes are."""


def find(name: str) -> Task[Any]:
    """Return the task of a name.

    Raises:
        BadInput: there is none, or a package that it needs is missing.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise BadInput(f"no task {name!r}; {hint}there are: {', '.join(TASKS)}")
    module, _, kind = TASKS[name].partition(":")
    kind_of: type[Task[Any]] = getattr(importlib.import_module(f"peftcore.comparing.tasks.{module}"), kind)
    require(kind_of.packages)
    return kind_of()
