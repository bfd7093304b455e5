"""The preference task: the model learns to prefer one of two answers, by direct preference optimization (DPO)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import transformers
from datasets import Dataset
from pydantic import PositiveFloat
from torch import nn

from peftcore.errors import BadInput
from peftcore.models.loading import from_pretrained, load_tokenizer
from peftcore.models.model_names import Use
from peftcore_lab.data.example_sources import splits
from peftcore_lab.data.preferences import PairColumns, PreferencePair, in_common, pair_columns, pairs
from peftcore_lab.data.templates import rendered, with_template
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._causal import DecoderData, answers
from peftcore_lab.tasks.task import Prepared, Task


class PreferenceData(DecoderData):
    """Options of the data: columns of prompts, of preferred answers and of rejected answers. Each value is a text or a
    list of messages. Without prompts, both answers are whole conversations with the same beginning."""

    prompt: str | None = None
    """Column of prompts: texts or messages. By default it is detected by its name. The column is optional."""
    chosen: str | None = None
    """Column of the preferred answers: texts, messages or whole conversations; ``chosen`` when left out."""
    rejected: str | None = None
    """Column of the other answers: texts, messages or whole conversations; ``rejected`` when left out."""
    chat_template: str | None = None
    """A file with a Jinja template, or ``chatml``, instead of the tokenizer's template."""
    beta: PositiveFloat = 0.1
    """Strength beta of the regularization towards the reference, which is the model before training."""


class Preference(Task[PreferenceData]):
    """The task, scored by the share of pairs whose preferred answer has the higher reward."""

    Data = PreferenceData
    packages: ClassVar[Mapping[str, str]] = {"trl": "trl"}
    use = Use.TEXT
    metric = "reward_accuracy"
    greater = True
    coarse = True

    def prepare(self, run: Run, data: PreferenceData) -> Prepared:
        from trl.trainer.dpo_trainer import DataCollatorForPreference  # TRL is there only where this task is trained

        from peftcore_lab.tasks import _dpo

        found = splits(data.train, data.held_out, data.held_out_size)
        tokenizer = with_template(load_tokenizer(run.model), data.chat_template, run.model)
        wanted = PairColumns(data.prompt, data.chosen, data.rejected)
        read = [pairs(part, pair_columns(part.column_names, wanted, name), name) for name, part in found.named]
        parts = [[_encoded(pair, tokenizer) for pair in part] for part in read]
        parts = [[row for row in part if _differ(row, data.max_length)] for part in parts]
        if not all(parts):
            raise BadInput(
                f"{data.train}: no pair has answers that differ within {data.max_length} tokens: raise data.max_length"
            )
        model = from_pretrained(transformers.AutoModelForCausalLM, run.model, run.dtype)
        for module in model.modules():
            if isinstance(module, nn.Dropout):  # noise of its own would count as a difference from the reference
                module.p = 0.0
        prompts = [rendered(tokenizer, [{"role": "user", "content": each}], True) for each in data.prompts]
        return Prepared(
            model=model,
            train=Dataset.from_list(parts[0]),
            held_out=Dataset.from_list(parts[1]),
            collate=DataCollatorForPreference(tokenizer.pad_token_id, data.max_length),
            metrics=_dpo.preferred,
            samples=answers(model, tokenizer, prompts, data.answer_length) if prompts else None,
            trainer=_dpo.trainer(tokenizer, data.beta, continued=run.adapter is not None),
        )


def _encoded(pair: PreferencePair, tokenizer: Any) -> dict[str, list[int]]:
    """Return the tokens of the common beginning of both conversations (at most up to the answers), and the further
    tokens of each conversation."""
    asked = rendered(tokenizer, pair.prompt, True)
    texts = [rendered(tokenizer, [*pair.prompt, *answer], False) for answer in (pair.chosen, pair.rejected)]
    if not all(text.startswith(asked) for text in texts):
        raise BadInput(
            "the chat template changes earlier turns, so the tokens of answers cannot be found in one pass: set "
            "another data.chat_template"
        )
    ids, one, other = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (asked, *texts))
    begin = in_common(ids, one, other)  # the end of the prompt and an answer may have a token in common
    return {"prompt_ids": one[:begin], "chosen_ids": one[begin:], "rejected_ids": other[begin:]}


def _differ(row: dict[str, list[int]], length: int) -> bool:
    """Return whether the answers differ within the first `length` tokens of the conversations."""
    left = max(0, length - len(row["prompt_ids"]))
    return row["chosen_ids"][:left] != row["rejected_ids"][:left]
