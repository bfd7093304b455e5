"""Chat templates: the template of the tokenizer, a template from a file, or ChatML for base models without a
template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peftcore.errors import BadInput

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
KNOWN = {"chatml": CHATML}


def with_template(tokenizer: Any, template: str | None, where: str) -> Any:
    """Return the tokenizer with a chat template, given by a known name or a Jinja file. None keeps the template of the
    tokenizer.

    Raises:
        BadInput: the template or its file is missing.
    """
    if template is not None:
        tokenizer.chat_template = KNOWN.get(template) or _read(Path(template))
    if not tokenizer.chat_template:
        raise BadInput(
            f"{where}: its tokenizer has no chat template; set data.chat_template to {', '.join(KNOWN)} or to a Jinja "
            "file, or use the task causal-lm for plain text"
        )
    return tokenizer


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(
            f"data.chat_template: {path} cannot be read ({error}); set a Jinja file or one of {', '.join(KNOWN)}"
        ) from None


def rendered(tokenizer: Any, messages: list[dict[str, Any]], answering: bool) -> str:
    """Return a conversation as the text that the model reads. With `answering`, the beginning of an answer is added.

    Raises:
        BadInput: the template raises an error for the conversation.
    """
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answering)
    except Exception as error:  # a template raises what it likes
        raise BadInput(f"the chat template refuses {messages!r:.200}: {error}") from None
    return text
