"""A conversation with a language model and its adapter: answers are printed while they are generated."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import peftcore
from peftcore.errors import BadInput
from peftcore.files.save_load import describe
from peftcore.models.loading import from_pretrained, load_tokenizer
from peftcore_lab.data.templates import rendered, with_template

Say = Callable[[str], None]
"""A function that receives an answer piece by piece."""


@dataclass
class Conversation:
    """The messages so far, and the model and adapter that answer them."""

    model: Any
    tokenizer: Any
    injection: peftcore.Injection
    system: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def answer(self, asked: str, say: Say, longest: int, temperature: float) -> None:
        """Answer a message, and append the message and the answer to the conversation. If the answer is interrupted,
        the part that was generated is appended.

        Args:
            asked: the user's message.
            say: receives the answer piece by piece, while it is generated.
            longest: the maximum number of tokens of an answer.
            temperature: temperature of sampling; 0 is greedy decoding.

        Raises:
            BadInput: the chat template raises an error for the conversation.
        """
        self.messages.append({"role": "user", "content": asked})
        self._answered(say, longest, temperature)

    def answer_of_the_base(self, say: Say, longest: int, temperature: float) -> None:
        """Answer the last question again without the adapter; this answer replaces the former one.

        Raises:
            BadInput: nothing was asked yet.
        """
        if not self.messages:
            raise BadInput("no question was asked yet: ask one first")
        if self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        with self.injection.disabled():
            self._answered(say, longest, temperature)

    def _answered(self, say: Say, longest: int, temperature: float) -> None:
        said: list[str] = []

        def hear(piece: str) -> None:
            said.append(piece)
            say(piece)

        begun = [{"role": "system", "content": self.system}] if self.system else []
        try:
            text = rendered(self.tokenizer, [*begun, *self.messages], True)
        except BadInput:
            self.messages.pop()
            raise
        read = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).to(self.model.device)
        chosen = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        try:
            with torch.no_grad():
                self.model.generate(
                    **read,
                    **chosen,
                    max_new_tokens=longest,
                    pad_token_id=self.tokenizer.pad_token_id,
                    streamer=_Spoken(self.tokenizer, hear),
                )
        finally:
            self.messages.append({"role": "assistant", "content": "".join(said).strip()})


class _Spoken(transformers.TextStreamer):
    """Passes the generated text on, word by word."""

    def __init__(self, tokenizer: Any, say: Say) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._say(text)


def conversation(adapter: str, model: str | None, template: str | None, system: str, dtype: str) -> Conversation:
    """Return a conversation with an adapter, which is loaded on its base model.

    Args:
        adapter: an adapter, or the folder of a run of ``peftcore train``, which also names the model and the chat
            template.
        model: a model to use instead of the one that the run or the adapter names.
        template: a chat template: ``chatml`` or a Jinja file.
        system: the system message.
        dtype: the dtype of the model's weights.

    Raises:
        BadInput: the model is unknown, or its tokenizer lacks a chat template.
        PeftcoreError: the adapter cannot be loaded.
    """
    place, run = Path(adapter), {}
    if (place / "run.json").is_file() and (place / "adapter").is_dir():
        run = _run(place / "run.json")
        adapter = str(place / "adapter")
    named = model or run.get("model") or describe(adapter).base
    if not named:
        raise BadInput(f"{adapter} does not name its base model: set --model")
    told = run.get("data", {}).get("chat_template") if template is None else template
    tokenizer = with_template(load_tokenizer(named), told, named)
    base = from_pretrained(transformers.AutoModelForCausalLM, named, dtype).eval()
    if run.get("quantize"):
        peftcore.quantize(base, run["quantize"])
    return Conversation(base, tokenizer, peftcore.load(base, adapter), system)


def _run(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} cannot be read ({error})") from None
    return found
