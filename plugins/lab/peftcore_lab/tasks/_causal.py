"""Base of tasks for decoders: loads the model, collates batches, and generates answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from pydantic import PositiveInt
from torch import Tensor

from peftcore.models.loading import from_pretrained
from peftcore_lab.data.packing import PackedCollator, check_apart, packed
from peftcore_lab.runs.run import Run
from peftcore_lab.tasks._language import costs, perplexity
from peftcore_lab.tasks.task import IGNORED, Data, Prepared, RowsOfTasks


class DecoderData(Data):
    """Options of the data of tasks for decoders."""

    max_length: PositiveInt = 512
    """Maximum number of tokens of an example."""
    prompts: tuple[str, ...] = ()
    """Prompts that the model answers before and after training. The answers are shown."""
    answer_length: PositiveInt = 48
    """Maximum number of tokens of an answer."""


class CausalData(DecoderData, RowsOfTasks):
    """Options of data in which the model predicts each token of an example."""

    pack: bool = False
    """Pack several examples into one row of `max_length` tokens, with hardly any padding. Tokens do not attend to other
    examples of their row."""


def prepared(
    run: Run,
    data: CausalData,
    tokenizer: Any,
    train: list[Any],
    held_out: list[Any],
    prompts: Sequence[str],
    tasks: tuple[str, ...],
) -> Prepared:
    """Load a decoder, and return it with its tokenized examples. `prompts` are texts as the model reads them, with the
    chat template applied.

    Raises:
        BadInput: data with a column of tasks is to be packed, or has prompts.
    """
    data.refuse(pack=data.pack, prompts=data.prompts)
    model = from_pretrained(transformers.AutoModelForCausalLM, run.model, run.dtype)
    collate: Any = transformers.DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    check = None
    if data.pack:
        train, held_out = (packed(part, data.max_length) for part in (train, held_out))
        collate = PackedCollator(tokenizer.pad_token_id)
        check = functools.partial(check_apart, model, vocabulary=len(tokenizer))
    return Prepared(
        model=model,
        train=train,
        held_out=held_out,
        collate=collate,
        tasks=tasks,
        check=check,
        reduce=surprise,
        metrics=perplexity,
        samples=answers(model, tokenizer, prompts, data.answer_length) if prompts else None,
    )


def surprise(logits: Any, labels: Tensor) -> Tensor:
    """Return the summed cross-entropy and the number of each row's tokens. Each token is predicted from the tokens
    before it."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    return costs(scores[:, :-1], labels[:, 1:])


def answers(model: Any, tokenizer: Any, prompts: Sequence[str], length: int) -> Callable[[], list[str]]:
    """Return a function that generates the continuation of each prompt greedily."""

    def answer(prompt: str) -> str:
        read = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
        written = model.generate(**read, max_new_tokens=length, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        text: str = tokenizer.decode(written[0, read["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def all_answers() -> list[str]:
        training = model.training
        model.eval()
        with torch.no_grad():
            said = [answer(prompt) for prompt in prompts]
        model.train(training)
        return said

    return all_answers
