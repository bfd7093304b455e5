"""The command ``peftcore chat``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from peftcore.cli.app import answered, printable
from peftcore.models.model_names import MODEL

Adapter = Annotated[str, typer.Argument(help="Folder of a run of peftcore train, or an adapter.")]
Model = Annotated[str | None, typer.Option(help=f"{MODEL} By default the model that the run or the adapter names.")]
Template = Annotated[str | None, typer.Option("--chat-template", help="chatml, or a Jinja file.")]
System = Annotated[str, typer.Option(help="The system message.")]
Longest = Annotated[int, typer.Option("--max-tokens", min=1, help="Maximum number of tokens of an answer.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Temperature of sampling; 0 is greedy decoding.")]
DType = Annotated[str, typer.Option(help="Data type of the weights: float32, bfloat16 or float16.")]
HELP = "/base answers without the adapter, /new starts a new conversation, /quit or Ctrl-D ends; Ctrl-C ends an answer"


def chat(
    adapter: Adapter,
    model: Model = None,
    template: Template = None,
    system: System = "",
    max_tokens: Longest = 256,
    temperature: Temperature = 0.0,
    dtype: DType = "float32",
) -> None:
    """Talk to a language model with its adapter, on a terminal or line by line from a pipe."""
    with answered():
        from peftcore.errors import BadInput
        from peftcore.utils.quiet import no_bars
        from peftcore_lab.chat_session import conversation

        no_bars()
        if dtype not in ("float32", "bfloat16", "float16"):
            raise BadInput(f"--dtype {dtype} is unknown: use float32, bfloat16 or float16")
        talk = conversation(adapter, model, template, system, dtype)
        if sys.stdin.isatty():
            print(HELP, file=sys.stderr)
        for line in _lines():
            said = line.strip()
            if said == "/quit":
                break
            if said == "/new":
                talk.messages.clear()
                continue
            if not said:
                continue
            try:
                if said == "/base":
                    talk.answer_of_the_base(_say, max_tokens, temperature)
                else:
                    talk.answer(said, _say, max_tokens, temperature)
            except KeyboardInterrupt:
                pass
            except BadInput as error:
                print(printable(error), file=sys.stderr, end="")
            print(flush=True)


def _say(piece: str) -> None:
    print(printable(piece), end="", flush=True)


def _lines() -> Iterator[str]:
    """Yield the lines that the user enters. On a terminal, lines can be edited if Python has the module readline."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() uses it
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
