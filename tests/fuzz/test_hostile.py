"""Files that are damaged, or made to do harm: each loads, or gives one error that says which file; nothing else."""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_files
import pytest
import torch
from hostile_files import SAMPLES, Sample, assembled, bench_of, broken, fuzz, parsed, uncollected, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slowly import quick

import peftcore
from peftcore.errors import CheckpointError, HostMismatch, NewerFormat, PeftcoreError, UnknownMethod
from peftcore.files.save_load import describe
from peftcore.testing import HOSTS
from peftcore.testing.tools import differences, trace

CASES = int(os.environ.get("PEFTCORE_FUZZ", "10000"))
"""How many cases are tried; ``make fuzz`` sets more."""
SEED = int(os.environ.get("PEFTCORE_FUZZ_SEED", "0"))
PARTS = 8
QUICK = range(1)
"""Parts of the cases that a quick run tries; `make test-slow` has the others."""
OURS = "adapter.safetensors"
THEIRS = "adapter_model.safetensors"
NAMED = {each.name: each for each in SAMPLES}
NATIVE, PEFT = NAMED["lora-mlp-peftcore"], NAMED["lora-mlp-peft"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a file made something connect")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


def _progress(part: int) -> Callable[[int, dict[str, int]], None]:
    start, shown = time.monotonic(), [0.0]

    def show(count: int, outcomes: dict[str, int]) -> None:
        if CASES > 10_000 and time.monotonic() - shown[0] > 10:
            shown[0] = time.monotonic()
            rate = count / (time.monotonic() - start)
            line = f"part {part + 1} of {PARTS}: {count:,} of {CASES // PARTS:,} cases, {rate:.0f} a second, {outcomes}"
            print(line, file=sys.__stderr__, flush=True)

    return show


@pytest.mark.parametrize("part", quick(range(PARTS), QUICK))
def test_whatever_is_in_a_file_it_loads_or_gives_one_typed_error(part: int, tmp_path: Path) -> None:
    before = set(sys.modules)
    outcomes = fuzz(range(part, CASES, PARTS), tmp_path, SEED, _progress(part))
    assert not NAMES & (set(sys.modules) - before), "a file made something be imported"
    refused = sum(outcomes.values()) - outcomes["loaded"]
    assert refused > 0.3 * CASES / PARTS and outcomes["loaded"] > 0.02 * CASES / PARTS, outcomes


@uncollected()
def test_whatever_is_in_a_file_it_describes_itself_or_gives_one_typed_error(tmp_path: Path) -> None:
    """Without a host, and without a look at any value but alpha's."""
    outcomes = {"described": 0, "refused": 0}
    for index in range(len(SAMPLES) * 4):
        sample, rng = SAMPLES[index % len(SAMPLES)], random.Random(f"{SEED}:{index}")
        write(sample.files if index < len(SAMPLES) else broken(sample, rng), tmp_path / "adapter")
        start = time.process_time()
        try:
            about = describe(tmp_path / "adapter")
            assert about.bytes >= 0 and (index >= len(SAMPLES) or (about.values and not about.problem)), sample.name
            outcomes["described"] += 1
        except PeftcoreError as error:
            assert index >= len(SAMPLES) and str(tmp_path) in str(error), f"{sample.name}: {error}"
            outcomes["refused"] += 1
        assert time.process_time() - start < 2, sample.name
    assert min(outcomes.values()) > len(SAMPLES), outcomes


def test_every_sample_loads_as_it_was_saved(tmp_path: Path) -> None:
    for sample in SAMPLES:
        write(sample.files, tmp_path / "adapter")
        assert bench_of(sample).attempt(tmp_path / "adapter") == "loaded", sample.name


def refusal(sample: Sample, path: Path, **options: Any) -> PeftcoreError:
    """The error that loading gives; it names the file, and the host is as before."""
    bench = bench_of(sample)
    assert bench.attempt(path, **options) != "loaded"
    with pytest.raises(PeftcoreError) as caught:
        peftcore.load(bench.model, path, **options)
    return caught.value


def envelope_of(sample: Sample) -> dict[str, Any]:
    """What a native sample says of itself, all of it."""
    found: dict[str, Any] = json.loads(sample.files["adapter.json"])
    return found


def with_envelope(sample: Sample, envelope: Any) -> dict[str, bytes]:
    """The files of a native sample that say something else of it."""
    header, values = parsed(sample.files[OURS])
    header["__metadata__"] = {"peftcore": envelope if isinstance(envelope, str) else json.dumps(envelope)}
    return {**sample.files, OURS: assembled(json.dumps(header).encode(), values)}


def with_options(sample: Sample, **options: Any) -> dict[str, bytes]:
    """The files of a peft sample with other options."""
    name = "adapter_config.json"
    return {**sample.files, name: json.dumps({**json.loads(sample.files[name]), **options}).encode()}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**25), 10**25) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_json_in_any_field(tmp_path: Path, data: st.DataObject) -> None:
    sample = data.draw(st.sampled_from([NATIVE, PEFT, NAMED["config_union-mlp-peftcore"], NAMED["dora-mlp-peft"]]))
    native = sample.format == "peftcore"
    document = envelope_of(sample) if native else json.loads(sample.files["adapter_config.json"])
    holder = data.draw(st.sampled_from([document, *(each for each in document.values() if isinstance(each, dict))]))
    key = data.draw(st.sampled_from(sorted(holder)) if holder else st.text())
    holder[key] = data.draw(JSON)
    write(with_envelope(sample, document) if native else with_options(sample, **document), tmp_path / "adapter")
    bench_of(sample).attempt(tmp_path / "adapter")


