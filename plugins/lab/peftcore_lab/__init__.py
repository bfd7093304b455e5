"""Training runs, comparisons and searches: a library, and the commands ``peftcore train``, ``compare``, ``search`` and
``chat``.

This package is a plugin of peftcore. Its entry point is this module, which registers commands and tasks and imports
nothing else.

It may import all of the core except `peftcore.testing`. In the core only `peftcore.compare` imports this package. Only
the commands print; library functions get a display object for progress. Each package imports only packages that are
listed above it. In the order of reading:

- `digests`: digests of the content of files.
- `data`: examples from files, folders and datasets.
- `runs`: the schema of a training run, and the folder that it fills.
- `tasks`: tasks to learn.
- `training`: one run.
- `reports`: results of a comparison, for people and programs.
- `comparisons`: several methods, configurations and seeds on one task.
- `searching`: searches for the best method and options within a budget.
- `chat_session`: conversations with a language model and its adapter.
- `schemas`: the JSON schemas of the files that the commands read.
- `printing`: the tables that the commands print.
- `commands`: ``peftcore train``, ``compare``, ``search`` and ``chat``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from peftcore.author import hookimpl

if TYPE_CHECKING:
    import typer

PEFTCORE_API = 2


@hookimpl
def peftcore_commands(app: typer.Typer) -> None:
    from peftcore_lab.commands import add

    add(app)


@hookimpl
def peftcore_file_schemas() -> Mapping[str, str]:
    return {
        "train": "peftcore_lab.schemas:train",
        "compare": "peftcore_lab.schemas:compare",
        "search": "peftcore_lab.schemas:search",
    }


@hookimpl(trylast=True)
def peftcore_tasks() -> Mapping[str, str]:
    return {
        "text-classification": "peftcore_lab.tasks.text_classification:TextClassification",
        "token-classification": "peftcore_lab.tasks.token_classification:TokenClassification",
        "causal-lm": "peftcore_lab.tasks.causal_lm:CausalLM",
        "chat": "peftcore_lab.tasks.chat:Chat",
        "preference": "peftcore_lab.tasks.preference:Preference",
        "seq2seq": "peftcore_lab.tasks.seq2seq:Seq2Seq",
        "image-classification": "peftcore_lab.tasks.image_classification:ImageClassification",
        "segmentation": "peftcore_lab.tasks.segmentation:Segmentation",
        "text-to-image": "peftcore_lab.tasks.text_to_image:TextToImage",
    }
