"""Real adapter files, and ways to break them.

A `Sample` is an adapter as it was saved, a `Case` one with something done to it, and `attempt` says what `load` makes
of it. Nothing here knows a format: files are texts of JSON, or safetensors with JSON in the header. So a new format
joins by one line in `SAMPLES`.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.testing import HOSTS, Host
from peftcore.testing import Case as KitCase
from peftcore.testing.kit import fill
from peftcore.testing.tools import Trace, differences, trace

SECONDS = 2.0
"""Of the processor, that one file may take."""
HUGE = 1e4
"""A file may hold larger finite numbers: it loads, and then nobody promises finite outputs."""

Files = dict[str, bytes]


class Words(nn.Module):
    """A table of tokens, two linear maps and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.first = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(torch.tanh(self.first(self.embed(x)))))
        return logits


def _words() -> tuple[nn.Module, dict[str, Any]]:
    return Words(), {"x": torch.randint(12, (2, 4))}


class Joined(nn.Module):
    """Modules with the names of diffusers' Flux, whose files have q, k and v in one."""

    def __init__(self) -> None:
        super().__init__()
        attn = nn.ModuleDict({name: nn.Linear(8, 4 if name == "to_k" else 8) for name in ("to_q", "to_k", "to_v")})
        block = nn.ModuleDict({"attn": attn, "norm1_context": nn.ModuleDict({"linear": nn.Linear(8, 8)})})
        self.transformer_blocks = nn.ModuleList([block])
        inner = {name: nn.ModuleDict({"linear_1": nn.Linear(8, 8)}) for name in ("text_embedder", "timestep_embedder")}
        self.time_text_embed = nn.ModuleDict(inner)
        self.norm_out = nn.ModuleDict({"linear": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        for embed in self.time_text_embed.children():
            x = embed.get_submodule("linear_1")(x)
        block = self.transformer_blocks[0]
        q, k, v = (block.get_submodule(f"attn.to_{name}")(x) for name in "qkv")
        mixed = torch.tanh(q + v + torch.cat([k, k], -1)) + block.get_submodule("norm1_context.linear")(x)
        result: Tensor = self.norm_out["linear"](mixed)
        return result


def _joined() -> tuple[nn.Module, dict[str, Any]]:
    return Joined(), {"x": torch.randn(2, 8)}


WORDS = {
    "words": Host("words", _words, lambda output: output, fallback=["first"]),
    "joined": Host("joined", _joined, lambda output: output, fallback=["to_q"]),
}


@dataclass(frozen=True)
class Sample:
    """A method on a host, in a format.

    Attributes:
        wishes: arguments of `apply`: options, target, train.
    """

    method: str
    host: str = "mlp"
    format: str = "peftcore"
    wishes: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return f"{self.method}-{self.host}-{self.format}"

    @functools.cached_property
    def case(self) -> KitCase:
        return KitCase(peftcore.method(self.method), {**HOSTS, **WORDS}[self.host], dict(self.wishes))

    @functools.cached_property
    def files(self) -> Files:
        """The adapter, filled with noise and saved."""
        model, _ = self.case.fresh()
        injection = self.case.apply(model, seed=1)
        fill(injection)
        with TemporaryDirectory() as folder:
            injection.save(folder, format=self.format)
            return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _two(**more: Any) -> dict[str, Any]:
    return {"rank": 2, **more}


SAMPLES = [
    Sample("lora", wishes=_two(train=["head"], overrides={"first": {"rank": 3}})),
    Sample("lora", "encoder", wishes=_two()),
    Sample("lora", "words", wishes=_two(target=["embed", "first"], dtype="bfloat16")),
    Sample("dora", wishes=_two()),
    Sample("adalora", wishes=_two()),
    Sample("lokr", wishes=_two()),
    Sample("vera", wishes=_two()),
    Sample("boft", wishes={"block_size": 4}),
    Sample("fourierft", wishes={"n_frequency": 9}),
    Sample("pissa", wishes=_two(iterations=2)),
    Sample("ia3", "encoder"),
    Sample("compacter", wishes={"bottleneck": 4}),
    Sample("houlsby_adapter", "encoder", wishes={"bottleneck": 4}),
    Sample("ciat", "encoder", wishes={"reduction": 4}),
    Sample("adamix", "encoder", wishes={"bottleneck": 4}),
    Sample("propetl", "encoder", wishes={"bottleneck": 4}),
    Sample("loreft", "encoder", wishes=_two()),
    Sample("k_adapter", "encoder", wishes={"width": 4, "heads": 2, "depth": 1}),
    Sample("tiny_attention_adapter", "encoder", wishes={"width": 4, "heads": 2}),
    Sample("ssf"),
    Sample("bitfit"),
    Sample("shira", wishes={"rank": 1, "target": ["first", "second"]}),
    Sample("fish_mask", wishes={"share": 0.05}),
    Sample("sparse_adapter", wishes={"bottleneck": 4}),
    Sample("child_tuning_d"),
    Sample("trainable_tokens", "words", wishes={"token_indices": [3, 5]}),
    Sample("loftq", wishes=_two()),
    Sample("peqa"),
    Sample("hydralora", wishes=_two(heads=2)),
    Sample("loramoe", wishes=_two(experts=2)),
    Sample("moelora", wishes=_two(experts=2, tasks=2, task=1)),
    Sample("mola", wishes=_two(experts=3)),
    Sample("mole", wishes={"parts": [{"method": "lora", "rank": 2}] * 2}),
    Sample("molora_moe", wishes=_two(experts=2)),
    Sample("mov", wishes={"experts": 2}),
    Sample("pal", "encoder", wishes={"tasks": 2, "task": 1, "width": 4, "heads": 2}),
    Sample("task_arithmetic", wishes={"parts": [{"method": "lora", "rank": 2}, {"method": "loha", "rank": 1}]}),
    Sample("adapter_fusion"),
    Sample("config_union", wishes={"parts": [{"method": "lora", "rank": 2, "target": ["first"]}, {"method": "ssf"}]}),
    Sample("svdiff"),
    Sample("loha", wishes=_two()),
    Sample("randlora", wishes=_two()),
    Sample("oft", wishes={"block_size": 4}),
    Sample("hra", wishes=_two()),
    Sample("hira", wishes=_two()),
    Sample("miss", wishes=_two()),
    Sample("uni_lora", wishes=_two(theta_length=9, store_indices=True)),
    Sample("lily", wishes=_two(experts=3)),
    Sample("tinylora", wishes=_two(u=3, store_basis=True)),
    Sample("pvera", wishes=_two()),
    Sample("peanut", wishes=_two(depth=1)),
    Sample("adamss", wishes=_two(components=4, subspaces=2)),
    Sample("frod", wishes={"sparsity": 0.1}),
    Sample("osf", wishes={"effective_rank": 2}),
    Sample("vb_lora", wishes=_two(num_vectors=5, vector_length=4)),
    Sample("delora", wishes=_two()),
    Sample("bd_lora", wishes=_two(blocks=1)),
    Sample("monteclora", wishes=_two(samples=2)),
    Sample("gralora", wishes={"rank": 2, "blocks": 1, "hybrid_rank": 1}),
    Sample("c3a", wishes={"block_size": 4}),
    Sample("waveft", wishes={"n_frequency": 9}),
    Sample("road", wishes={"variant": 2, "exclude": "head"}),
    Sample("psoft", wishes=_two(iterations=2)),
    Sample("deft", wishes=_two()),
    Sample("velora", wishes=_two(num_groups=4)),
    Sample("lora_ga", wishes=_two()),
    Sample("lora_one", wishes=_two()),
    Sample("corda", wishes=_two()),
    Sample("kasa", wishes=_two()),
    Sample("mica", wishes=_two()),
    Sample("eva", wishes=_two()),
    Sample("lora_xs", wishes=_two(iterations=2)),
    Sample("glora", wishes=_two()),
    Sample("polytropon", wishes=_two(tasks=2, skills=2, task=1)),
    Sample("bi_adaptformer", wishes={"bottleneck": 3}),
    Sample("qa_lora", wishes=_two(group_size=2, scheme_options={"group_size": 2})),
    Sample("lqer", wishes=_two()),
    Sample("lst", "encoder", wishes={"reduction": 2}),
    Sample("lora", format="peft", wishes=_two(train=["head"], overrides={"first": {"rank": 3}})),
    Sample("lora", "encoder", "peft", wishes=_two(scaling="sqrt_rank", target=["linear1", "self_attn", "out_proj"])),
    Sample("lora", "words", "peft", wishes=_two(target=["embed", "first"])),
    Sample("dora", format="peft", wishes=_two()),
    Sample("trainable_tokens", "words", "peft", wishes={"token_indices": [3, 5]}),
    Sample("lora", "joined", "kohya", wishes=_two(target=["to_q", "to_k", "to_v", "linear"])),
    Sample("dora", "joined", "kohya/diffusion_model", wishes=_two(target=["to_q", "to_k", "to_v"])),
]


# What is done to files


NUMBERS: list[Any] = [0, -1, 1, 2, 3, 7, 10**3, 10**5, 10**9, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30]
NUMBERS += [-(10**9), 0.0, -0.5, 0.3, 1e-320, 1e30, 3e38, 1e308, -1e308]
TEXTS = [
    "", "a", "*", "**", "[", "..", "../../etc/passwd", "/etc/passwd", "first", "head", "norm.weight", "a\0b", "\ud800",
    "os:system", "antigravity", "json.tool:main", "__class__.__init__", "file:///etc/passwd", "http://127.0.0.1:9/x",
    "re:(a|a)*b", "(a|a)*b", "(.*)*x", "(?:(?:a{1,999}){1,999}){1,999}", "(?R)?" * 200, "re:.*", "all-linear", "none",
    "lora", "dora", "ssf", "LORA", "float16", "float64", "nan", "a." * 3000, "x" * 20_000, "ё" * 300,
]  # fmt: skip
OTHERS: list[Any] = [None, True, False, [], {}, [[]], {"a": {"b": []}}, {"": 0}, [None], [[[[1]]]]]


def _value(rng: random.Random) -> Any:
    kind = rng.randrange(20)
    if kind < 8:
        return rng.choice(NUMBERS)
    if kind < 14:
        return rng.choice(TEXTS)
    if kind < 18:
        return copy.deepcopy(rng.choice(OTHERS))
    if kind == 18:
        return [rng.choice((*NUMBERS, *TEXTS)) for _ in range(rng.choice((2, 5, 300)))]
    value: Any = 0
    for _ in range(rng.choice((5, 99))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inside in entries:
        yield (*path, key)
        yield from _places(inside, (*path, key))


def break_json(document: Any, rng: random.Random) -> Any:
    """Change one to three places of a JSON object."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        document = json.loads(json.dumps(document))  # nothing in it stands there twice
        places = list(_places(document))
        if not places:
            break
        *above, key = rng.choice(places)
        holder = functools.reduce(lambda value, step: value[step], above, document)
        way = rng.randrange(10)
        if way < 6:
            holder[key] = _value(rng)
        elif way == 6:
            del holder[key]
        elif way == 7 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        elif isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = _value(rng)
        else:
            holder += [copy.deepcopy(holder[0]) if rng.random() < 0.5 else _value(rng)] * rng.choice((1, 3, 300))
    return document


def dumped(document: Any, rng: random.Random) -> bytes:
    """A JSON object as text, now and then with a key twice or with what JSON has not."""
    text = json.dumps(document)
    way = rng.randrange(40)
    if way == 0 and text.startswith('{"'):
        text = text[:-1] + ", " + text[1:]
    elif way == 1:
        text = text.replace(": ", rng.choice([": NaN, ", ": Infinity, ", ": 1e999, ", ": -"]), 1)
    elif way == 2:
        text = text.replace(": ", ": " + "9" * 5000 + ", ", 1)
    return text.encode(errors="surrogatepass")


def parsed(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and values of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def assembled(header: bytes, values: bytes) -> bytes:
    """A safetensors file."""
    return len(header).to_bytes(8, "little") + header + values


def break_header(data: bytes, rng: random.Random) -> bytes:
    """Change what a safetensors file says of its tensors."""
    header, values = parsed(data)
    keys = [key for key in header if key != "__metadata__"]
    if not keys:
        return data
    key, other = rng.choice(keys), rng.choice(keys)
    way = rng.randrange(10)
    if way == 0:
        header[key]["dtype"] = rng.choice(["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "X", 3])
    elif way == 1:
        shape = header[key]["shape"]
        header[key]["shape"] = rng.choice([[], [0], [2**40, 2**40], [-1], [1, *shape], [2**63], [0, 2**63], "a", [1.5]])
    elif way == 2:
        header[key]["data_offsets"] = list(header[other]["data_offsets"])
    elif way == 3:
        header[key]["data_offsets"] = rng.choice([[0, 0], [4, 0], [0, 2**62], [0], [-4, 0], [0, len(values) + 4], None])
    elif way == 4:
        header[rng.choice([*TEXTS, key.upper(), f"../{key}", f"{key}.{key}", f"shared:{key}"])] = header.pop(key)
    elif way == 5:
        del header[key]
    elif way == 6:
        text = json.dumps(header)
        return assembled((text[:-1] + "," + json.dumps({key: header[key]})[1:]).encode(), values)
    elif way == 7:
        header[key] = header[other]
    elif way == 8:
        header["__metadata__"] = rng.choice([{}, {"a": 1}, [], "a", {"peftcore": "{}"}, {"peftcore": "[1"}, None])
    else:
        header = break_json(header, rng)
    return assembled(dumped(header, rng), values)


def break_envelope(data: bytes, rng: random.Random) -> bytes:
    """Change a JSON text that stands in the header."""
    header, values = parsed(data)
    for key, text in header.get("__metadata__", {}).items():
        if text.startswith("{"):
            header["__metadata__"][key] = dumped(break_json(json.loads(text), rng), rng).decode(errors="replace")
    return assembled(json.dumps(header).encode(), values)


def break_values(data: bytes, rng: random.Random) -> bytes:
    """Change values of one tensor: NaN, infinities, huge numbers, places out of range."""
    header, values = parsed(data)
    entries = [each for key, each in header.items() if key != "__metadata__" and each["data_offsets"][1]]
    if not entries:
        return data
    entry = rng.choice(entries)
    start, stop = entry["data_offsets"]
    size = max(1, (stop - start) // max(1, torch.Size(entry["shape"]).numel()))
    patterns = {
        1: [b"\2", b"\xff", b"\0"],
        2: [b"\xc0\x7f", b"\x80\x7f", b"\x7f\x7f", b"\0\0", b"\xff\xff"],
        4: [b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\0\1\0\0"],
        8: [b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0"],
    }
    pattern = rng.choice(patterns.get(size, [b"\xff"]))
    at = start if rng.random() < 0.3 else start + rng.randrange(0, stop - start, size)
    until = stop if rng.random() < 0.3 else at + size
    changed = values[:at] + (pattern * ((until - at) // len(pattern) + 1))[: until - at] + values[until:]
    return assembled(json.dumps(header).encode(), changed)


def break_tensors(data: bytes, rng: random.Random) -> bytes:
    """Write the file anew, whole, with one tensor of another shape or dtype, or one more."""
    header, values = parsed(data)
    metadata = header.pop("__metadata__", None)
    tensors = {
        key: (each["dtype"], each["shape"], values[slice(*each["data_offsets"])]) for key, each in header.items()
    }
    if tensors:
        key = rng.choice(list(tensors))
        dtype, shape, own = tensors[key]
        way = rng.randrange(6)
        if way == 0:
            tensors[key] = (dtype, shape[::-1], own)
        elif way == 1:
            tensors[key] = (dtype, [*shape, 2], own * 2)
        elif way == 2:
            tensors[key] = (dtype, [0, *shape[1:]], b"")
        elif way == 3:
            tensors[f"{rng.choice(TEXTS)}{key}"] = tensors[key]
        elif way == 4 and len(own) % 8 == 0:
            tensors[key] = (rng.choice(["I64", "F64"]), [len(own) // 8], own)
        else:
            tensors[key] = ("U8", [len(own)], own)
    out, blob = {} if metadata is None else {"__metadata__": metadata}, b""
    for key, (dtype, shape, own) in tensors.items():
        out[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(blob), len(blob) + len(own)]}
        blob += own
    return assembled(json.dumps(out).encode(), blob)


def break_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut, flip, overwrite, repeat or leave out bytes."""
    if not data:
        return b"\0"
    at, way = rng.randrange(len(data)), rng.randrange(8)
    size = rng.choice((1, 2, 8, 64))
    if way == 0:
        return data[:at]
    if way in (1, 2, 3):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if way == 4:
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if way == 5:
        return data[:at] + data[at : at + size] * rng.choice((2, 50)) + data[at + size :]
    if way == 6:
        return data[:at] + data[at + size :]
    length = rng.choice([0, 1, 7, len(data), 2**20, 2**31, 2**40, 2**63, 2**64 - 1])
    return length.to_bytes(8, "little") + data[8:]


def broken(sample: Sample, rng: random.Random) -> Files:
    """One case of a sample."""
    files = dict(sample.files)
    read = [name for name in files if name.endswith((".json", ".safetensors"))]
    name = rng.choice(read)
    if name.endswith(".json"):
        if rng.random() < 0.2:
            files[name] = break_bytes(files[name], rng)
        else:
            files[name] = dumped(break_json(json.loads(files[name]), rng), rng)
        if sample.format != "peftcore" or rng.random() < 0.1:  # of ours it is for people alone
            return files
        files = dict(sample.files)
        name = next(each for each in read if each.endswith(".safetensors"))
    ways = [break_envelope] * 6 + [break_header] * 4 + [break_values] * 3 + [break_tensors] * 2 + [break_bytes] * 4
    files[name] = rng.choice(ways)(files[name], rng)
    if rng.random() < 0.02:
        other = rng.choice(SAMPLES).files
        files[name] = next(data for each, data in other.items() if each.endswith(".safetensors"))
    if rng.random() < 0.02:
        del files[rng.choice(list(files))]
    return files


# What is made of them


class Hung(BaseException):
    """A file took far too long."""


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `Hung` in what does not end."""

    def ring(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def uncollected() -> Iterator[None]:
    """Garbage waits: looking through a process that has run for long can take seconds, in whoever's call it happens."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@dataclass
class Bench:
    """A host on which files are tried, one after the other."""

    case: KitCase
    model: nn.Module = field(init=False)
    inputs: dict[str, Any] = field(init=False)
    before: Trace = field(init=False)

    def __post_init__(self) -> None:
        self.model, self.inputs = self.case.fresh()
        self.before = trace(self.model)

    @uncollected()
    def attempt(self, path: Path, **options: Any) -> str:
        """Load what is at a path: "loaded", or the name of the error's class.

        Raises:
            AssertionError: it did neither, or took too long, or left traces.
        """
        outcome, took = self._attempt(path, options)
        if took >= SECONDS:  # what a process does once, such as importing, is not the file's
            outcome, took = self._attempt(path, options)
        assert took < SECONDS, f"it took {took:.1f} seconds"
        assert torch.is_grad_enabled(), "gradients are off from now on"
        wrong = differences(self.before, trace(self.model))
        assert not wrong, f"the host was changed: {wrong}"
        return outcome

    def _attempt(self, path: Path, options: dict[str, Any]) -> tuple[str, float]:
        """What came of it, and seconds of the processor."""
        start = time.process_time()
        try:
            with limited(60), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                injection = peftcore.load(self.model, path, **options)
        except PeftcoreError as error:
            outcome = type(error).__name__
            assert str(path) in str(error), f"the error does not name the file: {error}"
            assert len(str(error)) < 5000, f"a message of {len(str(error)):,} characters"
        except Hung:
            raise AssertionError("it does not end") from None
        else:
            outcome = "loaded"
            try:
                self._use(injection)
            finally:
                injection.remove()
        return outcome, time.process_time() - start

    def _use(self, injection: peftcore.Injection) -> None:
        """Outputs are finite; where calls want to be told something, or an option does not suit the inputs, a typed
        error will do. What numbers near the end of float32 come to is nobody's promise."""
        try:
            finite = bool(self.case.quiet(self.model, self.inputs).isfinite().all())
        except PeftcoreError:
            return
        except RuntimeError:
            if _tame(injection):
                raise
            return
        assert finite or not _tame(injection), "outputs are not finite"


def _tame(injection: peftcore.Injection) -> bool:
    """Whether all numbers of an adapter are of ordinary size."""
    left: list[Any] = [injection.config.model_dump()]
    while left:
        each = left.pop()
        if isinstance(each, dict | list | tuple):
            left += each.values() if isinstance(each, dict) else each
        elif isinstance(each, int | float) and abs(each) > HUGE:
            return False
    tensors = injection.state_dict().values()
    return all(not value.numel() or float(value.abs().max()) < HUGE for value in tensors if value.is_floating_point())


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Put files into an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)


@functools.cache
def bench_of(sample: Sample) -> Bench:
    """The host of a sample; the same for all cases of it."""
    return Bench(sample.case)


def fuzz(indices: range, folder: Path, seed: int, progress: Callable[[int, dict[str, int]], None]) -> dict[str, int]:
    """Try cases by number; how often each outcome came.

    Raises:
        AssertionError: naming each case that failed (ten at most), which comes again with the same seed and number.
    """
    outcomes: dict[str, int] = {}
    failures = []
    target = folder / "adapter"
    for count, index in enumerate(indices, 1):
        rng = random.Random(f"{seed}:{index}")
        sample = SAMPLES[index % len(SAMPLES)]
        files = broken(sample, rng)
        write(files, target)
        try:
            outcome = bench_of(sample).attempt(target)
        except Exception as error:
            outcome = "failed"
            failures.append(f"{sample.name}, case {index} of seed {seed}: {type(error).__name__}: {str(error)[:600]}")
            bench_of.cache_clear()
            if os.environ.get("PEFTCORE_FUZZ_KEEP"):
                write(files, Path(os.environ["PEFTCORE_FUZZ_KEEP"]) / str(index))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        progress(count, outcomes)
        if len(failures) >= 10:
            break
    assert not failures, "\n".join(failures)
    return outcomes
