"""Continuous batches: requests for different adapters decode together, each from its arrival to its own end.

A step admits the requests that wait, by one forward over their prompts, and then decodes one token for every row. The
base model runs once for all rows, and each adapter on its own rows (`peftcore.using` with a name for each row).
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import peftcore
from peftcore.errors import PeftcoreError, RouteError, UnknownInjection, UnsupportedHost

T = TypeVar("T")
Event = int | str | Exception
"""A token; or why there are no more: "stop", "length", "gone", or an error."""


@dataclass(eq=False)
class Request:
    """One prompt, its adapter, and whom to tell of tokens."""

    prompt: Sequence[int]
    loaded: str | None
    """The injection that answers, as it was when the request came: `adapter@version`; None for the base model."""
    max_tokens: int
    tell: Callable[[Event], None]
    """Called in the engine's thread."""
    tokens: int = 0
    gone: bool = False
    """Set by anybody when nobody waits for the answer any more."""
    over: bool = False


@dataclass
class Batch:
    """Requests in rows. Their keys and values end at the same column, so what is shorter has padding in front, which
    the mask hides; the longest row has none."""

    requests: list[Request]
    lengths: Tensor
    """[rows]: the tokens that each row has in the cache."""
    last: Tensor
    """[rows]: the token that each row has not read yet."""
    cache: DynamicCache

    def keep(self, rows: list[int]) -> None:
        """Drop all other rows, and the columns that are padding in all that stay."""
        if len(rows) == len(self.requests):
            return
        self.requests = [self.requests[row] for row in rows]
        self.lengths, self.last = self.lengths[rows], self.last[rows]
        width = int(self.lengths.max()) if rows else 0
        for layer in self.cache.layers:
            start = layer.keys.shape[2] - width
            layer.keys, layer.values = layer.keys[rows, :, start:], layer.values[rows, :, start:]

    def join(self, other: Batch) -> None:
        """Append the rows of another batch."""
        self.requests += other.requests
        self.lengths, self.last = torch.cat([self.lengths, other.lengths]), torch.cat([self.last, other.last])
        width = int(self.lengths.max())
        for mine, theirs in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys = torch.cat([_padded(mine.keys, width), _padded(theirs.keys, width)])
            mine.values = torch.cat([_padded(mine.values, width), _padded(theirs.values, width)])


def _padded(tensor: Tensor, width: int) -> Tensor:
    lacking = width - tensor.shape[2]  # [rows, heads, columns, head_dim]
    return F.pad(tensor, (0, 0, lacking, 0)) if lacking else tensor


