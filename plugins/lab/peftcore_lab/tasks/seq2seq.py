"""The sequence-to-sequence task: the model learns target texts for source texts, such as translations, summaries or
answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from pydantic import PositiveInt

from peftcore.models.loading import from_pretrained, load_tokenizer
from peftcore.models.model_names import Use
from peftcore_lab.data.columns import TEXT_NAMES, choose_column
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._language import costs, perplexity
from peftcore_lab.tasks.task import IGNORED, Prepared, RowsOfTasks, Task

SOURCES = ("source", "input", "document", "article", "question", *TEXT_NAMES)
TARGETS = ("target", "output", "summary", "highlights", "answer", "translation")


class PairData(RowsOfTasks):
    """Options of the data: a column of texts, and one of target texts."""

    source: str | None = None
    """Column of source texts. By default it is detected by its name."""
    target: str | None = None
    """Column of target texts. By default it is detected by its name."""
    prefix: str = ""
    """A text in front of each source text, such as "summarize: "."""
    max_length: PositiveInt = 256
    """Maximum number of tokens of a source text and of a target text."""
    prompts: tuple[str, ...] = ()
    """Source texts for which the model generates texts before and after training. The generated texts are shown."""


class Seq2Seq(Task[PairData]):
    """The task, scored by the perplexity of the target texts."""

    Data = PairData
    metric = "perplexity"
    use = Use.TEXT

    def prepare(self, run: Run, data: PairData) -> Prepared:
        data.refuse(prompts=data.prompts)
        found = data.splits()
        source = choose_column(found.train.column_names, data.source, SOURCES, "source", data.train)
        target = choose_column(found.train.column_names, data.target, TARGETS, "target", data.train)
        tokenizer = load_tokenizer(run.model)

        def encoded(part: Any) -> list[dict[str, Any]]:
            texts = [data.prefix + text for text in part[source]]
            read = tokenizer(texts, text_target=list(part[target]), truncation=True, max_length=data.max_length)
            rows = [{name: values[row] for name, values in read.items()} for row in range(len(texts))]
            return data.told(rows, part)

        model = from_pretrained(transformers.AutoModelForSeq2SeqLM, run.model, run.dtype)
        return Prepared(
            model=model,
            train=encoded(found.train),
            held_out=encoded(found.held_out),
            collate=transformers.DataCollatorForSeq2Seq(tokenizer, model, label_pad_token_id=IGNORED),
            tasks=data.names(found),
            reduce=lambda logits, labels: costs(logits[0] if isinstance(logits, tuple) else logits, labels),
            metrics=perplexity,
            samples=_written(model, tokenizer, data) if data.prompts else None,
        )


def _written(model: Any, tokenizer: Any, data: PairData) -> Callable[[], list[str]]:
    def write() -> list[str]:
        training = model.training
        texts = [data.prefix + prompt for prompt in data.prompts]
        read = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        with torch.no_grad():
            written = model.eval().generate(**read, max_new_tokens=data.max_length, do_sample=False)
        model.train(training)
        said: list[str] = tokenizer.batch_decode(written, skip_special_tokens=True)
        return said

    return write