# Files that are no files


def _link(to: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(to)


STRANGE: dict[str, Callable[[Path], None]] = {
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": lambda path: os.mkfifo(path),
    "link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe"))[1],
    "folder": lambda path: path.mkdir(),
    "link to a folder": _link("."),
    "link to zeros without an end": _link("/dev/zero"),
    "link to nothing": _link("nothing"),
    "empty": lambda path: path.touch(),
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(os.path.relpath(path)),
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("sample", [NATIVE, PEFT], ids=lambda sample: sample.format)
def test_what_is_no_regular_file_is_refused(sample: Sample, kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [OURS] if sample is NATIVE else [THEIRS, "adapter_config.json"]:
        write(sample.files, tmp_path / "adapter")
        (tmp_path / "adapter" / name).unlink()
        STRANGE[kind](tmp_path / "adapter" / name)
        error = refusal(sample, tmp_path / "adapter")
        assert isinstance(error, CheckpointError)
    STRANGE[kind](tmp_path / "other.safetensors")
    assert isinstance(refusal(sample, tmp_path / "other.safetensors"), CheckpointError)


def test_links_to_real_files_are_followed(tmp_path: Path) -> None:
    for sample in (NATIVE, PEFT):
        write(sample.files, tmp_path / "blobs")
        write({}, tmp_path / "adapter")
        for name in sample.files:
            (tmp_path / "adapter" / name).symlink_to(tmp_path / "blobs" / name)
        assert bench_of(sample).attempt(tmp_path / "adapter") == "loaded"


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff" * 100, b"{" * 10**6, b'{"method": "dora"}'])
def test_what_is_there_for_people_alone_is_not_read(text: bytes, tmp_path: Path) -> None:
    write({**NATIVE.files, "adapter.json": text, "README.md": text}, tmp_path / "adapter")
    assert bench_of(NATIVE).attempt(tmp_path / "adapter") == "loaded"
    (tmp_path / "adapter" / "adapter.json").unlink()
    assert bench_of(NATIVE).attempt(tmp_path / "adapter") == "loaded"


# Pickles


class _Harm:
    def __reduce__(self) -> Any:
        return open, ("harm", "w")


@pytest.mark.parametrize(
    "name",
    ["adapter_model.bin", "pytorch_model.bin", "adapter.pt", "lora.pth", "last.ckpt", "adapter_model.safetensors"],
)
def test_pickles_are_refused_and_say_how_to_convert(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    folder, data = tmp_path / "adapter", pickle.dumps({"base_model.model.first.lora_A.weight": _Harm()})
    beside = {"adapter_config.json": PEFT.files["adapter_config.json"]} if name.startswith("adapter_model") else {}
    write({**beside, name: data}, folder)
    errors = [refusal(PEFT, folder), refusal(PEFT, folder / name)]
    if not name.endswith(".safetensors"):
        for error in errors:
            assert isinstance(error, CheckpointError)
            assert (
                "a pickle" in str(error) and name in str(error) and "torch.load(file, weights_only=True)" in str(error)
            )
    assert not (tmp_path / "harm").exists()


def test_the_sentence_on_pickles_is_true(tmp_path: Path) -> None:
    from safetensors.torch import load, save_file

    write({"adapter_config.json": PEFT.files["adapter_config.json"]}, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.bin"
    torch.save(load(PEFT.files[THEIRS]), file)
    said = str(refusal(PEFT, tmp_path / "adapter"))
    assert 'save_file(torch.load(file, weights_only=True), "adapter_model.safetensors")' in said
    save_file(torch.load(file, weights_only=True), tmp_path / "adapter" / "adapter_model.safetensors")
    assert bench_of(PEFT).attempt(tmp_path / "adapter") == "loaded"


# Names


NAMES = {"antigravity", "this", "json.tool", "xmlrpc.server", "idlelib.run", "turtledemo.clock"}


def test_nothing_that_a_file_names_is_imported(tmp_path: Path) -> None:
    before = set(sys.modules)
    for name in sorted(NAMES):
        for place in (name, f"{name}:main", f"{name}.main", f"{name}/main"):
            for key in ("method", "plugin", "host", "dtype", "plugin_version", "target", "weights", "base"):
                write(with_envelope(NATIVE, {**envelope_of(NATIVE), key: place}), tmp_path / "adapter")
                bench_of(NATIVE).attempt(tmp_path / "adapter")
            for key in ("peft_type", "auto_mapping", "base_model_name_or_path", "init_lora_weights", "target_modules"):
                value = {"base_model_class": "main", "parent_library": name} if key == "auto_mapping" else place
                write(with_options(PEFT, **{key: value}), tmp_path / "adapter")
                bench_of(PEFT).attempt(tmp_path / "adapter")
    assert not NAMES & (set(sys.modules) - before)


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    folder, envelope = tmp_path / "adapter", envelope_of(NATIVE)

    def said(kind: type[PeftcoreError], files: dict[str, bytes], sample: Sample = NATIVE) -> str:
        write(files, folder)
        error = refusal(sample, folder)
        assert isinstance(error, kind), repr(error)
        assert (OURS if sample.format == "peftcore" else "adapter_") in str(error)
        return str(error)

    assert "nothing" in said(UnknownMethod, with_envelope(NATIVE, {**envelope, "method": "nothing"}))
    assert "'rank'" in said(CheckpointError, with_envelope(NATIVE, {**envelope, "config": {"ranks": 3}}))
    assert "format 99" in said(NewerFormat, with_envelope(NATIVE, {**envelope, "format": 99}))
    assert "float8" in said(CheckpointError, with_envelope(NATIVE, {**envelope, "dtype": "float8"}))
    assert "'nowhere'" in said(HostMismatch, with_envelope(NATIVE, {**envelope, "train": ["nowhere"]}))
    assert "twice" in said(CheckpointError, with_envelope(NATIVE, {**envelope, "train": ["head", "head"]}))
    assert "'config'" in said(CheckpointError, with_envelope(NATIVE, json.dumps(envelope)[:-1] + ', "config": {}}'))
    moved = {key: [{**site, "module_path": f"x.{site['module_path']}"} for site in sites]
             for key, sites in envelope["selections"].items()}  # fmt: skip
    moved[""][0]["module_path"] = "y.z"
    assert "y.z" in said(HostMismatch, with_envelope(NATIVE, {**envelope, "selections": moved}))
    assert "unheard_of" in said(CheckpointError, with_options(PEFT, unheard_of=3), PEFT)
    assert "UNHEARD" in said(CheckpointError, with_options(PEFT, peft_type="UNHEARD"), PEFT)
    for sample, name in ((NATIVE, OURS), (PEFT, THEIRS)):
        header, values = parsed(sample.files[name])
        key = next(key for key in header if key != "__metadata__")
        start, _ = header[key]["data_offsets"]
        infinite = values[:start] + b"\0\0\x80\x7f" + values[start + 4 :]
        assert key in said(
            CheckpointError, {**sample.files, name: assembled(json.dumps(header).encode(), infinite)}, sample
        )
        text = json.dumps(header)
        twice = text[:-1] + f", {json.dumps(key)}: {json.dumps(header[key])}}}"
        assert key in said(CheckpointError, {**sample.files, name: assembled(twice.encode(), values)}, sample)


@pytest.mark.parametrize(
    ("name", "tensor", "pattern"),
    [
        ("shira-mlp-peftcore", "first.index", b"\xff\xff\xff\x7f"),
        ("shira-mlp-peftcore", "second.index", b"\xff\xff\xff\xff"),
        ("shira-mlp-peftcore", "second.index", b"\0\0\0\0"),
        ("fish_mask-mlp-peftcore", "shared:mask.index", b"\xff" * 7 + b"\x7f"),
        ("fish_mask-mlp-peftcore", "shared:mask.index", b"\xff" * 8),
        ("fish_mask-mlp-peftcore", "shared:mask.index", b"\1" + b"\0" * 7),
        ("sparse_adapter-mlp-peftcore", "shared:kept.index", b"\xff\xff\xff\x7f"),
        ("sparse_adapter-mlp-peftcore", "shared:kept.index", b"\xff\xff\xff\xff"),
        ("peqa-mlp-peftcore", "first.s0", b"\0\0\0\0"),
        ("loreft-encoder-peftcore", "R", b"\0\0\0\0"),
    ],
)
def test_values_that_only_the_method_understands(name: str, tensor: str, pattern: bytes, tmp_path: Path) -> None:
    header, values = parsed(NAMED[name].files[OURS])
    key = next(each for each in header if each.endswith(tensor))
    start, stop = header[key]["data_offsets"]
    values = values[:start] + pattern * ((stop - start) // len(pattern)) + values[stop:]
    write({**NAMED[name].files, OURS: assembled(json.dumps(header).encode(), values)}, tmp_path / "adapter")
    assert tensor in str(refusal(NAMED[name], tmp_path / "adapter"))


# Other hosts, other formats


@pytest.mark.parametrize("host", [name for name in HOSTS if name not in ("unet", "dit", "t5", "moe", "mistral")])
def test_the_adapter_of_another_host(host: str, tmp_path: Path) -> None:
    for sample in (NATIVE, NAMED["lora-encoder-peftcore"], PEFT, NAMED["lora-encoder-peft"]):
        if sample.host != host:
            write(sample.files, tmp_path / "adapter")
            model, _ = HOSTS[host].build()
            with pytest.raises(CheckpointError) as caught:
                peftcore.load(model, tmp_path / "adapter")
            assert str(tmp_path) in str(caught.value)
            assert not peftcore.injections(model)


DEEP = """
import json, sys
from peftcore.errors import CheckpointError
from peftcore.files.safe_io import parse_json
sys.setrecursionlimit({limit})
many = 300_000
for text in ("[" * many, '{{"a":' * many, '{{"a": "\\\\\\"]]", "b":[' * many):
    for each in (text, text.encode(), text.encode("utf-16")):
        try:
            parse_json(each, "a file")
        except CheckpointError as error:
            assert str(error).startswith("a file cannot be read"), error
        else:
            raise SystemExit("it was read")
whole = {{"a": "[" * 1000, 'b"': ["\\\\", "\\"[[", [[{{}}]]]}}
assert parse_json(json.dumps(whole), "a file") == whole
"""


@pytest.mark.parametrize("limit", quick([1_000, 10**6], [1_000]))
def test_nesting_ends_neither_the_stack_nor_the_process(limit: int) -> None:
    """In a process of its own, which it would take with it."""
    done = subprocess.run([sys.executable, "-c", DEEP.format(limit=limit)], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])


# Patterns, numbers and lists that would take long


EVIL = ["(a|a)*b", "(.*)*x", "(?:.|e)*(?:.|r)*(?:.|[a-z])*!", "(?:(?:(?:.{1,999}){1,999}){1,999})!", "(?R)?" * 1000]
EVIL += ["(" * 5000, "(?:" * 300 + "a" + ")*" * 300, "(?:" * 4000 + "a" + ")*" * 4000]
EVIL += ["[" * 99_999, "a" * 200_000 + "?", ".*" * 40 + "!"]


@pytest.fixture(params=[1_000, 100_000], ids="depth {}".format)
def depth(request: pytest.FixtureRequest) -> Iterator[None]:
    """How deep calls may nest. Libraries raise it, and what is deep is then read instead of refused."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(request.param)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.share(3)
@pytest.mark.usefixtures("depth")
@pytest.mark.parametrize("pattern", EVIL, ids=range(len(EVIL)))
def test_no_pattern_takes_long(pattern: str, tmp_path: Path) -> None:
    folder, envelope = tmp_path / "adapter", envelope_of(NATIVE)
    for changes in (
        {"target": f"re:{pattern}"},
        {"target": f"re:{pattern}", "selections": {}},
        {"exclude": f"re:{pattern}", "target": None, "selections": {}},
        {"train": [f"re:{pattern}"]},
        {"train": [f"*{pattern}*"]},
        {"config": {**envelope["config"], "overrides": {f"*{pattern}*": {"rank": 2}, pattern: {"rank": 3}}}},
    ):
        write(with_envelope(NATIVE, {**envelope, **changes}), folder)
        bench_of(NATIVE).attempt(folder)
    for options in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"rank_pattern": {pattern: 3}},
        {"alpha_pattern": {f"{pattern}{number}": 3 for number in range(300)}},
        {"layers_pattern": [pattern], "layers_to_transform": [0]},
        {"modules_to_save": [pattern]},
    ):
        write(with_options(PEFT, **options), folder)
        bench_of(PEFT).attempt(folder)


@pytest.mark.slow
def test_no_option_of_any_method_takes_long_or_much_memory(tmp_path: Path) -> None:
    script = Path(hostile_files.__file__).with_name("hostile_options.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]


# Compositions


def _compositions(kind: Any = "Stack", parts: Any = ("a", "b"), **options: Any) -> Any:
    return {"kind": kind, "parts": list(parts), **options}


COMPOSITIONS: dict[str, Any] = {
    "branches that multiply": _compositions(parts=[_compositions("Sum")] * 40),
    "many": _compositions(parts=["a"] * 100_000),
    "deep": _compositions(parts=["[" * 10]),
    "of no kind": _compositions(kind="os.system"),
    "of a strange kind": _compositions(kind=["Stack"]),
    "strange parts": _compositions(parts=[3, None]),
    "other folders": _compositions(parts=["../adapter", "a"]),
    "strange options": _compositions(kind="Average", weights="many"),
    "huge options": _compositions(kind="Average", weights=[10**30, 1]),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
@uncollected()
def test_compositions(name: str, tmp_path: Path) -> None:
    bench = bench_of(NATIVE)
    for each in ("a", "b"):
        write(NATIVE.files, tmp_path / each)
    (tmp_path / "composition.json").write_text(json.dumps(COMPOSITIONS[name]))
    start = time.process_time()
    with pytest.raises(PeftcoreError, match=str(tmp_path)):
        peftcore.load_composition(bench.model, tmp_path)
    assert time.process_time() - start < 2
    assert not differences(bench.before, trace(bench.model))


@pytest.mark.parametrize(
    ("composition", "why"),
    [
        (_compositions(parts=["a"] * 1001), "more than 1000 names"),
        (_compositions(parts=[_compositions("Sum")] * 9), "more than 1000 branches"),
        ("a", "is not a JSON object"),
    ],
)
def test_what_is_wrong_with_a_composition(composition: Any, why: str, tmp_path: Path) -> None:
    (tmp_path / "composition.json").write_text(json.dumps(composition))
    with pytest.raises(CheckpointError, match=why):
        peftcore.load_composition(bench_of(NATIVE).model, tmp_path)


@pytest.mark.parametrize("kind", STRANGE)
def test_a_composition_that_is_no_file(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    STRANGE[kind](tmp_path / "composition.json")
    with pytest.raises(CheckpointError, match=r"composition\.json|cannot be read as a composition"):
        peftcore.load_composition(bench_of(NATIVE).model, tmp_path)