class Engine:
    """Serves one model and its adapters: `run` in one thread, everything else in any.

    Args:
        model: a causal language model of transformers, whose layers all keep all keys.
        rows: how many requests run at once.
        mixed: False runs the requests of one adapter at a time; the others wait until none of them is left.
        low_memory: methods that change weights (DoRA, OFT) keep no copy of these while they are served.

    Attributes:
        serving: for each adapter the injection that answers new requests, `adapter@version`.
        running: how many requests each injection has, those that wait included.
        steps: how many tokens were decoded for all rows at once.

    Raises:
        UnsupportedHost: some layers keep a window or a state, of which rows cannot be padded in front.
    """

    def __init__(self, model: Any, rows: int = 32, mixed: bool = True, low_memory: bool = False) -> None:
        if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
            raise UnsupportedHost("some layers keep a window of keys, or a state: their rows cannot be joined here")
        self.model, self.rows, self.mixed, self.low_memory, self.steps = model, rows, mixed, low_memory, 0
        self.longest: int = model.config.max_position_embeddings
        eos = model.generation_config.eos_token_id
        self.stop = set(eos if isinstance(eos, list) else [eos])
        self.serving: dict[str, str] = {}
        self.running: Counter[str] = Counter()
        self._lock = threading.Lock()  # held while requests and adapters find each other
        self._orders: SimpleQueue[Callable[[], None]] = SimpleQueue()  # what the others want, for between two steps
        self._waiting: deque[Request] = deque()
        self._batch: Batch | None = None
        self._versions = 0
        self._changed = self._closed = False

    # ------------------------------------------------------------------------------------------- from any thread

    def submit(
        self, prompt: Sequence[int], adapter: str | None, max_tokens: int, tell: Callable[[Event], None]
    ) -> Request:
        """Ask for an answer of an adapter, or of the base model. What happens to the adapter later does not change it.

        Raises:
            UnknownInjection: there is no such adapter.
            ValueError: the prompt is empty, or longer than the model allows with its answer.
        """
        if not 0 < len(prompt) <= self.longest - max_tokens:
            raise ValueError(f"{len(prompt)} tokens and {max_tokens} more, where the model takes 1 to {self.longest}")
        with self._lock:
            loaded = None if adapter is None else self.serving.get(adapter)
            if adapter is not None:
                if loaded is None:
                    raise UnknownInjection(f"no adapter {adapter!r}; there are {', '.join(self.serving) or 'none'}")
                self.running[loaded] += 1
        request = Request(prompt, loaded, max_tokens, tell)
        self._orders.put(partial(self._waiting.append, request))
        return request

    def load(self, name: str, folder: Path) -> Future[str]:
        """Load an adapter between two steps, instead of the one of that name: its requests end with the old one.

        Returns:
            A future of the injection's name, or of an error: those of `peftcore.load`, RouteError where the method acts
            on the whole batch or keeps states of its own in the cache, MissingContext where it is to be told more than
            a prompt.
        """
        return self._order(partial(self._load, name, folder))

    def unload(self, name: str) -> Future[None]:
        """Take an adapter from new requests; those that run end with it.

        Returns:
            A future; UnknownInjection in it: there is no such adapter.
        """
        return self._order(partial(self._unload, name))

    def close(self) -> None:
        """Stop after the present step. All who wait are told."""
        self._orders.put(partial(setattr, self, "_closed", True))

    def _order(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

        self._orders.put(run)
        return future

    # --------------------------------------------------------------------------------------- in the engine's thread

    def run(self) -> None:
        """Serve until `close`."""
        while not self._closed:
            self._changed = False
            # DoRA's norms and the like are computed once. Anew when adapters came or went: a model without any keeps
            # nothing, and what is kept for one that went goes too.
            with torch.no_grad(), peftcore.cache_weights(self.model):
                while not (self._changed or self._closed):
                    self._obey()
                    try:
                        self.step()
                    except Exception as error:
                        self._give_up(error)
        self._obey()
        self._give_up(RuntimeError("the engine was closed"))

    def step(self) -> None:
        """Let go who is gone, admit who waits, and decode one token for each row."""
        for request in [each for each in self._waiting if each.gone]:
            self._waiting.remove(request)
            self._end(request, "gone")
        if self._batch is not None:
            for request in self._batch.requests:
                if request.gone and not request.over:
                    self._end(request, "gone")
            self._batch = self._swept(self._batch)
        self._admit()
        if self._batch is not None:
            self._decode(self._batch)
            self.steps += 1

    def _obey(self) -> None:
        idle = self._batch is None and not self._waiting and not self._closed
        while idle or not self._orders.empty():
            self._orders.get()()
            idle = False

    def _admit(self) -> None:
        """Give waiting requests the free rows: one forward over all their prompts."""
        batch = self._batch
        running = [] if batch is None else batch.requests
        candidates = list(self._waiting)
        if not self.mixed:
            first = (running or candidates)[:1]
            candidates = [each for each in candidates if each.loaded == first[0].loaded]
        chosen = candidates[: self.rows - len(running)]
        if not chosen:
            return
        new = self._swept(self._prefill(chosen))
        for request in chosen:
            self._waiting.remove(request)
        if batch is None or new is None:
            self._batch = batch or new
        else:
            batch.join(new)

    def _prefill(self, requests: list[Request]) -> Batch:
        lengths = torch.tensor([len(request.prompt) for request in requests])
        width = int(lengths.max())
        ids = torch.tensor([[0] * (width - len(each.prompt)) + list(each.prompt) for each in requests])
        batch = Batch(requests, torch.zeros_like(lengths), lengths, DynamicCache(config=self.model.config))
        seen = torch.arange(width) >= width - lengths[:, None]
        self._forward(batch, ids, seen, (seen.cumsum(1) - 1).clamp(min=0))
        batch.lengths = lengths
        return batch

    def _decode(self, batch: Batch) -> None:
        width = int(batch.lengths.max()) + 1
        seen = torch.arange(width) >= width - 1 - batch.lengths[:, None]
        self._forward(batch, batch.last[:, None], seen, batch.lengths[:, None])
        batch.lengths = batch.lengths + 1

    def _forward(self, batch: Batch, ids: Tensor, seen: Tensor, places: Tensor) -> None:
        """Run the model on all rows, and tell each its token."""
        names = [request.loaded for request in batch.requests]
        device = self.model.device
        output: Any = self._choosing(names)(
            self.model,
            input_ids=ids.to(device),
            attention_mask=seen.long().to(device),
            position_ids=places.to(device),
            cache=batch.cache,
            logits_to_keep=1,
        )
        batch.last = output.logits[:, -1].argmax(-1).cpu()
        for request, token in zip(batch.requests, batch.last.tolist(), strict=True):
            request.tokens += 1
            request.tell(token)
            if token in self.stop or request.tokens == request.max_tokens:
                self._end(request, "stop" if token in self.stop else "length")

    def _choosing(self, names: list[str | None]) -> Callable[..., Any]:
        return peftcore.using(self.model, names[0] if len(set(names)) == 1 else names)  # one for all needs no route

    def _swept(self, batch: Batch) -> Batch | None:
        batch.keep([row for row, request in enumerate(batch.requests) if not request.over])
        return batch if batch.requests else None

    def _give_up(self, error: Exception) -> None:
        """Tell everybody that there is no answer: a forward failed, and what it left in the cache is unknown."""
        requests = [] if self._batch is None else self._batch.requests
        for request in [*requests, *self._waiting]:
            if not request.over:
                self._end(request, error)
        self._batch = None
        self._waiting.clear()

    def _end(self, request: Request, why: Event) -> None:
        request.over = True
        if request.loaded is not None:
            with self._lock:
                self.running[request.loaded] -= 1
            self._retire(request.loaded)
        request.tell(why)

    def _load(self, name: str, folder: Path) -> str:
        self._versions += 1
        loaded = f"{name}@{self._versions}"
        injection = peftcore.load(self.model, folder, name=loaded, active=False)
        injection.low_memory = self.low_memory
        try:
            self._try(loaded)
        except PeftcoreError:
            injection.remove()
            raise
        with self._lock:
            before, self.serving[name] = self.serving.get(name), loaded
        self._changed = True
        if before is not None:
            self._retire(before)
        return loaded

    def _try(self, loaded: str) -> None:
        """Let an injection answer beside the base model: what it cannot do is said here, and not in a batch."""
        cache = DynamicCache(config=self.model.config)
        layers = len(cache.layers)
        ids = torch.zeros(2, 2, dtype=torch.long, device=self.model.device)
        self._choosing([loaded, None])(self.model, ids, cache=cache)
        if type(cache) is not DynamicCache or len(cache.layers) != layers:
            raise RouteError(f"{loaded} keeps states of its own in the cache, of which rows cannot be joined here")

    def _unload(self, name: str) -> None:
        with self._lock:
            loaded = self.serving.pop(name, None)
        if loaded is None:
            raise UnknownInjection(f"no adapter {name!r}; there are {', '.join(self.serving) or 'none'}")
        self._retire(loaded)

    def _retire(self, loaded: str) -> None:
        """Remove an injection that nobody asks any more."""
        with self._lock:
            if self.running[loaded] or loaded in self.serving.values():
                return
            del self.running[loaded]
        peftcore.injections(self.model)[loaded].remove()
        self._changed = True
