"""``python -m benchmarks.device``: steps and tokens of a decoder of any size on any device, eager, compiled by
torch.compile, and tokens as CUDA graphs too; a table and ``benchmarks/device.json``, which keeps what other devices and
sizes gave."""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks import memory, page
from benchmarks.__main__ import HERE, table
from benchmarks.contenders import PAIRS, Step, limit_step, training_step
from benchmarks.hosts import llama, tokens
from benchmarks.rows import Row
from benchmarks.serving import decoding
from benchmarks.steps import WANTED, beyond, heavier
from benchmarks.timing import Estimate, take_turns

SIZES: Mapping[str, tuple[int, int]] = {"small": (512, 4), "1B": (2048, 16), "3B": (3072, 28), "8B": (4096, 32)}
"""Width and layers."""
WAYS = ("eager", "compiled", "graph")
RUNS = HERE / "device.json"
COMMAND = "python -m benchmarks.device --page"


@dataclass(frozen=True)
class Bench:
    """The size, device and dtype of a benchmark."""

    size: str
    device: str
    dtype: torch.dtype
    rows: int
    length: int
    rounds: int

    def hosts(self, method: str, way: str) -> dict[str, nn.Module]:
        """Return the limit, ours and theirs on copies of one host."""
        width, layers = SIZES[self.size]
        with torch.device(self.device):
            base = llama(width, layers, self.dtype)
        pair = PAIRS[method]
        made: dict[str, Callable[..., nn.Module]] = {"ours": pair.ours_on, "theirs": pair.theirs_on}
        hosts = {"limit": base, **{who: adapt(copy.deepcopy(base)) for who, adapt in made.items()}}
        for who, host in hosts.items() if way == "compiled" else ():
            _compile(host, who)
        return hosts

    def step(self, method: str, way: str) -> Iterator[Row]:
        """Measure a training step: time beyond the limit, and memory."""
        ids, hosts = tokens(self.rows, self.length).to(self.device), self.hosts(method, way)
        steps = {who: (limit_step if who == "limit" else training_step)(host, ids) for who, host in hosts.items()}
        figure = f"step, {method}, {way}"
        yield self._timed(figure, steps, WANTED.get(method, 1.0))
        yield heavier(figure, {who: self._peak(step) for who, step in steps.items()})

    def token(self, method: str, way: str) -> Iterator[Row]:
        """Measure one token without gradients."""
        ids, hosts = tokens(1, 1).to(self.device), self.hosts(method, way)
        calls = {who: decoding(host, ids) for who, host in hosts.items()}
        if way == "graph":
            calls = {who: _captured(call) for who, call in calls.items()}
        yield self._timed(f"one token, {method}, {way}", calls, 0.6)

    def _timed(self, figure: str, calls: Mapping[str, Step], wanted: float) -> Row:
        times = take_turns({who: self._awaited(call) for who, call in calls.items()}, self.rounds, warmup=5)
        return beyond(f"{figure}: time beyond the limit", times, wanted)

    def _awaited(self, call: Step) -> Step:
        """Return the call with a wait for the end of what it has set going."""
        if self.device == "cpu":
            return call

        def whole() -> None:
            call()
            torch.accelerator.synchronize()

        return whole

    def _peak(self, call: Step) -> int:
        if not self.device.startswith("cuda"):
            return memory.peak(call)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def _compile(host: nn.Module, who: str) -> None:
    """Compile as `host.compile()` does, with a code object of its own: torch.compile keeps graphs by code, and the
    limit and ours would try each other's guards first."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return host._call_impl(*args, **kwargs)  # type: ignore[no-untyped-call]

    own = FunctionType(run.__code__.replace(co_name=who), run.__globals__, who, None, run.__closure__)
    host._compiled_call_impl = torch.compile(own, dynamic=False)


def _captured(call: Step) -> Step:
    """Return a call as one CUDA graph."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4, help="of a batch, of a training step")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", choices=PAIRS, default=["lora", "dora", "oft"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=None, help="all that the device can, when left out")
    parser.add_argument("--page", action="store_true", help="put the tables of all runs into docs/performance.md")
    given = parser.parse_args()
    ways = given.ways or WAYS[: 3 if given.device.startswith("cuda") else 2]
    bench = Bench(given.size, given.device, getattr(torch, given.dtype), given.rows, given.length, given.rounds)
    torch.set_num_threads(given.threads)
    memory.keep_memory()
    warnings.simplefilter("ignore")
    console, rows = Console(), []
    for method in given.methods:
        for way in ways:
            torch.compiler.reset()
            parts: list[Callable[[str, str], Iterator[Row]]] = (
                [bench.token] if way == "graph" else [bench.step, bench.token]
            )
            for part in parts:
                rows += (found := list(part(method, way)))
                console.print(table(found))
    console.print(table(rows))
    name = torch.cuda.get_device_name() if given.device.startswith("cuda") else given.device
    circumstances = {
        **{key: str(value) for key, value in asdict(bench).items()},
        "device": name,
        **{package: version(package) for package in ("torch", "transformers", "peft", "peftcore")},
    }
    runs = kept(circumstances, rows)
    RUNS.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    if given.page:
        page.write(COMMAND, *(page.figures(map(_row, run["figures"]), run["circumstances"]) for run in runs))


def kept(circumstances: Mapping[str, str], rows: list[Row], file: Path = RUNS) -> list[dict[str, Any]]:
    """Return all runs with this one, which takes the place of an earlier one of the same host on the same device."""
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    same = ("device", "size", "dtype")
    others = [run for run in earlier if any(run["circumstances"][key] != circumstances[key] for key in same)]
    return [*others, {"circumstances": dict(circumstances), "figures": [asdict(row) for row in rows]}]


def _row(figure: Mapping[str, Any]) -> Row:
    return Row(**{**figure, "ratio": Estimate(**figure["ratio"])})


if __name__ == "__main__":
    main()
